"""Orbax checkpoints that can be trusted: sealed with hashes, verified before they are read, never half of anything.

A step is a directory that appears whole, by a rename: arrays, `meta` (config, tokenizer, data, shapes, a fingerprint
of every array), and a manifest of hashes. Old steps go by way of trash/, damaged ones are set aside in quarantine/. On
disk the flat hidden axis is in canonical order, expert after expert, whatever the run's placement: a run goes on, with
the same function, on any mesh.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from modse_jax.errors import RunError, UserError
from modse_jax.runtime import files, integrity, processes, sharding
from modse_jax.training.train_step import State

FORMAT, TRASH, QUARANTINE, REWOUND, UNFINISHED = (
    2,
    "trash",
    "quarantine",
    "rewound",
    ".orbax-checkpoint-tmp",
)


REWRITTEN = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
)  # by Orbax after the seal; a restore does not read them


SPARE = 1.1  # free space that a save asks for, over the size of the state


SAVE_TIMEOUT = 1200  # seconds


class Found(NamedTuple):
    """The newest sound step, 0 for none; its meta; and newer ones that are damaged: [step, reason]."""

    step: int
    meta: dict
    damaged: list


class Checkpoints:
    """The steps under one directory. Saving is asynchronous; `close` waits for it.

    keep: newest steps kept, besides the best by validation loss and every `keep_every`-th (0: none). order: canonical
    column of every column of the flat axis in memory (sizing.column_order); (): the same order. read_only: nothing is
    written, moved or removed.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
        order: Sequence[int] = (),
    ):
        self._directory, self._keep, self._keep_every = directory.absolute(), keep, keep_every
        self._order, self._saving, self._losses = tuple(order), 0, {}
        names = ocp.path.step.standard_name_format(step_format_fixed_length=8)
        options = (
            ocp.CheckpointManagerOptions(step_name_format=names, read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(
                step_name_format=names,
                async_options=ocp.AsyncOptions(
                    timeout_secs=SAVE_TIMEOUT, post_finalization_callback=self._seal
                ),
            )
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self._directory, item_names=tuple(handlers), item_handlers=handlers, options=options
        )

    def steps(self) -> list[int]:
        """Those on disk, sound or not."""
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())

    def path(self, step: int) -> pathlib.Path:
        return self._directory / f"{step:08}"

    # ---- reading -----------------------------------------------------------------------------------------------------

    def verify(self, step: int) -> str:
        """Why a step is damaged, "" where it is sound."""
        return integrity.verify(self.path(step), REWRITTEN)

    def newest(self, check: Callable[[int, dict], None], before: int = 0) -> Found:
        """The newest sound step (before: older than that, 0: of all), whose meta passed check(step, meta).

        Raises UserError where only damaged ones are left, every time: a run never starts afresh over them. What check
        raises is no damage, and never leads to an older step.
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
        aside = sorted(p.name for p in (self._directory / QUARANTINE).glob("*"))
        if damaged or aside or before:
            text = "; ".join(
                [f"step {step}: {reason}" for step, reason in damaged]
                + [f"set aside earlier: {name}" for name in aside]
            )
            raise UserError(
                f"no sound checkpoint is left in {self._directory} ({text}); restore one from a copy, or "
                "use another --workdir. Nothing has been moved"
            )
        return Found(0, {}, [])

    def meta(self, step: int) -> dict:
        meta = files.read_json(self.path(step) / "meta" / "metadata")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {step} has format {meta.get('format')}, this code reads {FORMAT}; evaluate it "
                "with the version that wrote it"
            )
        return meta

    def restore(self, step: int, abstract: State) -> tuple[State, str]:
        """(the state of a verified step, placed as the abstract state's shardings say; why its arrays are not those
        that were saved, "" where they are). Raises UserError where names, shapes or types differ: Orbax alone would
        cast a type in silence."""
        meta = self.meta(step)
        _check_leaves(step, meta["leaves"], leaves(abstract))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=abstract._asdict(),
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract._asdict()),
                )
            ),
        )
        state = State(**restored["state"])
        prints = fingerprints(state)
        other = [name for name, value in meta["fingerprints"].items() if prints[name] != value]
        reason = f"{other[0]} is not what was saved ({len(other)} arrays differ)" if other else ""
        return _take_columns(state, self._order), reason

    # ---- writing -----------------------------------------------------------------------------------------------------

    def start_writing(self, damaged: Sequence, rewind_to: int = 0) -> list[str]:
        """Before the first save: removes what killed saves left, sets damaged steps aside, and steps past `rewind_to`
        (0: none). Returns what it did, in words."""
        said = []
        if processes.is_main_process():
            for entry in self._directory.iterdir():
                if UNFINISHED in entry.name or entry.name == TRASH:
                    shutil.rmtree(entry)
            for step, reason in damaged:
                where = self._set_aside(step, QUARANTINE)
                said.append(f"checkpoint {step} is damaged ({reason}); set aside as {where}")
            for step in [s for s in self.steps() if rewind_to and s > rewind_to]:
                said.append(
                    f"checkpoint {step} is past the rewind; set aside as {self._set_aside(step, REWOUND)}"
                )
        processes.wait_for_all()
        self._manager.reload()
        return said

    def save(self, state: State, meta: dict) -> None:
        """Starts to write the state under its own step; a step already there is left alone.

        meta: what else to keep, plain values; "validation_loss" (or None) decides which step is the best. Raises
        RunError where there is no room, the save before has failed, or the state is not finite.
        """
        step = int(state.step)
        self.wait()
        there, free = processes.broadcast_from_main(
            lambda: [step in self.steps(), shutil.disk_usage(self._directory).free]
        )
        if there:
            return
        state = canonical(state, self._order)
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
        if free < SPARE * size:
            raise RunError(
                f"no room to save step {step}: {self._directory} has {free / 2**20:,.0f} MiB free, "
                f"{SPARE * size / 2**20:,.0f} are needed{self._last_good()}"
            )
        if not all_finite(state):
            raise RunError(
                f"the state of step {step} is not finite and will not be saved{self._last_good()}"
            )
        self._saving, self._losses[step] = step, meta["validation_loss"]
        try:
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state._asdict()),
                    meta=ocp.args.JsonSave(
                        {
                            "format": FORMAT,
                            "step": step,
                            **meta,
                            "leaves": leaves(state),
                            "fingerprints": fingerprints(state),
                        }
                    ),
                ),
            )
        except Exception as error:
            self._failed(error)

    def poll(self) -> None:
        """Cheap; for every step of a loop. Raises RunError where the save under way has failed."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk; then removes the steps that need not be kept. Raises RunError where it has
        failed."""
        if not self._saving:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self._saving = 0
        if processes.is_main_process():
            files.flush_to_disk(self._directory)  # the rename that made the step appear
            self._prune()

    def settle(self) -> None:
        """Waits for the save under way, if any, whatever becomes of it: for a run that ends with another error. One of
        several processes does not: the save may be waiting for one that has ended."""
        if self._saving and not processes.is_multi_process():
            with contextlib.suppress(RunError):
                self.wait()

    def close(self) -> None:
        """Waits for the last save; RunError where it has failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _seal(self):
        """Orbax calls this in the background, on one process, when all is written and the step has yet to appear."""
        integrity.seal(
            self._directory / f"{self._saving:08}{UNFINISHED}", REWRITTEN, {"step": self._saving}
        )

    def _failed(self, error):
        step, self._saving = self._saving, 0
        if processes.is_main_process():
            for entry in self._directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(entry, ignore_errors=True)
        self._manager.reload()
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise RunError(
            f"saving step {step} in {self._directory} failed: {reason}{self._last_good()}"
        ) from error

    def _last_good(self):
        good = [s for s in self.steps() if not self.verify(s)]
        return (
            f"; step {good[-1]} is the last good one: mend the cause and run the same command again"
            if good
            else "; there is no earlier step"
        )

    def _prune(self):
        """Moves away all but the newest `keep` that are whole, the best, and every keep_every-th; then deletes. A kill
        at any moment leaves every step either whole in its place or in trash/."""
        whole = [
            s
            for s in self.steps()
            if not integrity.verify(self.path(s), REWRITTEN, hashes=s not in self._losses)
        ]
        for step in whole:
            if step not in self._losses:
                self._losses[step] = self.meta(step)["validation_loss"]
        validated = [s for s in whole if self._losses[s] is not None]
        best = min(validated, key=lambda s: (self._losses[s], s), default=0)
        kept = {
            *whole[-self._keep :],
            best,
            *(s for s in whole if self._keep_every and s % self._keep_every == 0),
        }
        old = [s for s in whole if s not in kept]
        if old:
            (self._directory / TRASH).mkdir(exist_ok=True)
            for step in old:
                os.rename(self.path(step), self._directory / TRASH / self.path(step).name)
            files.flush_to_disk(self._directory)
        shutil.rmtree(self._directory / TRASH, ignore_errors=True)

    def _set_aside(self, step, folder):
        target = self._directory / folder / f"{self.path(step).name}.{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        os.rename(self.path(step), target)
        files.flush_to_disk(self._directory)
        return f"{folder}/{target.name}"


def canonical(state: State, order: Sequence[int]) -> State:
    """The state with the flat axis in canonical order; `order` is the canonical column of every column it has now."""
    return _take_columns(state, np.argsort(np.array(order, np.int32)))


def leaves(state: State) -> dict[str, list]:
    """{path: [shape, type]} of every array."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named(state)}


def fingerprints(state: State) -> dict[str, int]:
    """{path: a number} that changes with any bit of an array, and not with the mesh it lies on."""
    names, arrays = zip(*_named(state))
    return dict(zip(names, map(int, jax.device_get(_fingerprints(list(arrays))))))


def all_finite(state: State) -> bool:
    return bool(_all_finite([leaf for _, leaf in _named((state.params, state.opt_state))]))


@jax.jit
def _all_finite(arrays):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in arrays]))


@jax.jit
def _fingerprints(arrays):
    return [_fingerprint(a) for a in arrays]


def _fingerprint(array):
    """sum_i (b_i xor i c) (2 i + 1) mod 2^32 of an array's bits b: a sum of integers wraps and so is the same in any
    order, on any mesh. The index is built axis by axis: flattening a sharded array would gather it."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = (
        array.astype(jnp.uint8)
        if array.dtype == bool
        else jax.lax.bitcast_convert_type(array, unsigned)
    )
    index, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= array.shape[axis]
    mixed = (bits.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B1))) * (
        2 * index + jnp.uint32(1)
    )
    return jnp.sum(mixed, dtype=jnp.uint32)


def _named(tree):
    def key(k):
        return str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))

    return [
        ("/".join(map(key, path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _take_columns(state, columns):
    columns = np.array(columns, np.int32)
    if np.array_equal(columns, np.arange(len(columns))):
        return state

    def one(path, leaf):  # one array at a time: no second copy of the whole state
        axis = sharding.flat_axis_of(str(getattr(path[-1], "key", "")))
        if axis is None:
            return leaf
        return jax.jit(functools.partial(jnp.take, axis=axis), out_shardings=leaf.sharding)(
            leaf, columns
        )

    return jax.tree_util.tree_map_with_path(one, state)


def _check_leaves(step, have, want):
    if len(have) != len(want):
        raise UserError(f"checkpoint {step} has {len(have)} arrays, the model has {len(want)}")
    bad = [
        f"{name} is {have.get(name)} there, {fact} here"
        for name, fact in want.items()
        if have.get(name) != fact
    ]
    if bad:
        raise UserError(f"checkpoint {step} does not fit the model: {'; '.join(bad[:5])}")
