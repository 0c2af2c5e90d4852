"""Orbax checkpoints: the state, and beside it the config, the tokenizer's fingerprint and the data's card."""
import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from modse_jax.config import UserError
from modse_jax.training.step import State

FORMAT = 1


class Checkpoints:
    """The steps under one directory. Saving is asynchronous; `close` waits for it."""

    def __init__(self, directory: pathlib.Path, keep: int, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(read_only=True) if read_only else ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep), todelete_subdir="trash",
            step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=8),
            cleanup_tmp_directories=True)
        if read_only:
            options.step_name_format = ocp.path.step.standard_name_format(step_format_fixed_length=8)
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), item_names=tuple(handlers), item_handlers=handlers,
                                              options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: State, meta: dict) -> None:
        """Starts to write the state under its own step; a step already there is left alone."""
        step = int(state.step)
        if step not in self.steps():
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state._asdict()),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta})))

    def meta(self, step: int) -> dict:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["format"] != FORMAT:
            raise UserError(f"checkpoint {step} has format {meta['format']}, this code reads {FORMAT}")
        return meta

    def restore(self, step: int, abstract: State) -> State:
        """The state of a step, placed as the abstract state's shardings say. Raises UserError where shapes or types
        differ: Orbax alone would cast a type in silence."""
        stored = self._manager.item_metadata(step)["state"].tree
        _check_leaves(step, stored, abstract._asdict())
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
            item=abstract._asdict(), restore_args=ocp.checkpoint_utils.construct_restore_args(abstract._asdict()))))
        return State(**restored["state"])

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


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
