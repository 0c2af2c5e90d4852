"""The folder of compiled programs, from which a later start loads them instead of compiling.

JAX writes the cache and finds a program in it again. This module chooses the folder and limits its
size. A cached program is the same machine code that the compiler returned, so it computes the same
bits.
"""

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

# A training step is 1 to 10 MB.
MAX_BYTES = 2 * 2**30

# JAX leaves out programs that compile faster than this. Its default of one second would leave out
# many of the programs that sampling needs.
MIN_COMPILE_SECONDS = 0.2


def enable() -> pathlib.Path | None:
    """Lets JAX keep compiled programs on disk, unless the user has chosen otherwise.

    The variable JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

    Returns:
        The folder of the cache; None if the cache is off or its folder cannot be written.
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache:
        return None
    chosen = settings.jax_compilation_cache_dir
    if chosen:
        return pathlib.Path(chosen)
    folder = default_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        delete_oldest(folder.parent, MAX_BYTES)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def default_folder() -> pathlib.Path | None:
    """Returns the folder of this user and this processor; None if the user has no home.

    Programs for CPUs contain instructions that another processor may lack, and homes are shared by
    machines. JAX does not distinguish processors, so each kind has a folder of its own.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache"
    except RuntimeError:
        return None
    features = hashlib.sha256(describe_processor().encode()).hexdigest()[:12]
    return cache / "modse-jax" / "compiled" / features


def describe_processor() -> str:
    """Returns a text that is equal on machines that can run the same programs for CPUs."""
    try:
        lines = (
            pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        )
    except OSError:
        lines = []
    words = ("flags", "features", "cpu family", "model\t", "cpu part")
    described = {line for line in lines if line.lower().startswith(words)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(described)])


def delete_oldest(folder: pathlib.Path, max_bytes: int) -> None:
    """Deletes the files of a folder that were written first, until the rest fits.

    Empty files, which a full disk leaves behind, are deleted as well: JAX cannot read them and
    would not replace them.

    Args:
        folder: the folder, with those inside it.
        max_bytes: limit of the size of all files.
    """
    stats = []
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # deleted by another process
            continue
        if path.is_file():
            stats.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in stats)
    for _, size, path in sorted(stats):
        if size == 0 or total > max_bytes:
            path.unlink(missing_ok=True)
            total -= size
