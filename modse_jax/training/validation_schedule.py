"""Decides after which training steps a run computes the validation loss."""

import pathlib

from modse_jax.config.options import TrainingConfig
from modse_jax.training import run_logs


def is_validation_step(step: int, options: TrainingConfig) -> bool:
    """Returns True if a validation is due after a step: every `training.eval_every`, and the last.

    If training.eval_every is 0, only the last step is validated.
    """
    if step == options.steps:
        return True
    return bool(options.eval_every) and step % options.eval_every == 0


def is_validation_missing(workdir: pathlib.Path, step: int, options: TrainingConfig) -> bool:
    """Returns True if the validation after a saved step was due but is not in the log.

    This happens if a signal stopped the run between the checkpoint and the end of the validation.
    """
    if step == 0 or not is_validation_step(step, options):
        return False
    path = workdir / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    return not any(row["step"] == step and row["split"] == "validation" for row in rows)
