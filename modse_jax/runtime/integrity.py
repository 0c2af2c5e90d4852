"""Manifests: the sizes and hashes of all files in a directory, to verify before they are read.

A manifest is a file in the directory itself. It detects accidental damage only: whoever can change
the files can also rewrite the manifest, so the hashes are not signatures. This module does not use
JAX, so a checkpoint or a dataset can be verified on any machine.
"""

import hashlib
import json
import pathlib
from collections.abc import Collection

from modse_jax.runtime.files import flush_to_disk, list_files, read_json, write_atomically

MANIFEST = "integrity.json"
FORMAT = 1


def hash_file(path: pathlib.Path) -> str:
    """Returns the BLAKE2b hash of a file, as 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def manifest_entries(root: pathlib.Path, leave_out: Collection[str] = ()) -> dict[str, list]:
    """Returns {file name relative to root: [size in bytes, hash]} for a directory."""
    return {
        name: [path.stat().st_size, hash_file(path)]
        for name, path in list_files(root).items()
        if name not in leave_out
    }


def seal(root: pathlib.Path, leave_out: Collection[str], about: dict) -> None:
    """Writes the manifest of a directory, and flushes everything in the directory to disk.

    Args:
      root: the directory.
      leave_out: names of files that the manifest does not list, because they may still change.
      about: additional entries of the manifest.
    """
    for path in list_files(root).values():
        flush_to_disk(path)
    entries = manifest_entries(root, {MANIFEST, *leave_out})
    manifest = {"format": FORMAT, **about, "files": entries}
    write_atomically(root / MANIFEST, json.dumps(manifest, indent=1))
    folders = {path.parent for path in list_files(root).values()} | {root}
    for folder in folders:
        flush_to_disk(folder)


def verify(root: pathlib.Path, leave_out: Collection[str], hashes: bool = True) -> str:
    """Compares a directory with its manifest.

    Args:
      root: the directory.
      leave_out: names of files that may exist without being listed in the manifest.
      hashes: False compares only names and sizes.

    Returns:
      A description of the damage, or "" if the directory is intact.
    """
    try:
        problems = _find_problems(root, leave_out, hashes)
    except FileNotFoundError:
        return f"no {MANIFEST}: unfinished, partly deleted, or written by other software"
    except (OSError, ValueError) as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more


def _find_problems(root: pathlib.Path, leave_out: Collection[str], hashes: bool) -> list[str]:
    present = list_files(root)
    manifest = read_json(root / MANIFEST)
    if manifest["format"] != FORMAT:
        return [f"expected a manifest of format {FORMAT}, found format {manifest['format']}"]
    listed = manifest["files"]
    allowed = {MANIFEST, *leave_out, *listed}
    missing = [f"{name} is missing" for name in listed if name not in present]
    extra = [f"{name} does not belong there" for name in present if name not in allowed]
    changed = [
        mismatch(present[name], name, entry, hashes)
        for name, entry in listed.items()
        if name in present
    ]
    return missing + extra + [problem for problem in changed if problem]


def mismatch(path: pathlib.Path, name: str, entry: list, hashes: bool = True) -> str:
    """Compares a file with its manifest entry [size, hash].

    Returns:
      A description of the difference, or "" if there is none.
    """
    size, expected_hash = entry
    actual_size = path.stat().st_size
    if actual_size != size:
        return f"{name} has {actual_size} bytes, but {size} were written"
    if hashes and hash_file(path) != expected_hash:
        return f"{name} holds other bytes than were written"
    return ""
