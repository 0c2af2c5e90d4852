"""Files that are complete or absent: atomic writes, flushing to disk, safe reading and listing."""

import contextlib
import errno
import json
import math
import os
import pathlib
import stat
import sys
from typing import Any

from modse_jax.errors import UserError

# Most bytes of a JSON file to read. A damaged or hostile file must not fill the memory.
LARGEST_JSON = 64 * 2**20


# Errors of writing to a disk that has no room or may not be written.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_is_text(path: pathlib.Path, option: str) -> None:
    """Raises UserError if the name of a directory to write to is not text in this locale.

    The libraries that write records and checkpoints take paths as UTF-8. Python represents bytes
    that it cannot decode by surrogates, which have no UTF-8 form.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{option}={path} cannot be read as text in the encoding of this locale "
            f"({sys.getfilesystemencoding()}); set the environment variable PYTHONUTF8=1, or "
            "choose a name of ASCII characters"
        ) from None


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that after a crash or power failure either the new or the old file exists.

    The content is flushed to disk under a temporary name, then renamed.
    """
    temporary = path.with_name(path.name + ".tmp")
    # Surrogates stand for the bytes of a path that is not UTF-8.
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def format_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON. NaN and infinity, which JSON does not have, become null.

    Args:
      value: the value.
      **options: see `json.dumps`.
    """
    return json.dumps(_without_nonfinite(value), allow_nan=False, **options)


def _without_nonfinite(value: Any) -> Any:
    """Returns a copy of nested dicts, lists and tuples with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flush_to_disk(path: pathlib.Path) -> None:
    """Blocks until the contents of a file, or the entries of a directory, are on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: pathlib.Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
      ValueError: the file is a symlink, larger than `LARGEST_JSON`, or not JSON.
    """
    if path.is_symlink() or path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is a symlink, or larger than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is damaged (not JSON)") from None


def list_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns {path relative to root: path} for every file below a directory, sorted by name.

    Raises:
      ValueError: an entry is neither a file nor a directory, such as a symlink. Its content is
        stored elsewhere and could change without any file of this directory changing.
    """
    found = {}
    pending = [root]
    while pending:
        for entry in os.scandir(pending.pop()):
            path = pathlib.Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                found[name] = path
            elif entry.is_symlink():
                raise ValueError(f"{name} is a symlink")
            else:
                raise ValueError(f"{name} is neither file nor directory")
    return dict(sorted(found.items()))
