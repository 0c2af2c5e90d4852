"""Decides after which training steps a run computes the validation loss."""

import math
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
    return read_validation(workdir, step) is None


def read_validation(workdir: pathlib.Path, step: int) -> dict | None:
    """Returns the line of metrics.jsonl of the validation after a step; None if there is none."""
    path = workdir / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    validations = [row for row in rows if row["step"] == step and row["split"] == "validation"]
    return validations[-1] if validations else None


def is_loss_finite(validation: dict) -> bool:
    """Returns True if the loss in a line of `read_validation` is finite.

    A loss that is not finite is null in the log, or NaN in logs of older versions.
    """
    return validation["loss"] is not None and math.isfinite(validation["loss"])


def describe_nonfinite(step: int, workdir: pathlib.Path) -> str:
    """Returns the message of a run whose last validation has a loss that is not finite."""
    return (
        f"diverged: the validation loss after the last step, {step}, is not finite. Lower "
        f"optimizer.learning_rate and train again in another --workdir; {workdir} keeps the logs"
    )
