"""Finds the files of a source, divides them into parts, and opens them, compressed or not."""

import glob
import io
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any, BinaryIO

from modse_jax.data.sources.documents_and_parts import Part, SourceOptions
from modse_jax.errors import UserError

SOURCE_FORMS = (
    "text:PATH, jsonl:PATH, parquet:PATH (a file, a folder, or a glob), "
    "tfds:NAME[/CONFIG][:SPLIT], or python_stdlib"
)

FILE_KINDS = ("text", "jsonl", "parquet")

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

PART_BYTES = 32 * 2**20  # target size of a part

NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def find_files(source: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, path) of every file of a source, sorted by name.

    The name is the path relative to the folder of the source, or the path itself for a glob.

    Raises:
        UserError: the source has no files, or its form is unknown.
    """
    kind, _, location = source.partition(":")
    if kind == "python_stdlib" and not location:
        found = list(_standard_library_files())
    elif kind in FILE_KINDS and location:
        found = list(_matching_files(kind, pathlib.Path(location).expanduser()))
    else:
        raise UserError(f"source {source!r} must be {SOURCE_FORMS}")
    if not found:
        raise UserError(f"source {source!r} has no files; give {SOURCE_FORMS}")
    return sorted(found)


def _standard_library_files() -> Iterator[tuple[str, pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if path.is_file() and not NOT_STANDARD_LIBRARY & set(relative.parts):
            yield relative.as_posix(), path


def _matching_files(kind: str, root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    if root.is_file():
        yield root.name, root
    elif root.is_dir():
        for path in root.rglob("*"):
            has_right_suffix = kind == "text" or f".{kind}" in path.suffixes
            if path.is_file() and has_right_suffix:
                yield path.relative_to(root).as_posix(), path
    else:
        for match in glob.glob(str(root), recursive=True):
            path = pathlib.Path(match)
            if path.is_file():
                yield match, path


def is_compressed(path: pathlib.Path) -> bool:
    """Returns whether a file must be decompressed, and so can only be read from its start."""
    return path.suffix in COMPRESSIONS


def cut_into_parts(options: SourceOptions, name: str, path: pathlib.Path) -> list[Part]:
    """Divides a file of many documents into parts of PART_BYTES, which processes read separately.

    A compressed file is a single part, because it can only be read from its start. The `end` of the
    last part is 0, which stands for the end of the file.
    """
    files = ((name, str(path)),)
    size = path.stat().st_size
    if size <= PART_BYTES or is_compressed(path):
        return [options.make_part(files, 0, 0, True, size)]
    parts = []
    for start in range(0, size, PART_BYTES):
        end = start + PART_BYTES
        if end >= size:
            end = 0
        parts.append(options.make_part(files, start, end, True, min(PART_BYTES, size - start)))
    return parts


def open_file(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading, decompressing .gz and .zst on the fly."""
    if not is_compressed(path):
        return open(path, "rb")
    import pyarrow  # imported here because only compressed files need it

    stream = pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix])
    return io.BufferedReader(_ArrowReader(stream))


class _ArrowReader(io.RawIOBase):
    """Adapts a pyarrow input stream to Python's raw stream interface."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
