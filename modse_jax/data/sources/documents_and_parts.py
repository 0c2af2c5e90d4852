"""The two units of a source: documents, and the parts that processes read independently."""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """A document of a source.

    Attributes:
        name: the path within the source if the document is a file; otherwise a hash of the text.
            The name decides the split. So if a file holds the same text twice, both are in the same
            split.
        text: the content as bytes, not necessarily valid UTF-8.
    """

    name: str
    text: bytes


class Part(NamedTuple):
    """A range of a source that one process reads: several whole files, or a section of one file.

    The fingerprint of an unfinished preparation covers these fields in this order. Changing them
    therefore makes unfinished preparations start again.

    Attributes:
        kind: the kind of source, a key of `sources.READERS`.
        files: (name, path) of each file; for tfds, a single (name[/config], split).
        start: where the section begins: a byte (text and jsonl), row group (parquet) or record
            (tfds).
        end: where the section ends, exclusive; 0 reads to the end of the file.
        has_many_documents: each file holds many documents; otherwise a file is one document.
        field: jsonl field, parquet column or tfds feature that holds the text.
        size: bytes on disk, or number of records (tfds), for the progress bar.
        is_validation: True or False assigns all documents to the validation or the training split;
            None assigns each of them by a hash of its name.
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
        """The file of a part that has one file only."""
        (entry,) = self.files
        return entry


class SourceOptions(NamedTuple):
    """The options of a source, which all of its parts (ranges of its files) have in common."""

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
        """Returns a part with these options; see `Part` for the arguments."""
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
