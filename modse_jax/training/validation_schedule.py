"""When a run validates."""

import pathlib

from modse_jax.config.options import TrainingConfig
from modse_jax.training import run_logs


def is_validation_step(step: int, options: TrainingConfig) -> bool:
    """Returns True for the last step and for every `training.eval_every`-th step."""
    if step == options.steps:
        return True
    return bool(options.eval_every) and step % options.eval_every == 0


def is_validation_missing(workdir: pathlib.Path, step: int, options: TrainingConfig) -> bool:
    """Returns True if the validation after a saved step was due but is not in the log.

    This is the case after a signal has interrupted it.
    """
    if step == 0 or not is_validation_step(step, options):
        return False
    path = workdir / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    return not any(row["step"] == step and row["split"] == "validation" for row in rows)
