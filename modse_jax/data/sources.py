"""Documents of a source, read as streams, cut into parts that can be worked on apart; and which documents are held out.

A source is named by a string: text:PATH, jsonl:PATH, parquet:PATH (a file, a folder or a glob; .gz and .zst are
unpacked), tfds:NAME[/CONFIG][:SPLIT], or python_stdlib. Its parts, and so the prepared data, do not depend on how many
processes work on them.
"""

import functools
import glob
import hashlib
import io
import itertools
import json
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from modse_jax.errors import UserError

KINDS = ("text", "jsonl", "parquet", "tfds", "python_stdlib")


FORMS = (
    "text:PATH, jsonl:PATH, parquet:PATH (a file, a folder, or a glob), tfds:NAME[/CONFIG][:SPLIT], or "
    "python_stdlib"
)


BLANK_LINE = re.compile(rb"\n\r?\n")


LOOK_BACK = 3  # bytes of the longest blank line, with the line end before it


PIECE_BYTES = 16384  # a lone text file is cut into documents of at least this size, at blank lines


LARGEST_PIECE = 8 * 2**20  # and, where there are no blank lines, of at most this, at any line


PART_BYTES = 32 * 2**20  # of a source in a part


LARGE_FILE = 8 * 2**20  # a larger text file of a folder is cut like a lone one


PACKED = {".gz": "gzip", ".zst": "zstd"}


class Document(NamedTuple):
    """name: its path in the source, or a hash of its text where many share a file: what decides whether it is held
    out, so that equal texts lie on the same side."""

    name: str
    text: bytes


class Part(NamedTuple):
    """A stretch of a source that one process reads. held_out: None: by name; else all of it or nothing."""

    kind: str
    files: tuple[tuple[str, str], ...]  # (name, path); tfds: (name[/config], split)
    start: int  # of a lone file, byte; parquet, row group; tfds, record
    end: int  # 0: to the end
    cut: bool  # text: many documents in a file
    field: str
    size: int  # bytes on disk, or records (tfds)
    held_out: bool | None = None

    @property
    def where(self) -> str:
        first = self.files[0][1]
        return f"{first}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"


def parts(source: str, field: str = "text", held_out: bool | None = None) -> list[Part]:
    """The parts of a source, in order. Raises UserError where there is nothing, or not what its kind needs."""
    kind, _, where = source.partition(":")
    if kind == "tfds" and where:
        return _tfds_parts(where, field, held_out)
    found = files(source)
    part = functools.partial(Part, kind, field=field, held_out=held_out)
    if kind in ("jsonl", "parquet") or (kind == "text" and len(found) == 1):
        return [p for name, path in found for p in _ranges(part, kind, name, path)]
    out, group, size = [], [], 0
    for name, path in found:
        if path.stat().st_size > LARGE_FILE or path.suffix in PACKED:
            out += _ranges(part, "text", name, path)
            continue
        group.append((name, str(path)))
        size += path.stat().st_size
        if size >= PART_BYTES:
            out, group, size = [*out, part(tuple(group), 0, 0, False, size=size)], [], 0
    return [*out, part(tuple(group), 0, 0, False, size=size)] if group else out


def _ranges(part, kind, name, path):
    """Parts of one file of many documents; a packed file is a single one, since it can only be read from its start."""
    size, one = path.stat().st_size, ((name, str(path)),)
    if kind == "parquet":
        groups = _parquet(path, part.keywords["field"]).metadata.num_row_groups
        return [part(one, g, g + 1, True, size=size // groups) for g in range(groups)]
    if path.suffix in PACKED or size <= PART_BYTES:
        return [part(one, 0, 0, True, size=size)]
    starts = range(0, size, PART_BYTES)
    return [
        part(
            one,
            start,
            start + PART_BYTES if start + PART_BYTES < size else 0,
            True,
            size=min(PART_BYTES, size - start),
        )
        for start in starts
    ]


def files(source: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of every file of a source, sorted by name. Raises UserError where there is none."""
    kind, _, where = source.partition(":")
    if kind == "python_stdlib" and not where:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        out = [
            (path.relative_to(root).as_posix(), path)
            for path in root.rglob("*.py")
            if path.is_file()
        ]
        skip = {"site-packages", "dist-packages", "__pycache__"}
        out = [
            (name, path) for name, path in out if not skip & set(pathlib.PurePosixPath(name).parts)
        ]
    elif kind in ("text", "jsonl", "parquet") and where:
        root = pathlib.Path(where).expanduser()
        if root.is_file():
            out = [(root.name, root)]
        elif root.is_dir():
            out = [
                (path.relative_to(root).as_posix(), path)
                for path in root.rglob("*")
                if path.is_file() and (kind == "text" or f".{kind}" in path.suffixes)
            ]
        else:
            out = [
                (match, pathlib.Path(match))
                for match in glob.glob(str(root), recursive=True)
                if pathlib.Path(match).is_file()
            ]
    else:
        raise UserError(f"source {source!r} must be {FORMS}")
    if not out:
        raise UserError(f"source {source!r} has no files; give {FORMS}")
    return sorted(out)


def size(source: str) -> int:
    """Bytes of all files of a source; 0 for tfds, which does not say."""
    return (
        0 if source.startswith("tfds:") else sum(path.stat().st_size for _, path in files(source))
    )


def read(part: Part) -> Iterator[Document]:
    """The documents of a part, one after another. Raises UserError where the source is not what it should be."""
    try:
        yield from {"jsonl": _jsonl, "parquet": _rows, "tfds": _records}.get(part.kind, _texts)(
            part
        )
    except (OSError, EOFError, *_arrow_errors(part)) as error:
        reason = (
            getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        )
        raise UserError(f"cannot read {part.where}: {reason}; is the file whole?") from None


def _arrow_errors(part):
    if part.kind != "parquet":
        return ()
    import pyarrow

    return (pyarrow.ArrowException,)


def documents(source: str, field: str = "text") -> Iterator[Document]:
    """Every document of a source, in order."""
    for part in parts(source, field):
        yield from read(part)


# ---- which are held out ----------------------------------------------------------------------------------------------


def holdout_score(name: str) -> float:
    """A document's place in 0..1, by a hash of its name: held out are those below the fraction."""
    return (
        int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:13], 16) / 16**13
    )


def holdout_threshold(below: int, least: float, greatest: float, fraction: float) -> float:
    """Held out are the documents whose place lies below this: at least one, and not all, where there are two or more.

    Args: how many places lie below the fraction; the least and the greatest place of all documents.
    """
    return min(fraction, greatest) if below else least + 16.0**-13


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _texts(part):
    for name, path in part.files:
        if part.cut:
            yield from _pieces(part, pathlib.Path(path))
        else:
            yield Document(name, pathlib.Path(path).read_bytes())


def _open(path):
    if path.suffix in PACKED:
        import pyarrow  # here: only packed files need it

        return io.BufferedReader(
            _Readable(pyarrow.input_stream(str(path), compression=PACKED[path.suffix]))
        )
    return open(path, "rb")


class _Readable(io.RawIOBase):
    """A stream of pyarrow's as one of Python's."""

    def __init__(self, stream):
        self._stream = stream

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _pieces(part, path):
    """Documents of at least PIECE_BYTES that end at borders. A part begins at the first border at or after its start,
    and ends at the first at or after its end, so that parts meet."""
    with _open(path) as file:
        at = max(part.start - LOOK_BACK, 0)
        if at:
            file.seek(at)
        text = _Text(file)
        if part.start:
            skipped = text.take(part.start - at)
            at += len(skipped)
            if (
                part.end and at >= part.end
            ):  # its first border lies past its end: the rest up to the next part's
                text.give_back(skipped)
                rest = text.take(part.end - (at - len(skipped)))[len(skipped) :]
                if rest:
                    yield _by_content(rest)
                return
        while not part.end or at < part.end:
            piece = text.take(min(PIECE_BYTES, part.end - at) if part.end else PIECE_BYTES)
            if part.end and at + len(piece) >= part.end:
                text.give_back(piece)
                piece = text.take(part.end - at)
            if not piece:
                return
            at += len(piece)
            yield _by_content(piece)


class _Text:
    """A file, taken up to borders. A border is the end of a blank line; where there is none for LARGEST_PIECE bytes,
    the last end of a line in them, or else of a character. Where borders lie does not depend on where reading began."""

    def __init__(self, file):
        self._file, self._buffer, self._before, self._whole = file, b"", b"", False

    def take(self, least: int) -> bytes:
        """Up to the first border at or after `least` bytes; all that is left where there is none."""
        end = self._border(least)
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        self._before = (self._before + taken)[-LOOK_BACK:]
        return taken

    def give_back(self, taken: bytes) -> None:
        """Undoes the last take."""
        self._buffer, self._before = taken + self._buffer, self._kept

    def _border(self, least):
        self._kept = self._before
        shift, most, searched = len(self._before), least + LARGEST_PIECE, 0
        while True:
            blank = BLANK_LINE.search(
                self._before + self._buffer, max(searched, shift + least - LOOK_BACK)
            )
            while blank and blank.end() - shift < least:
                blank = BLANK_LINE.search(self._before + self._buffer, blank.start() + 1)
            if blank and blank.end() - shift <= most:
                return blank.end() - shift
            if len(self._buffer) >= most + LOOK_BACK:
                end = self._buffer.rfind(b"\n", least, most) + 1 or most
                while (
                    end < len(self._buffer) and (self._buffer[end] & 0xC0) == 0x80
                ):  # not inside a character
                    end += 1
                return end
            if self._whole:
                return len(self._buffer)
            searched = max(0, shift + len(self._buffer) - LOOK_BACK)
            more = self._file.read(1 << 17)
            self._whole, self._buffer = not more, self._buffer + more


def _jsonl(part):
    ((_, path),) = part.files
    with _open(pathlib.Path(path)) as file:
        at = part.start
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the line in the middle belongs to the part before
        for line in file:
            if part.end and at >= part.end:
                return
            at += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(
                    line.decode("utf-8", "surrogateescape")
                )  # what is not UTF-8 is for the caller
                text = row[part.field]
            except (ValueError, KeyError, TypeError) as error:
                has = (
                    f"has no field {part.field!r} (fields: {', '.join(map(str, row))})"
                    if isinstance(error, KeyError)
                    else "is not a JSON object"
                )
                raise UserError(
                    f"{path}: the line before byte {at} {has}; name the text's field with --field, or "
                    "data.field"
                ) from None
            if not isinstance(text, str):
                raise UserError(
                    f"{path}: field {part.field!r} of the line before byte {at} is not text"
                )
            yield _by_content(_bytes(text))


def _bytes(text):
    """What the file held, be it UTF-8 or not; a lone surrogate that JSON spelt out is not."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _parquet(path, field):
    import pyarrow
    from pyarrow import parquet  # here: only this kind needs it

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is not a Parquet file ({str(error).splitlines()[0][:120]})"
        ) from None
    if field not in file.schema_arrow.names:
        raise UserError(
            f"{path} has no column {field!r}; columns: {', '.join(file.schema_arrow.names)}; name the "
            "text's with --field, or data.field"
        )
    return file


def _rows(part):
    import pyarrow

    ((_, path),) = part.files
    for batch in _parquet(path, part.field).iter_batches(256, [part.start], [part.field]):
        column, kinds = batch.column(0), pyarrow.types
        if not any(
            is_text(column.type)
            for is_text in (
                kinds.is_string,
                kinds.is_large_string,
                kinds.is_binary,
                kinds.is_large_binary,
            )
        ):
            raise UserError(f"{path}: column {part.field!r} holds {column.type}, not text")
        for text in column.cast(pyarrow.large_binary()).to_pylist():
            yield _by_content(text or b"")


def _tfds_source(name, split):
    import tensorflow_datasets as tfds  # here: slow to import

    try:
        return tfds.data_source(name, split=split)
    except ModuleNotFoundError:
        raise UserError(_needs_tensorflow(name)) from None
    except Exception as error:
        if "tensorflow" in str(error).lower() and "pip install" in str(error).lower():
            raise UserError(_needs_tensorflow(name)) from None
        raise UserError(
            f"tfds:{name}, split {split!r}, cannot be opened: {' '.join(str(error).split())[:300]}; if it "
            "is not prepared yet: " + _needs_tensorflow(name)
        ) from None


def _needs_tensorflow(name):
    return (
        f"preparing {name} takes TensorFlow, in any environment: pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record; then run this again"
    )


def _tfds_parts(where, field, held_out):
    name, _, split = where.partition(":")
    source = _tfds_source(name, split or "train")
    if not len(source):
        raise UserError(f"tfds:{where} has no records")
    if field not in source[0]:
        raise UserError(
            f"tfds:{where} has no field {field!r}; fields: {', '.join(source[0])}; name the text's with "
            "--field, or data.field"
        )
    step = 50_000  # records
    return [
        Part(
            "tfds",
            ((name, split or "train"),),
            start,
            min(start + step, len(source)),
            True,
            field,
            min(step, len(source) - start),
            held_out,
        )
        for start in range(0, len(source), step)
    ]


def _records(part):
    ((name, split),) = part.files
    source = _tfds_source(name, split)
    for ids in (
        itertools.batched(range(part.start, part.end), 64)
        if hasattr(itertools, "batched")
        else (range(i, min(i + 64, part.end)) for i in range(part.start, part.end, 64))
    ):
        for record in source.__getitems__(list(ids)):
            text = record[part.field]
            if not isinstance(text, str | bytes):
                raise UserError(
                    f"tfds:{name}: feature {part.field!r} is not text; name the text's with --field, or "
                    "data.field"
                )
            yield _by_content(text.encode() if isinstance(text, str) else text)


def _by_content(text):
    return Document(hashlib.blake2b(text, digest_size=16).hexdigest(), text)
