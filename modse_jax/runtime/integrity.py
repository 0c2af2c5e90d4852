"""Hashes of every file of a directory, written with them and checked before anything is read. No JAX: a checkpoint or a
dataset can be verified on any machine.

They catch accidents. Whoever can write a directory can write its hashes anew: they are no signatures.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Collection

MANIFEST, FORMAT = "integrity.json", 1


LARGEST_JSON = (
    64 * 2**20
)  # bytes of a JSON file that is read whole: a damaged or hostile one must not fill memory


def files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """{path relative to root: path} of every file below it. Raises ValueError for a symlink, or anything else that is
    neither file nor directory: its content would lie elsewhere."""
    found, pending = {}, [root]
    while pending:
        for entry in os.scandir(pending.pop()):
            path = pathlib.Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                found[path.relative_to(root).as_posix()] = path
            else:
                kind = "a symlink" if entry.is_symlink() else "neither file nor directory"
                raise ValueError(f"{path.relative_to(root)} is {kind}")
    return dict(sorted(found.items()))


def digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def manifest_entries(root: pathlib.Path, leave_out: Collection[str] = ()) -> dict[str, list]:
    """{file: [size, hash]} of a directory."""
    return {
        name: [path.stat().st_size, digest(path)]
        for name, path in files(root).items()
        if name not in leave_out
    }


def seal(root: pathlib.Path, leave_out: Collection[str], about: dict) -> None:
    """Writes the manifest of a directory, and has everything in it on disk when it returns."""
    for path in files(root).values():
        sync(path)
    text = json.dumps(
        {"format": FORMAT, **about, "files": manifest_entries(root, {MANIFEST, *leave_out})},
        indent=1,
    )
    write(root / MANIFEST, text)
    for folder in {path.parent for path in files(root).values()} | {root}:
        sync(folder)


def verify(root: pathlib.Path, leave_out: Collection[str], hashes: bool = True) -> str:
    """Why the directory is not what was sealed, in words; "" where it is. hashes: False compares names and sizes."""
    try:
        here = files(root)
        manifest = read_json(root / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"its manifest has format {manifest['format']}, this code reads {FORMAT}"
        wanted = manifest["files"]
        bad = [f"{name} is missing" for name in wanted if name not in here]
        bad += [
            f"{name} does not belong there"
            for name in here
            if name not in {MANIFEST, *leave_out, *wanted}
        ]
        bad += [
            trouble
            for name, fact in wanted.items()
            if name in here and (trouble := mismatch(here[name], name, fact, hashes))
        ]
    except FileNotFoundError:
        return f"no {MANIFEST}: not finished, half deleted, or of other software"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{error}" if isinstance(error, (OSError, ValueError)) else f"{MANIFEST} is damaged"
    return f"{bad[0]}{f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''}" if bad else ""


def mismatch(path: pathlib.Path, name: str, fact: list, hashes: bool = True) -> str:
    """Why a file is not the one whose [size, hash] is given; "" where it is."""
    size, wanted = fact
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return (
        f"{name} holds other bytes than were written" if hashes and digest(path) != wanted else ""
    )


def read_json(path: pathlib.Path):
    """Raises ValueError for what is not JSON, or too large to be ours."""
    if path.is_symlink() or path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is a symlink, or larger than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path.name} is damaged (not JSON)") from None


def write(path: pathlib.Path, text: str) -> None:
    """The file appears whole, or not at all, even if the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """What a file or directory holds is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
