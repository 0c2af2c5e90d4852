"""Sources of text, from which documents are read.

A source is named by a string: text:PATH, jsonl:PATH, parquet:PATH (a file, a folder or a glob; .gz
and .zst are decompressed), tfds:NAME[/CONFIG][:VERSION][:SPLIT], or python_stdlib.

A source is divided into parts: ranges of its files that processes can read independently. The
division, and so the prepared data, does not depend on the number of processes.
"""

import collections
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence

from modse_jax.data.sources import (
    jsonl_files,
    parquet_files,
    source_files,
    text_files,
    tfds_records,
)
from modse_jax.data.sources.documents_and_parts import Document, Part, SourceOptions
from modse_jax.errors import UserError

READERS: dict[str, Callable[[Part], Iterator[Document]]] = {
    "text": text_files.read_text,
    "python_stdlib": text_files.read_text,
    "jsonl": jsonl_files.read_jsonl,
    "parquet": parquet_files.read_parquet,
    "tfds": tfds_records.read_tfds,
}


def find_parts(
    source: str,
    field: str = "text",
    is_validation: bool | None = None,
    excluded: Sequence[pathlib.Path] = (),
) -> list[Part]:
    """Divides a source into parts, which processes can read independently; returns them in order.

    Args:
        source: name of the source.
        field: jsonl field, parquet column or tfds feature that holds the text.
        is_validation: True or False assigns all documents to the validation or the training split;
            None assigns each of them by a hash of its name.
        excluded: files and folders, existing or not, that are no part of the source.

    Raises:
        UserError: the source has no documents, or is not of the kind that its name says.
    """
    kind, _, location = source.partition(":")
    options = SourceOptions(kind, field, is_validation)
    if kind == "tfds" and location:
        return tfds_records.tfds_parts(options, location)
    files = source_files.find_files(source, excluded).files
    if kind == "jsonl":
        return jsonl_files.jsonl_parts(options, files)
    if kind == "parquet":
        return parquet_files.parquet_parts(options, files)
    return text_files.text_parts(options, files)


def read_part(part: Part) -> Iterator[Document]:
    """Yields the documents of a part, in order.

    Raises:
        UserError: a file cannot be read, or its content is not what the kind of source requires.
    """
    read_errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if part.kind == "parquet":
        read_errors += parquet_files.arrow_errors()
    for entry in part.files:
        try:
            yield from READERS[part.kind](part._replace(files=(entry,)))
        except read_errors as error:
            reason = source_files.read_error_reason(error)
            raise UserError(f"cannot read {entry[1]}: {reason}") from None


def read_documents(source: str, field: str = "text") -> Iterator[Document]:
    """Yields every document of a source, in order."""
    for part in find_parts(source, field):
        yield from read_part(part)


def total_bytes(source: str, excluded: Sequence[pathlib.Path] = ()) -> int:
    """Returns the size of all files of a source in bytes; 0 for tfds, which does not report it."""
    if source.startswith("tfds:"):
        return 0
    return sum(path.stat().st_size for _, path in source_files.find_files(source, excluded).files)


def count_passed_over(
    names: Sequence[str], excluded: Sequence[pathlib.Path] = ()
) -> dict[str, int]:
    """Returns {reason: number of names in the sources that are no part of them}."""
    total: collections.Counter[str] = collections.Counter()
    for name in names:
        if name and not name.startswith("tfds:"):
            total.update(source_files.find_files(name, excluded).passed_over)
    return dict(total)
