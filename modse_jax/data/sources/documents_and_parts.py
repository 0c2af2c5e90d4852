"""The two units of a source: documents, and the parts that processes read independently."""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """A document of a source.

    Attributes:
        name: the path within the source for a document that is a file; otherwise a hash of the
            text. The name decides the split, so equal texts of a file are in the same split.
        text: the content as bytes, not necessarily valid UTF-8.
    """

    name: str
    text: bytes


class Part(NamedTuple):
    """A section of a source that is read by one process.

    The fingerprint of an unfinished preparation covers these fields in this order.

    Attributes:
        kind: the kind of source, one of `sources.KINDS`.
        files: (name, path) of each file; for tfds, a single (name[/config], split).
        start: first byte (text and jsonl), row group (parquet) or record (tfds).
        end: end of the range that begins at `start`, exclusive; 0 reads to the end of the file.
        has_many_documents: each file holds many documents; otherwise a file is one document.
        field: jsonl field, parquet column or tfds feature that holds the text.
        size: bytes on disk, or number of records (tfds).
        is_validation: True or False assigns all documents to one split; None splits them by name.
    """

    kind: str
    files: tuple[tuple[str, str], ...]
    start: int
    end: int
    has_many_documents: bool
    field: str
    size: int
    is_validation: bool | None = None

    @property
    def description(self) -> str:
        """The files of the part, for error messages."""
        first_path = self.files[0][1]
        if len(self.files) == 1:
            return first_path
        return f"{first_path} and {len(self.files) - 1} more"

    @property
    def single_file(self) -> tuple[str, str]:
        """The only entry of `files`."""
        (entry,) = self.files
        return entry


class SourceOptions(NamedTuple):
    """The fields that all parts of a source have in common; see `Part`."""

    kind: str
    field: str
    is_validation: bool | None

    def make_part(
        self,
        files: tuple[tuple[str, str], ...],
        start: int,
        end: int,
        has_many_documents: bool,
        size: int,
    ) -> Part:
        """Returns a part of this source."""
        return Part(
            self.kind,
            files,
            start,
            end,
            has_many_documents,
            self.field,
            size,
            self.is_validation,
        )


def named_by_content(text: bytes) -> Document:
    """Returns a document whose name is a hash of its text."""
    return Document(hashlib.blake2b(text, digest_size=16).hexdigest(), text)
