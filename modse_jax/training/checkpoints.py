"""Orbax checkpoints: the state, and beside it the config, the tokenizer's fingerprint and the data's card.

On disk the flat hidden axis is in canonical order, expert after expert, whatever the run's placement: a run goes on,
with the same function, on any mesh.
"""
import functools
import pathlib
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from modse_jax import mesh as meshes
from modse_jax import processes
from modse_jax.config import UserError
from modse_jax.training.step import State

FORMAT, TRASH = 1, "trash"


class Checkpoints:
    """The steps under one directory. Saving is asynchronous; `close` waits for it.

    order: canonical column of every column of the flat axis in memory (sizing.column_order); (): the same order.
    """

    def __init__(self, directory: pathlib.Path, keep: int, read_only: bool = False, order: Sequence[int] = ()):
        self._order = tuple(order)
        names = ocp.path.step.standard_name_format(step_format_fixed_length=8)
        # An old step is renamed into trash/ and deleted from there: a kill cannot leave half of one that looks whole.
        options = ocp.CheckpointManagerOptions(step_name_format=names, read_only=True) if read_only else \
            ocp.CheckpointManagerOptions(step_name_format=names, todelete_subdir=TRASH, cleanup_tmp_directories=True,
                                         preservation_policy=preservation_policy.LatestN(keep))
        self._read_only, self._trash = read_only, directory / TRASH
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), item_names=tuple(handlers), item_handlers=handlers,
                                              options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: State, meta: dict) -> None:
        """Starts to write the state under its own step; a step already there is left alone."""
        step = int(state.step)
        self.wait()
        if step not in self.steps():
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(canonical(state, self._order)._asdict()),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta})))

    def meta(self, step: int) -> dict:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["format"] != FORMAT:
            raise UserError(f"checkpoint {step} has format {meta['format']}, this code reads {FORMAT}")
        return meta

    def check_meta(self, step: int, meta: dict) -> None:
        """Raises UserError where a step was trained on other data, or with another tokenizer, than `meta` says."""
        saved = self.meta(step)
        for name in ("tokenizer", "data"):
            if saved[name] != meta[name]:
                raise UserError(f"checkpoint {step} was trained with other data ({name}: {saved[name]!r}), now "
                                f"{meta[name]!r}; restore the data it was trained on, or use another --workdir")

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step, placed as the abstract state's shardings say. Raises UserError where shapes or types
        differ: Orbax alone would cast a type in silence."""
        stored = self._manager.item_metadata(step)["state"].tree
        _check_leaves(step, stored, abstract._asdict())
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
            item=abstract._asdict(), restore_args=ocp.checkpoint_utils.construct_restore_args(abstract._asdict()))))
        return _take_columns(State(**restored["state"]), self._order)

    def wait(self) -> None:
        """Until the last save is on disk; then removes the steps it has replaced."""
        self._manager.wait_until_finished()
        if not self._read_only and processes.first():
            shutil.rmtree(self._trash, ignore_errors=True)

    def close(self) -> None:
        self.wait()
        self._manager.close()


def canonical(state: State, order: Sequence[int]) -> State:
    """The state with the flat axis in canonical order; `order` is the canonical column of every column it has now."""
    return _take_columns(state, np.argsort(np.array(order, np.int32)))


def _take_columns(state, columns):
    columns = np.array(columns, np.int32)
    if np.array_equal(columns, np.arange(len(columns))):
        return state

    def one(path, leaf):    # one array at a time: no second copy of the whole state
        axis = meshes.flat_axis(str(getattr(path[-1], "key", "")))
        if axis is None:
            return leaf
        return jax.jit(functools.partial(jnp.take, axis=axis), out_shardings=leaf.sharding)(leaf, columns)

    return jax.tree_util.tree_map_with_path(one, state)


def _check_leaves(step, stored, abstract):
    def spec(leaf):
        return tuple(leaf.shape), str(leaf.dtype)

    def name(path):
        return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    have = {name(path): spec(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    want = {name(path): spec(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    if len(have) != len(want):
        raise UserError(f"checkpoint {step} has {len(have)} arrays, the model has {len(want)}")
    bad = [f"{k} is {have.get(k)} there, {v} here" for k, v in want.items() if have.get(k) != v]
    if bad:
        raise UserError(f"checkpoint {step} does not fit the model: {'; '.join(bad[:3])}")
