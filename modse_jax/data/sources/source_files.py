"""Finds the files of a source, divides them into parts, and opens them, compressed or not."""

import collections
import glob
import gzip
import io
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

from modse_jax.data.sources import folder_files
from modse_jax.data.sources.documents_and_parts import Part, SourceOptions
from modse_jax.data.sources.folder_files import FoundFiles
from modse_jax.errors import UserError

SOURCE_FORMS = (
    "text:PATH, jsonl:PATH, parquet:PATH (a file, a folder, or a glob), "
    "tfds:NAME[/CONFIG][:VERSION][:SPLIT], or python_stdlib"
)

FILE_KINDS = ("text", "jsonl", "parquet")

COMPRESSIONS = (".gz", ".zst")

ZSTD_WINDOW = 2**27  # bytes of the largest window that pyarrow decompresses

PART_BYTES = 32 * 2**20  # target size of a part

GROUP_BYTES = PART_BYTES  # files that are not cut are grouped until they have this size

NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def find_files(source: str, excluded: Sequence[pathlib.Path] = ()) -> FoundFiles:
    """Returns (name, path) of every file of a source, and counts the names that are passed over.

    The name is the path relative to the folder of the source, or the path itself for a glob.

    Args:
        source: name of the source.
        excluded: files and folders, existing or not, that are no part of a source: what the
            command itself writes.

    Raises:
        UserError: the source has no files, its form is unknown, or it is a file in a compression
            that is not supported.
    """
    kind, _, location = source.partition(":")
    if kind == "python_stdlib" and not location:
        found = FoundFiles(sorted(_standard_library_files()), {})
    elif kind in FILE_KINDS and location:
        found = _matching_files(kind, pathlib.Path(location).expanduser(), excluded)
    else:
        raise UserError(f"source {source!r} must be {SOURCE_FORMS}")
    if not found.files:
        passed_over = folder_files.describe_passed_over(found.passed_over)
        raise UserError(
            f"source {source!r} has no files{f' ({passed_over})' if passed_over else ''}; give "
            f"{SOURCE_FORMS}"
        )
    return found


def _standard_library_files() -> Iterator[tuple[str, pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if path.is_file() and not NOT_STANDARD_LIBRARY & set(relative.parts):
            yield relative.as_posix(), path


def _matching_files(
    kind: str, location: pathlib.Path, excluded: Sequence[pathlib.Path]
) -> FoundFiles:
    if location.is_dir():
        return folder_files.find_in_folder(kind, location, excluded)
    if location.is_file():
        if folder_files.has_unsupported_ending(location.name):
            raise UserError(
                f"{location} is compressed or packed in a way that is not supported; decompress "
                f"it, or compress it as {' or '.join(COMPRESSIONS)}"
            )
        return FoundFiles([(location.name, location)], {})
    return _files_of_glob(str(location), excluded)


def _files_of_glob(pattern: str, excluded: Sequence[pathlib.Path]) -> FoundFiles:
    """Returns the files that a glob matches, whatever their endings are."""
    found = []
    passed_over: collections.Counter[str] = collections.Counter()
    own_paths = [os.path.realpath(path) for path in excluded]
    for match in glob.glob(pattern, recursive=True):
        path = pathlib.Path(match)
        if not path.is_file():
            continue
        real_path = pathlib.Path(os.path.realpath(path))
        if any(real_path.is_relative_to(own_path) for own_path in own_paths):
            passed_over[folder_files.OWN_OUTPUT] += 1
        elif folder_files.has_unsupported_ending(match):
            passed_over[folder_files.NOT_SUPPORTED] += 1
        else:
            found.append((match, path))
    return FoundFiles(sorted(found), dict(passed_over))


def is_compressed(path: pathlib.Path) -> bool:
    """Returns whether a file must be decompressed, and so can only be read from its start."""
    return path.suffix.lower() in COMPRESSIONS


def is_small(path: pathlib.Path) -> bool:
    """Returns whether a file is not cut into parts: it has at most PART_BYTES or is compressed."""
    return path.stat().st_size <= PART_BYTES or is_compressed(path)


def cut_into_parts(options: SourceOptions, name: str, path: pathlib.Path) -> list[Part]:
    """Divides a file of many documents into parts of PART_BYTES, which processes read separately.

    A compressed file is a single part, because it can only be read from its start. The `end` of the
    last part is 0, which stands for the end of the file.
    """
    files = ((name, str(path)),)
    size = path.stat().st_size
    if is_small(path):
        return [options.make_part(files, 0, 0, True, size)]
    parts = []
    for start in range(0, size, PART_BYTES):
        end = start + PART_BYTES
        if end >= size:
            end = 0
        parts.append(options.make_part(files, start, end, True, min(PART_BYTES, size - start)))
    return parts


class PartGroup:
    """Groups whole files into parts of GROUP_BYTES or a little more.

    Every part ends in padding. With a part for each file, a source of many small files would be
    mostly padding.
    """

    def __init__(self, options: SourceOptions, has_many_documents: bool):
        self._options = options
        self._has_many_documents = has_many_documents
        self._files: list[tuple[str, str]] = []
        self._size = 0

    def add(self, name: str, path: pathlib.Path) -> list[Part]:
        """Adds a file; returns the part that it completes, if it does."""
        self._files.append((name, str(path)))
        self._size += path.stat().st_size
        return self.finish() if self._size >= GROUP_BYTES else []

    def finish(self) -> list[Part]:
        """Returns the part of the files that were added since the last one, if there are any."""
        if not self._files:
            return []
        files = tuple(self._files)
        part = self._options.make_part(files, 0, 0, self._has_many_documents, self._size)
        self._files = []
        self._size = 0
        return [part]


def open_file(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading, decompressing .gz and .zst on the fly."""
    if not is_compressed(path):
        return open(path, "rb")
    if path.suffix.lower() == ".gz":
        # Unlike pyarrow, it reads files that are padded with zeros, as tapes leave them.
        return cast(BinaryIO, gzip.open(path, "rb"))
    import pyarrow  # imported here because only compressed files need it

    return io.BufferedReader(_ArrowReader(pyarrow.input_stream(str(path), compression="zstd")))


def read_error_reason(error: Exception) -> str:
    """Returns why a file could not be read, as a phrase for an error message."""
    if "requires too much memory" in str(error):
        return (
            f"it is compressed with a window of more than {ZSTD_WINDOW >> 20} MiB (zstd --long); "
            "compress it again without --long"
        )
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{reason.splitlines()[0]}; check that the file is complete"


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
