"""Orbax checkpoints that are verified before they are read, and visible only when complete.

The checkpoint of each saved step is a directory. It appears by a rename, once everything in it is
on disk:

  state/           the arrays
  meta/            config, tokenizer, data, shapes, and a fingerprint of every array
  integrity.json   a manifest of sizes and hashes

Steps that are no longer needed are moved to trash/ and deleted there. Damaged steps are moved to
quarantine/. If a run is rewound to an earlier step, later steps are moved to rewound/.

On disk, the hidden units of all experts are in canonical order: those of expert 0, then those of
expert 1, and so on. In memory their order depends on which device holds which expert. So a run can
resume on any mesh.
"""

import contextlib
import functools
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint as ocp

from modse_jax.errors import DiskFullError, RunError, UserError, describe_exception
from modse_jax.runtime import files, integrity, processes
from modse_jax.training import fingerprints, state_arrays
from modse_jax.training.train_step import State

# Names of the directories for steps that are moved away.
TRASH = "trash"
QUARANTINE = "quarantine"
REWOUND = "rewound"

# A directory with this in its name is a step that Orbax has not completed.
UNFINISHED = ".orbax-checkpoint-tmp"

# Files that Orbax rewrites after the manifest has been written, so the manifest leaves them out. A
# restore does not read them.
REWRITTEN = ("_CHECKPOINT_METADATA", "commit_success.txt")

FREE_SPACE_FACTOR = 1.1  # free space that a save requires, relative to the size of the state
SAVE_TIMEOUT = 1200  # seconds
MAX_REASON_LENGTH = 300  # most characters of an Orbax error in a message
MIB = 2**20


class Found(NamedTuple):
    """The newest intact checkpoint.

    Attributes:
      step: its step, or 0 if there are no checkpoints.
      meta: its metadata.
      damaged: [step, reason] for every newer checkpoint, all of which are damaged.
    """

    step: int
    meta: dict
    damaged: list[list]


class Checkpoints:
    """The checkpoints in one directory. Saving is asynchronous; `close` waits for it."""

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
        order: Sequence[int] = (),
    ) -> None:
        """Opens a directory of checkpoints.

        Args:
          directory: the directory.
          keep: how many of the newest steps are kept. The step with the lowest validation loss is
            kept, too.
          keep_every: steps divisible by this number are kept, too; 0 for none.
          read_only: nothing is written, moved or deleted.
          order: the order of the experts' hidden units in memory, as returned by
            `expert_placement.hidden_unit_order`; () if it is that of checkpoints, the canonical
            order.
        """
        self._directory = directory.absolute()
        self._keep = keep
        self._keep_every = keep_every
        self._order = tuple(order)
        self._saving = 0  # the step that is being saved; 0 if none
        self._losses: dict[int, float | None] = {}  # validation losses of saved steps
        self._manager = self._open_manager(read_only)

    def _open_manager(self, read_only: bool) -> ocp.CheckpointManager:
        names = ocp.path.step.standard_name_format(step_format_fixed_length=8)
        if read_only:
            options = ocp.CheckpointManagerOptions(step_name_format=names, read_only=True)
        else:
            asynchronous = ocp.AsyncOptions(
                timeout_secs=SAVE_TIMEOUT, post_finalization_callback=self._seal
            )
            options = ocp.CheckpointManagerOptions(
                step_name_format=names, async_options=asynchronous
            )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(
            self._directory, item_names=tuple(handlers), item_handlers=handlers, options=options
        )

    def steps(self) -> list[int]:
        """Returns the steps on disk in ascending order, damaged ones included."""
        names = [path.name for path in self._directory.iterdir()]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> pathlib.Path:
        """Returns the directory of a step."""
        return self._directory / f"{step:08}"

    def verify(self, step: int) -> str:
        """Compares the files of a step with their recorded sizes and hashes.

        Returns:
          A description of the damage, or "" if the step is intact.
        """
        return integrity.verify(self.path(step), REWRITTEN)

    def newest(self, check: Callable[[int, dict], None], before: int = 0) -> Found:
        """Finds the newest intact step.

        Args:
          check: called with the intact step and its metadata, to raise an error if it belongs to
            another run. Such an error is passed on; no older step is tried.
          before: only steps before this one are considered; 0 considers all.

        Raises:
          UserError: there are steps, but all are damaged. Starting a new run in the same directory
            would hide that.
        """
        damaged = []
        for step in reversed(processes.broadcast_from_main(self.steps)):
            if before and step >= before:
                continue
            reason = processes.broadcast_from_main(functools.partial(self.verify, step))
            if not reason:
                meta = self.meta(step)
                check(step, meta)
                return Found(step, meta, damaged)
            damaged.append([step, reason])
        quarantined = sorted(path.name for path in (self._directory / QUARANTINE).glob("*"))
        if damaged or quarantined or before:
            found = [f"step {step}: {reason}" for step, reason in damaged]
            found += [f"set aside earlier: {name}" for name in quarantined]
            raise UserError(
                f"no sound checkpoint is left in {self._directory} ({'; '.join(found)}); restore "
                "one from a copy, or use another --workdir. Nothing has been moved"
            )
        return Found(0, {}, [])

    def meta(self, step: int) -> dict:
        """Reads the metadata of a step: config, data, fingerprints of the arrays, and so on.

        Raises:
          UserError: the step was saved in a format that this version cannot read.
        """
        meta = files.read_json(self.path(step) / "meta" / "metadata")
        if meta.get("format") not in fingerprints.FINGERPRINTS:
            readable = ", ".join(map(str, fingerprints.FINGERPRINTS))
            raise UserError(
                f"checkpoint {step} has format {meta.get('format')}, but this version reads "
                f"formats {readable}; use the version of modse_jax that wrote it"
            )
        return meta

    def restore(self, step: int, abstract: State) -> tuple[State, str]:
        """Reads the state of a step, whose files must have been verified.

        Args:
          step: the step.
          abstract: shapes, types and shardings of the state.

        Returns:
          The state, and a description of the arrays that are not bit for bit what was saved ("" if
          all are).

        Raises:
          UserError: names, shapes or types differ from `abstract`. (Orbax alone would silently cast
            a type.)
        """
        meta = self.meta(step)
        state_arrays.check_arrays(step, meta["leaves"], state_arrays.describe_arrays(abstract))
        target = _saved_fields(abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments))
        state = State(**{"router_bias": {}, **restored["state"]})
        actual = state_arrays.compute_fingerprints(state, meta["format"])
        changed = [name for name, saved in meta["fingerprints"].items() if actual[name] != saved]
        reason = ""
        if changed:
            reason = f"{changed[0]} is not what was saved ({len(changed)} arrays differ)"
        return state_arrays.from_canonical_order(state, self._order), reason

    def start_writing(self, damaged: Sequence[Sequence], rewind_to: int = 0) -> list[str]:
        """Prepares the directory for the first save.

        Removes what interrupted saves left behind. Moves damaged steps to quarantine/, and steps
        after a rewind to rewound/.

        Args:
          damaged: [step, reason] for every damaged step.
          rewind_to: the step to which the run is rewound, after which steps are moved away; 0 if it
            is not rewound.

        Returns:
          Messages to print about the steps that were moved.
        """
        messages = []
        if processes.is_main_process():
            for entry in self._directory.iterdir():
                if UNFINISHED in entry.name or entry.name == TRASH:
                    shutil.rmtree(entry)
            for step, reason in damaged:
                target = self._set_aside(step, QUARANTINE)
                messages.append(f"checkpoint {step} is damaged ({reason}); set aside as {target}")
            for step in self.steps():
                if rewind_to and step > rewind_to:
                    target = self._set_aside(step, REWOUND)
                    messages.append(f"checkpoint {step} is past the rewind; set aside as {target}")
        processes.wait_for_all()
        self._manager.reload()
        return messages

    def save(self, state: State, meta: dict) -> None:
        """Starts to save a state in the background. A step that exists is not overwritten.

        Args:
          state: the state, which contains the number of its step.
          meta: additional metadata, values that JSON can represent. "validation_loss" (a finite
            number, or None) decides which step is kept as the best.

        Raises:
          RunError: there is not enough space, the previous save failed, or the state is not finite.
        """
        step = int(state.step)
        self.wait()
        exists, free = processes.broadcast_from_main(
            lambda: [step in self.steps(), shutil.disk_usage(self._directory).free]
        )
        if exists:
            return
        state = state_arrays.to_canonical_order(state, self._order)
        self._check_space(step, state, free)
        if not state_arrays.all_finite(state):
            raise RunError(
                f"the state of step {step} is not finite and will not be saved{self._last_good()}"
            )
        full_meta = {
            "format": fingerprints.FORMAT,
            "step": step,
            **meta,
            "leaves": state_arrays.describe_arrays(state),
            "fingerprints": state_arrays.compute_fingerprints(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_saved_fields(state)), meta=ocp.args.JsonSave(full_meta)
        )
        self._saving = step
        self._losses[step] = meta["validation_loss"]
        try:
            self._manager.save(step, force=True, args=items)
        except Exception as error:
            self._fail(error)

    def _check_space(self, step: int, state: State, free: int) -> None:
        size = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
        needed = FREE_SPACE_FACTOR * size
        if free < needed:
            raise DiskFullError(
                f"no room to save step {step}: {self._directory} has {free / MIB:,.0f} MiB free, "
                f"but {needed / MIB:,.0f} MiB are needed{self._last_good()}"
            )

    def poll(self) -> None:
        """Completes a save if its background work has ended; returns at once if it has not.

        To be called after every training step.

        Raises:
          RunError: the save failed.
        """
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk, then deletes the steps that are no longer kept.

        Raises:
          RunError: the save failed.
        """
        if not self._saving:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._saving = 0
        if processes.is_main_process():
            files.flush_to_disk(self._directory)  # the rename that made the step visible
            self._prune()

    def settle(self) -> None:
        """Waits for the last save, if any, and ignores its failure.

        For a run that ends with an error already. With several processes it does not wait, because
        the save may depend on a process that has ended.
        """
        if self._saving and not processes.is_multi_process():
            with contextlib.suppress(RunError):
                self.wait()

    def close(self) -> None:
        """Waits for the last save and frees resources.

        Raises:
          RunError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _seal(self) -> None:
        """Writes the manifest (sizes and hashes of all files) of the step that is being saved.

        Orbax calls this in the background, on one process, when it has written all files and has
        not yet renamed the directory, so that no step is visible without a manifest.
        """
        unfinished = self._directory / f"{self._saving:08}{UNFINISHED}"
        integrity.seal(unfinished, REWRITTEN, {"step": self._saving})

    def _fail(self, error: Exception) -> NoReturn:
        step = self._saving
        self._saving = 0
        if processes.is_main_process():
            for entry in self._directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(entry, ignore_errors=True)
        self._manager.reload()
        text = describe_exception(error)
        reason = text.splitlines()[0][:MAX_REASON_LENGTH]
        # Orbax raises errors of its own types, which have only the text of the system's.
        is_disk_full = any(os.strerror(number) in text for number in files.DISK_FULL)
        raise (DiskFullError if is_disk_full else RunError)(
            f"saving step {step} in {self._directory} failed: {reason}{self._last_good()}"
        ) from error

    def _last_good(self) -> str:
        """Returns the end of an error message, which says from which step the run can resume."""
        good = [step for step in self.steps() if not self.verify(step)]
        if not good:
            return "; there is no earlier step"
        return (
            f"; step {good[-1]} is the last good one: fix the cause and run the same command again"
        )

    def _prune(self) -> None:
        """Deletes the steps that are no longer kept; see `_obsolete_steps`.

        They are first moved to trash/. If the process is killed at any moment, every step is either
        intact in its place or in trash/, which the next run empties.
        """
        obsolete = self._obsolete_steps()
        trash = self._directory / TRASH
        if obsolete:
            trash.mkdir(exist_ok=True)
            for step in obsolete:
                os.rename(self.path(step), trash / self.path(step).name)
            files.flush_to_disk(self._directory)
        shutil.rmtree(trash, ignore_errors=True)

    def _obsolete_steps(self) -> list[int]:
        """Returns the steps to delete.

        These are all intact steps except the newest `keep`, the step with the lowest validation
        loss, and the steps divisible by `keep_every`. Damaged steps are not deleted. Whether a step
        is intact is decided by the sizes of its files, and once also by their hashes if an earlier
        process saved it.
        """
        intact = [
            step
            for step in self.steps()
            if not integrity.verify(self.path(step), REWRITTEN, hashes=step not in self._losses)
        ]
        for step in intact:
            if step not in self._losses:
                self._losses[step] = self.meta(step)["validation_loss"]
        kept = set(intact[-self._keep :])
        validated = [step for step in intact if _is_known(self._losses[step])]
        if validated:
            kept.add(min(validated, key=lambda step: (self._losses[step], step)))
        if self._keep_every:
            kept |= {step for step in intact if step % self._keep_every == 0}
        return [step for step in intact if step not in kept]

    def _set_aside(self, step: int, folder: str) -> str:
        """Moves a step into a folder such as quarantine/; returns its new relative path.

        The time is appended to its name, because a step of the same number may be moved again.
        """
        target = self._directory / folder / f"{self.path(step).name}.{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        os.rename(self.path(step), target)
        files.flush_to_disk(self._directory)
        return f"{folder}/{target.name}"


def _is_known(loss: float | None) -> bool:
    """Returns True for a finite loss. Checkpoints of older versions may hold NaN."""
    return loss is not None and math.isfinite(loss)


def _saved_fields(state: State) -> dict[str, Any]:
    """Returns the fields of a state that have arrays, by name.

    Without a bias rule, the router bias has none. It is left out, so that such checkpoints are the
    same as those of older versions, which had no router bias.
    """
    return {name: value for name, value in state._asdict().items() if jax.tree.leaves(value)}
