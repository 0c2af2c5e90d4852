"""Text files: each file is one document, or a large file is cut into documents at blank lines.

A large file is divided into parts (ranges of bytes) that different processes read, and each part is
cut into documents at borders. The border at or after a position is

1. the end of the first blank line that ends within SEARCHED_BYTES after the position; if there is
   none, as in a list of names or a log,
2. the end of the file, if it is less than PIECE_BYTES away; otherwise
3. the first line end within SEARCHED_BYTES (LF, CRLF or CR); otherwise
4. the first space within SEARCHED_BYTES; otherwise
5. the end of the UTF-8 character at the position.

Documents cross the ends of parts. A part therefore begins at the first border at or after its start
and ends at the first border at or after its end, where the next part begins. Both processes find
the same border, because it depends on the bytes of the file only, and not on where reading began.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from modse_jax.data.sources import source_files
from modse_jax.data.sources.documents_and_parts import (
    Document,
    Part,
    SourceOptions,
    named_by_content,
)

BLANK_LINE = re.compile(rb"\n\r?\n")

LINE_END = re.compile(rb"\r\n|\n|\r(?!\n)")

SPACE = re.compile(rb"[ \t]")

LOOK_BACK = 3  # bytes of the longest match of BLANK_LINE

PIECE_BYTES = 16384  # minimum size of a document that is cut out of a file

SEARCHED_BYTES = 3 * PIECE_BYTES  # bytes after the minimum size in which a border is looked for

LARGE_FILE = 8 * 2**20  # a larger file of a folder is cut into documents, like a single file

READ_BYTES = 1 << 17


def text_parts(options: SourceOptions, files: list[tuple[str, pathlib.Path]]) -> list[Part]:
    """Divides the files of a text source into parts, which processes read independently.

    Small files are whole documents. A single file, a large file and a compressed file are cut into
    documents. Files that are not cut into parts are grouped.
    """
    if options.kind == "text" and len(files) == 1:
        return source_files.cut_into_parts(options, *files[0])
    parts: list[Part] = []
    whole_files = source_files.PartGroup(options, has_many_documents=False)
    compressed_files = source_files.PartGroup(options, has_many_documents=True)
    for name, path in files:
        if source_files.is_compressed(path):
            parts += compressed_files.add(name, path)
        elif path.stat().st_size > LARGE_FILE:
            parts += source_files.cut_into_parts(options, name, path)
        else:
            parts += whole_files.add(name, path)
    return parts + whole_files.finish() + compressed_files.finish()


def read_text(part: Part) -> Iterator[Document]:
    """Yields the documents of a part of a text source."""
    name, path = part.single_file
    if part.has_many_documents:
        for piece in _read_pieces(part, pathlib.Path(path)):
            yield named_by_content(piece)
    else:
        yield Document(name, pathlib.Path(path).read_bytes())


def _read_pieces(part: Part, path: pathlib.Path) -> Iterator[bytes]:
    """Yields the documents of a part of a file, of PIECE_BYTES or more except for the last one.

    The first one begins at the first border at or after the start of the part, and the last one
    ends at the first border at or after its end. See the description of this module for borders.
    """
    with source_files.open_file(path) as file:
        position = max(part.start - LOOK_BACK, 0)
        if position:
            file.seek(position)
        reader = _BorderReader(file)
        if part.start:
            skipped = reader.find_border(part.start - position)
            if part.end and position + skipped >= part.end:
                # There is no border within the part. The document that begins at the first border
                # after the start, and ends at the first border after the end, belongs to it still.
                piece = reader.take(reader.find_border(part.end - position))[skipped:]
                if piece:
                    yield piece
                return
            reader.take(skipped)
            position += skipped
        while not part.end or position < part.end:
            piece = reader.take(_piece_size(reader, part, position))
            if not piece:
                return
            position += len(piece)
            yield piece


def _piece_size(reader: "_BorderReader", part: Part, position: int) -> int:
    """Returns the size in bytes of the next document of a part; 0 at the end of the file.

    Args:
        reader: reads the file; its next byte is that at `position`.
        part: the part.
        position: where the document begins, a border before the end of the part.
    """
    if not part.end:
        return reader.find_border(PIECE_BYTES)
    remaining = part.end - position
    size = reader.find_border(min(PIECE_BYTES, remaining))
    if size < remaining:
        return size
    # The last document of a part ends where the next part begins: at the first border at or after
    # the part's end, even if that leaves it smaller than PIECE_BYTES.
    return reader.find_border(remaining)


class _BorderReader:
    """Reads a file in sequence, and finds the next border at which a document may end.

    See the description of this module for borders. `_buffer` holds bytes that were read from the
    file and not yet taken. `_before` holds the last LOOK_BACK bytes that were taken, because a
    blank line may begin in them.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._buffer = b""
        self._before = b""
        self._at_end_of_file = False

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes and removes them from the buffer."""
        taken = self._buffer[:size]
        self._buffer = self._buffer[size:]
        self._before = (self._before + taken)[-LOOK_BACK:]
        return taken

    def find_border(self, min_size: int) -> int:
        """Returns the distance to the first border that is at least `min_size` bytes away.

        Distances are in bytes, from the first byte that has not been taken. If there is no such
        border, the distance to the end of the file is returned.
        """
        max_size = min_size + SEARCHED_BYTES
        blank_line_end = self._find(BLANK_LINE, min_size, max_size)
        while blank_line_end is None and len(self._buffer) < max_size and not self._at_end_of_file:
            # A blank line may begin in the last bytes of the buffer and end in the next read.
            searched = max(min_size, len(self._buffer) + 1)
            data = self._file.read(READ_BYTES)
            self._at_end_of_file = not data
            self._buffer += data
            blank_line_end = self._find(BLANK_LINE, searched, max_size)
        if blank_line_end is not None:
            return blank_line_end
        if self._at_end_of_file and len(self._buffer) < min_size + PIECE_BYTES:
            return len(self._buffer)
        for pattern in (LINE_END, SPACE):
            end = self._find(pattern, min_size, max_size)
            if end is not None:
                return end
        border = min_size
        while border < len(self._buffer) and _is_utf8_continuation(self._buffer[border]):
            border += 1
        return border

    def _find(self, pattern: re.Pattern[bytes], min_size: int, max_size: int) -> int | None:
        """Returns the distance to the end of the next match of a pattern, or None.

        Args:
            pattern: matches at most LOOK_BACK bytes.
            min_size: matches that end at a smaller distance are skipped.
            max_size: matches that end at a larger distance are not looked for.
        """
        text = self._before + self._buffer
        offset = len(self._before)
        start = max(0, offset + min_size - LOOK_BACK)
        match = pattern.search(text, start, offset + max_size)
        while match and match.end() - offset < min_size:
            match = pattern.search(text, match.start() + 1, offset + max_size)
        return match.end() - offset if match else None


def _is_utf8_continuation(byte: int) -> bool:
    return (byte & 0xC0) == 0x80
