"""Restores the state from which a run resumes: the newest intact checkpoint, or that of a rewind.

A rewind (the option training.rewind) resumes a run from an earlier checkpoint and skips the next
batches of data, for example because they made the loss diverge.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.runtime import processes
from modse_jax.training import run_metadata
from modse_jax.training.checkpointing import Checkpoints, Found
from modse_jax.training.train_step import State


class Restored(NamedTuple):
    """The state from which a run resumes.

    Attributes:
      step: number of completed steps; 0 if there are no checkpoints.
      state: the state; None if there are no checkpoints.
      damaged: [step, reason] for every damaged checkpoint that was found.
      rewind_to: the step to which the run is rewound now; 0 if it is not.
      skipped_data: [step, number of batches] for every rewind so far, this one included: after that
        step, that many batches of data are skipped.
      has_independent_seeds: as in `training_data.TrainingData`, of the run so far.
    """

    step: int
    state: State | None
    damaged: list[list]
    rewind_to: int
    skipped_data: list[list[int]]
    has_independent_seeds: bool


def restore_state(
    checkpoints: Checkpoints, state_shapes: State, metadata: dict[str, Any], config: Config
) -> Restored:
    """Restores the newest intact checkpoint, or that of a rewind which has not been done yet.

    Args:
      checkpoints: the checkpoints of the workdir. Nothing is moved or deleted.
      state_shapes: shapes, types and shardings of the state.
      metadata: metadata of this run, to check that a checkpoint was trained in the same way.
      config: the config of this run.

    Raises:
      UserError: the step of the rewind is missing or damaged, all checkpoints are damaged, or a
        checkpoint belongs to other data, to another model, or to a mesh that must not change.
    """
    check = functools.partial(run_metadata.check_same_run, config, metadata)
    rewind = config.training.rewind
    found = checkpoints.newest(check)
    damaged = found.damaged
    rewind_to = 0
    if rewind and list(rewind) not in found.meta.get("skipped_data", []):
        rewind_to = rewind[0]
        found = _find_rewind_target(checkpoints, rewind)
        damaged = [entry for entry in damaged if entry[0] < rewind_to]
    while found.step:
        state, reason = checkpoints.restore(found.step, state_shapes)
        if not reason:
            skipped_data = found.meta["skipped_data"]
            if rewind_to:
                skipped_data = [*skipped_data, list(rewind)]
            # Checkpoints of older versions lack the entry.
            has_independent_seeds = found.meta.get("independent_seeds", False)
            return Restored(
                found.step, state, damaged, rewind_to, skipped_data, has_independent_seeds
            )
        damaged.append([found.step, reason])
        found = checkpoints.newest(check, before=found.step)
        damaged += found.damaged
    return Restored(0, None, damaged, 0, [], True)


def _find_rewind_target(checkpoints: Checkpoints, rewind: Sequence[int]) -> Found:
    step = rewind[0]
    if step not in checkpoints.steps():
        saved_steps = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(f"training.rewind={rewind}: step {step} is not saved; saved: {saved_steps}")
    reason = processes.broadcast_from_main(lambda: checkpoints.verify(step))
    if reason:
        raise UserError(f"training.rewind={rewind}: checkpoint {step} is damaged: {reason}")
    return Found(step, checkpoints.meta(step), [])


def next_batch_number(step: int, skipped_data: Sequence[Sequence[int]]) -> int:
    """Returns the number of the data batch for the training step that follows `step` steps.

    Without rewinds this is `step`. Every rewind to `step` or an earlier one adds the number of
    batches that it skips.

    Args:
      step: number of completed steps.
      skipped_data: [step, number of batches] for every rewind.
    """
    return step + sum(count for first_step, count in skipped_data if step >= first_step)


def batches_read(step: int, skipped_data: Sequence[Sequence[int]]) -> list[range]:
    """Returns the numbers of the data batches of the first `step` training steps.

    They are one range of numbers for each part of the run between two rewinds.

    Args:
      step: number of completed steps.
      skipped_data: [step, number of batches] for every rewind.
    """
    starts = sorted({0, *(first_step for first_step, _ in skipped_data if first_step < step)})
    ends = [*starts[1:], step]
    batches = []
    for start, end in zip(starts, ends):
        first = next_batch_number(start, skipped_data)
        batches.append(range(first, first + end - start))
    return batches
