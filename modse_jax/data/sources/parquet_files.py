"""Parquet files: each row is a document, and one column is its text."""

import itertools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from modse_jax.data.sources import source_files
from modse_jax.data.sources.documents_and_parts import (
    Document,
    Part,
    SourceOptions,
    named_by_content,
)
from modse_jax.errors import UserError, describe_exception

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

ROWS_PER_READ = 256


def parquet_parts(options: SourceOptions, files: list[tuple[str, pathlib.Path]]) -> list[Part]:
    """Divides the files of a Parquet source into parts, which processes read independently.

    A file of more than PART_BYTES is cut between row groups; smaller files are grouped.
    """
    parts = []
    group = source_files.PartGroup(options, has_many_documents=True)
    for name, path in files:
        metadata = _open_parquet(path, options.field).metadata
        size = path.stat().st_size
        if size <= source_files.PART_BYTES:
            parts += group.add(name, path)
            continue
        num_groups = metadata.num_row_groups
        num_parts = min(size // source_files.PART_BYTES, num_groups)
        edges = [num_groups * number // num_parts for number in range(num_parts + 1)]
        for start, end in itertools.pairwise(edges):
            part_size = size * (end - start) // num_groups
            parts.append(options.make_part(((name, str(path)),), start, end, True, part_size))
    return parts + group.finish()


def read_parquet(part: Part) -> Iterator[Document]:
    """Yields a document for each row of a part of a file. A null is an empty document.

    Raises:
        UserError: the file is not Parquet, or the column does not hold text.
    """
    _, path = part.single_file
    file = _open_parquet(pathlib.Path(path), part.field)
    groups = range(part.start, part.end or file.metadata.num_row_groups)
    for batch in file.iter_batches(ROWS_PER_READ, groups, [part.field]):
        for text in _to_bytes(batch.column(0), f"{path}: column {part.field!r}"):
            yield named_by_content(text or b"")


def _to_bytes(column: "pyarrow.Array", name: str) -> list[bytes | None]:
    """Returns the texts of a column, whose name is for the error message.

    A column may hold the numbers of the rows of a dictionary of texts, as pandas writes categories.
    """
    import pyarrow  # imported here because only Parquet sources need it

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text_type(column.type):
        raise UserError(f"{name} holds {column.type}, not text")
    return column.cast(pyarrow.large_binary()).to_pylist()


def arrow_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that pyarrow raises for damaged files."""
    import pyarrow

    return (pyarrow.ArrowException,)


def _is_text_type(column_type: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
        or types.is_binary(column_type)
        or types.is_large_binary(column_type)
        or types.is_binary_view(column_type)
        or types.is_null(column_type)
    )


def _open_parquet(path: pathlib.Path, field: str) -> "ParquetFile":
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = describe_exception(error).splitlines()[0][:120]
        raise UserError(f"{path} is not a Parquet file ({reason})") from None
    columns = file.schema_arrow.names
    if field not in columns:
        raise UserError(
            f"{path} has no column {field!r}; columns: {', '.join(columns)}; name the column of "
            "the text with --field, or data.field"
        )
    return file
