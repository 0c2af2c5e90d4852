"""Parquet files: each row is a document, and one column is its text."""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
    """Divides the files of a Parquet source into parts, one for each row group.

    Parts are read independently by several processes.
    """
    parts = []
    for name, path in files:
        num_groups = _open_parquet(path, options.field).metadata.num_row_groups
        for group in range(num_groups):
            size = path.stat().st_size // num_groups
            parts.append(options.make_part(((name, str(path)),), group, group + 1, True, size))
    return parts


def read_parquet(part: Part) -> Iterator[Document]:
    """Yields a document for each row of a part (one row group). A null is an empty document.

    Raises:
        UserError: the file is not Parquet, or the column does not hold text.
    """
    import pyarrow  # imported here because only Parquet sources need it

    _, path = part.single_file
    file = _open_parquet(pathlib.Path(path), part.field)
    for batch in file.iter_batches(ROWS_PER_READ, [part.start], [part.field]):
        column = batch.column(0)
        if not _is_text_type(column.type):
            raise UserError(f"{path}: column {part.field!r} holds {column.type}, not text")
        for text in column.cast(pyarrow.large_binary()).to_pylist():
            yield named_by_content(text or b"")


def arrow_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that pyarrow raises for damaged files."""
    import pyarrow

    return (pyarrow.ArrowException,)


def _is_text_type(column_type: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_binary(column_type)
        or types.is_large_binary(column_type)
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
