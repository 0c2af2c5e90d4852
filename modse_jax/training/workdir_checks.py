"""Rules about the directory of a run: what it may hold, and who may write to it."""

import contextlib
import enum
import json
import os
import pathlib
import types

from modse_jax.config.loading import (
    RESUMABLE,
    RESUMABLE_ANY_MESH,
    differences,
    from_saved,
)
from modse_jax.config.options import Config, DataConfig
from modse_jax.data import validation_sets
from modse_jax.errors import UserError
from modse_jax.runtime import files, processes
from modse_jax.runtime.lock import Lock
from modse_jax.training.checkpointing import QUARANTINE

# Entries that a run may leave if it is killed before it writes config.json. A directory with
# nothing else counts as empty, because only config.json marks a directory as that of a run.
BEFORE_CONFIG = {
    "data",
    "data.partial",
    "data.preparing",
    validation_sets.FOLDER,
    "checkpoints",
    "environment.json",
    "environment.json.tmp",
    "config.json.tmp",
}


class WorkdirContents(enum.Enum):
    """Kinds of contents that a workdir can have before a run starts."""

    NOTHING = enum.auto()  # it is missing, empty, or holds only `BEFORE_CONFIG`
    RUN = enum.auto()  # a run with its config.json
    FILE = enum.auto()  # the path is not a directory
    CHECKPOINTS_ONLY = enum.auto()  # checkpoints without a config.json
    OTHER_FILES = enum.auto()  # files that no run has written


def classify_workdir(workdir: pathlib.Path) -> WorkdirContents:
    """Returns what a workdir holds."""
    if (workdir / "config.json").exists():
        return WorkdirContents.RUN
    if not workdir.exists():
        return WorkdirContents.NOTHING
    if not workdir.is_dir():
        return WorkdirContents.FILE
    checkpoints = workdir / "checkpoints"
    quarantine = checkpoints / QUARANTINE
    if any(checkpoints.glob("[0-9]*")) or any(quarantine.glob("*")):
        return WorkdirContents.CHECKPOINTS_ONLY
    if any(path.name not in BEFORE_CONFIG for path in workdir.iterdir()):
        return WorkdirContents.OTHER_FILES
    return WorkdirContents.NOTHING


def check_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Checks that a run with this config may start or resume in a workdir.

    Raises:
      UserError: the workdir holds something else, holds a run with a config that may not change in
        this way, or cannot be written.
    """
    files.check_is_text(workdir, "--workdir")
    contents = classify_workdir(workdir)
    if contents is WorkdirContents.FILE:
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    if contents is WorkdirContents.CHECKPOINTS_ONLY:
        raise UserError(
            f"{workdir} holds checkpoints but no config.json to compare with; each step's meta "
            "holds its config: restore the file, or use another --workdir"
        )
    if contents is WorkdirContents.OTHER_FILES:
        raise UserError(
            f"--workdir={workdir} is not empty and holds no run (no config.json); name another "
            "directory"
        )
    if contents is WorkdirContents.RUN:
        _check_saved_config(workdir, config)
    else:
        _check_single_source(config)
    parent = nearest_existing_parent(workdir)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"--workdir={workdir} cannot be made: {parent} is not a directory that may be written"
        )


def _check_single_source(config: Config) -> None:
    """Raises UserError if a new run names a source that its mixture would replace.

    Older versions ignored the source, so runs that they started may have both.
    """
    default = DataConfig().source
    if config.data.mixture and config.data.source != default:
        raise UserError(
            f"data.source={config.data.source} would not be used, because data.mixture replaces "
            f"it; leave one of the two out (data.mixture=(), or data.source={default})"
        )


def _check_saved_config(workdir: pathlib.Path, config: Config) -> None:
    path = workdir / "config.json"
    try:
        saved = from_saved(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path} is not a config of this version ({error}); use another --workdir"
        ) from None
    allowed = RESUMABLE
    if not config.depends_on_mesh:
        allowed = RESUMABLE + RESUMABLE_ANY_MESH
    changed = [line for line in differences(saved, config) if line.split(":")[0] not in allowed]
    if changed:
        raise UserError(
            f"{workdir} holds another config ({'; '.join(changed)}); use another --workdir, or the "
            "config it was started with"
        )


def nearest_existing_parent(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the workdir, or the nearest of its parents that exists."""
    return next(path for path in (workdir, *workdir.parents) if path.exists())


def lock_workdir(workdir: pathlib.Path, cleanup: contextlib.ExitStack) -> None:
    """Makes this run the only writer of a workdir until `cleanup` closes.

    The main process holds the lock. If `cleanup` closes because of a UserError, the lock file and
    directories created for it are removed, since bad input must leave no trace.

    Raises:
      UserError: on every process, if another run holds the lock.
    """
    processes.on_all_processes(lambda: _acquire_lock(workdir, cleanup))


def _acquire_lock(workdir: pathlib.Path, cleanup: contextlib.ExitStack) -> None:
    if not processes.is_main_process():
        return
    lock = Lock(workdir / "checkpoints" / ".lock", f"{workdir} is in use")

    def release(
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        is_bad_input = kind is not None and issubclass(kind, UserError)
        lock.release(leave_no_trace=is_bad_input)

    cleanup.push(release)
