"""Documents of a source, in a fixed order, and which of them are held out."""
import glob
import hashlib
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from modse_jax.config import UserError

FORMS = "python_stdlib or text:PATH (a file, a folder, or a glob)"
BLANK_LINE = re.compile(rb"\n\r?\n")
PIECE_BYTES = 16384    # a lone text file is cut into documents of at least this size, at blank lines


class Document(NamedTuple):
    name: str
    text: bytes


def files(source: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of every file of a source, sorted by name. Raises UserError where there is none."""
    kind, _, where = source.partition(":")
    if kind == "python_stdlib" and not where:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        out = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py") if path.is_file()]
        skip = {"site-packages", "dist-packages", "__pycache__"}
        out = [(name, path) for name, path in out if not skip & set(pathlib.PurePosixPath(name).parts)]
    elif kind == "text" and where:
        root = pathlib.Path(where).expanduser()
        if root.is_file():
            out = [(root.name, root)]
        elif root.is_dir():
            out = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file()]
        else:
            out = [(match, pathlib.Path(match)) for match in glob.glob(str(root), recursive=True)
                   if pathlib.Path(match).is_file()]
    else:
        raise UserError(f"source {source!r} must be {FORMS}")
    if not out:
        raise UserError(f"source {source!r} has no files; give {FORMS}")
    return sorted(out)


def size(source: str) -> int:
    """Bytes of all files of a source."""
    return sum(path.stat().st_size for _, path in files(source))


def documents(source: str) -> Iterator[Document]:
    """Every document: one per file; of a single text file, runs of paragraphs of at least PIECE_BYTES."""
    found = files(source)
    for name, path in found:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if source.startswith("text:") and len(found) == 1:
            yield from _pieces(name, text)
        else:
            yield Document(name, text)


def held_out(names: list[str], fraction: float) -> set[str]:
    """The names whose hash falls below the fraction; at least one, and not all, where there are two or more.
    A file stays on its side when others come or go."""
    ranked = sorted(names, key=_hash)
    count = sum(_hash(name) < fraction for name in ranked)
    return set(ranked[:min(max(count, 1), len(ranked) - 1)]) if ranked else set()


def _hash(name):
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:13], 16) / 16**13


def _pieces(name, text):
    start, number = 0, 0
    while start < len(text):
        blank = BLANK_LINE.search(text, start + PIECE_BYTES)
        end = blank.end() if blank else len(text)
        yield Document(f"{name}#{number:06d}", text[start:end])
        start, number = end, number + 1
