"""JSON Lines files: each line is an object, and one of its fields is the text of a document."""

import json
import pathlib
from collections.abc import Iterator

from modse_jax.data.sources import source_files
from modse_jax.data.sources.documents_and_parts import (
    Document,
    Part,
    SourceOptions,
    named_by_content,
)
from modse_jax.errors import UserError


def jsonl_parts(options: SourceOptions, files: list[tuple[str, pathlib.Path]]) -> list[Part]:
    """Returns the parts of a JSON Lines source."""
    parts = []
    for name, path in files:
        parts += source_files.cut_into_parts(options, name, path)
    return parts


def read_jsonl(part: Part) -> Iterator[Document]:
    """Yields the documents of the lines that begin within a part.

    Raises:
        UserError: a line is not a JSON object, or has no text in the field.
    """
    _, path = part.single_file
    with source_files.open_file(pathlib.Path(path)) as file:
        position = part.start
        if position:
            # A line that crosses the start belongs to the previous part. Reading from the byte
            # before the start keeps a line that begins exactly at it.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        for line in file:
            if part.end and position >= part.end:
                return
            position += len(line)
            if line.strip():
                text = _parse_line(line, part.field, path, position)
                yield named_by_content(_encode_text(text))


def _parse_line(line: bytes, field: str, path: str, end: int) -> str:
    """Returns the text of a line. `end` is the position of its end, for error messages."""
    line_name = f"the line before byte {end}"
    hint = "name the field of the text with --field, or data.field"
    try:
        # Invalid UTF-8 is passed on as surrogates: the option `undecodable` decides about it.
        row = json.loads(line.decode("utf-8", "surrogateescape"))
        text = row[field]
    except KeyError:
        fields = ", ".join(map(str, row))
        raise UserError(
            f"{path}: {line_name} has no field {field!r} (fields: {fields}); {hint}"
        ) from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: {line_name} is not a JSON object; {hint}") from None
    if not isinstance(text, str):
        raise UserError(f"{path}: field {field!r} of {line_name} is not text")
    return text


def _encode_text(text: str) -> bytes:
    """Returns the bytes of the file for a text that was decoded with `surrogateescape`.

    A surrogate that JSON escapes as `\\ud800` was no byte of the file. It gives three bytes that
    are invalid UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
