"""Decides which files a folder means, and counts the names that are passed over.

Links are followed, and what can be reached by several names is read once. The following is no part
of a source, because nobody means it: hidden names (.git, ._a.jsonl, .part-0.parquet.crc), files
with another ending than those of the kind of source, archives and compressions that are not
supported, and the folders of runs, of sweeps and of prepared data.
"""

import collections
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

# Why names are passed over, as it is written behind their number.
HIDDEN = "hidden"
OTHER_ENDING = "with another ending"
NOT_SUPPORTED = "in a compression or an archive that is not supported"
OWN_OUTPUT = "of this run"
RUN_OR_DATA = "runs, sweeps or prepared data"
BAD_LINK = "links that are broken or lead to what is read already"
UNREADABLE = "not readable"

# The endings of the files of a kind of source. A text file may have any.
ENDINGS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
}

# Without these, their bytes would be taken for text.
UNSUPPORTED_ENDINGS = (
    ".xz",
    ".lzma",
    ".bz2",
    ".lz4",
    ".br",
    ".z",
    ".7z",
    ".zip",
    ".rar",
    ".tar",
    ".tgz",
    ".tar.gz",
    ".tar.zst",
)

# A folder that holds all names of one of these sets was written by a command of this package: a
# run, prepared data, unfinished prepared data, a sweep.
OUTPUT_MARKS = (
    {"config.json", "environment.json", "checkpoints"},
    {"card.json", "tokenizer.model", "token_records"},
    {"plan", "scanned", "shards"},
    {"sweep.json", "data"},
)

Identity = tuple[int, int]  # device and inode, which are the same for all names of a file


class FoundFiles(NamedTuple):
    """The files of a source.

    Attributes:
        files: (name, path) of every file, sorted by name.
        passed_over: {reason: number of names that were passed over for it}.
    """

    files: list[tuple[str, pathlib.Path]]
    passed_over: dict[str, int]


def has_unsupported_ending(name: str) -> bool:
    """Returns whether a file is compressed or packed in a way that cannot be read."""
    return name.lower().endswith(UNSUPPORTED_ENDINGS)


def find_in_folder(kind: str, root: pathlib.Path, excluded: Iterable[pathlib.Path]) -> FoundFiles:
    """Returns the files of a folder that belong to a source.

    Args:
        kind: "text", "jsonl" or "parquet".
        root: the folder.
        excluded: files and folders, existing or not, that are no part of the source.
    """
    walk = _Walk(kind, {identity for path in excluded if (identity := identify(path))})
    walk.read_folder("", root)
    # Links are followed last, so that a file that has a name without links keeps it.
    while walk.links:
        links = sorted(walk.links)
        walk.links = []
        for name, path in links:
            walk.follow_link(name, path)
    return FoundFiles(sorted(walk.files), dict(sorted(walk.passed_over.items())))


def identify(path: str | pathlib.Path) -> Identity | None:
    """Returns device and inode of a file or folder; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


class _Walk:
    """The state of the search through a folder.

    Attributes:
        files: (name, path) of the files that were found.
        links: (name, path) of the links that were found and not followed yet.
        passed_over: {reason: number of names}.
    """

    def __init__(self, kind: str, excluded: set[Identity]):
        self.files: list[tuple[str, pathlib.Path]] = []
        self.links: list[tuple[str, pathlib.Path]] = []
        self.passed_over: collections.Counter[str] = collections.Counter()
        self._kind = kind
        self._excluded = excluded
        self._visited: set[Identity | None] = set()  # folders and files

    def read_folder(self, prefix: str, folder: pathlib.Path) -> None:
        """Takes the files of a folder and of the folders in it, but follows no links.

        `prefix` is written in front of the names in the folder.
        """
        pending = [(prefix, folder)]
        while pending:
            prefix, folder = pending.pop()
            self._visited.add(identify(folder))
            try:
                entries = list(os.scandir(folder))
            except OSError:
                self.passed_over[UNREADABLE] += 1
                continue
            if prefix and any(mark <= {entry.name for entry in entries} for mark in OUTPUT_MARKS):
                self.passed_over[RUN_OR_DATA] += 1
                continue
            for entry in entries:
                name, path = prefix + entry.name, pathlib.Path(entry.path)
                if entry.name.startswith("."):
                    self.passed_over[HIDDEN] += 1
                elif entry.is_symlink():
                    self.links.append((name, path))
                elif self._excluded and identify(path) in self._excluded:
                    self.passed_over[OWN_OUTPUT] += 1
                elif entry.is_dir():
                    pending.append((f"{name}/", path))
                elif entry.is_file():
                    self._take_file(name, path)

    def follow_link(self, name: str, path: pathlib.Path) -> None:
        """Takes the file or the folder that a link leads to, unless it was taken already."""
        identity = identify(path)
        if identity in self._excluded:
            self.passed_over[OWN_OUTPUT] += 1
        elif identity is None or identity in self._visited:
            self.passed_over[BAD_LINK] += 1
        elif path.is_dir():
            self.read_folder(f"{name}/", path)
        elif path.is_file():
            self._take_file(name, path)

    def _take_file(self, name: str, path: pathlib.Path) -> None:
        lower = name.lower()
        if has_unsupported_ending(lower):
            self.passed_over[NOT_SUPPORTED] += 1
        elif not lower.endswith(ENDINGS.get(self._kind, "")):
            self.passed_over[OTHER_ENDING] += 1
        else:
            self._visited.add(identify(path))
            self.files.append((name, path))


def describe_passed_over(passed_over: dict[str, int]) -> str:
    """Returns a sentence about the names that were passed over; "" if there are none."""
    if not passed_over:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in passed_over.items())
    return f"passed over in the source: {reasons}"
