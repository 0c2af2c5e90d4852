"""JSON Lines files: each line is an object, and one of its fields is the text of a document."""

import codecs
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

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def jsonl_parts(options: SourceOptions, files: list[tuple[str, pathlib.Path]]) -> list[Part]:
    """Divides the files of a JSON Lines source into parts, which processes read independently.

    A file of more than PART_BYTES is cut; smaller and compressed ones are grouped.
    """
    parts = []
    group = source_files.PartGroup(options, has_many_documents=True)
    for name, path in files:
        if source_files.is_small(path):
            parts += group.add(name, path)
        else:
            parts += source_files.cut_into_parts(options, name, path)
    return parts + group.finish()


def read_jsonl(part: Part) -> Iterator[Document]:
    """Yields a document for each line that begins within a part (a range of bytes of a file).

    Raises:
        UserError: a line is not a JSON object, or has no text in the field.
    """
    _, path = part.single_file
    with source_files.open_file(pathlib.Path(path)) as file:
        position = part.start
        if position:
            # A line that crosses the start belongs to the previous part and is skipped. By reading
            # from the byte before the start, a line that begins exactly at the start is not.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        for line in file:
            if part.end and position >= part.end:
                return
            position += len(line)
            line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was appended
            if line.strip():
                text = _parse_line(line, part.field, path, position)
                yield named_by_content(_encode_text(text))


def _parse_line(line: bytes, field: str, path: str, end: int) -> str:
    """Returns the text in a field of a line; "" if it is null.

    Args:
        line: the line, a JSON object.
        field: the name of the field.
        path: the file, for error messages.
        end: the position of the end of the line in the file, for error messages.
    """
    line_name = f"{path}: the line before byte {end}"
    hint = "name the field of the text with --field, or data.field"
    if line.startswith(UTF16_MARKS):
        raise UserError(f"{path} is UTF-16; convert it to UTF-8, for example with iconv")
    try:
        # Bytes that are not valid UTF-8 become surrogates, and bytes again in _encode_text. What
        # happens to such documents is decided later, by the option `undecodable`.
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise UserError(f"{line_name} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{line_name} is nested too deeply to be read") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{line_name} is a JSON {type(row).__name__}, not an object of fields; {hint}"
        )
    if field not in row:
        raise UserError(f"{line_name} has no field {field!r} (fields: {', '.join(row)}); {hint}")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{line_name} has no text in the field {field!r}; {hint}")
    return text


def _encode_text(text: str) -> bytes:
    """Returns the bytes of a text in which surrogates stand for bytes that are not valid UTF-8.

    A text with other surrogates, such as the JSON escape `\\ud800`, has no valid UTF-8 form. Each
    of its surrogates becomes three bytes that are not valid UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
