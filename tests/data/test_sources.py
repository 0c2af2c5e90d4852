"""Sources of every kind give the same documents, whatever parts they are cut into."""

import gzip
import json
import random

import pyarrow
import pytest
from pyarrow import parquet

from modse_jax.data import sources
from modse_jax.data.sources import source_files, text_files
from modse_jax.errors import UserError
from tests.helpers.datasets import prepare_source, random_text


def read_texts(source):
    return [document.text for document in sources.read_documents(source)]


def test_single_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    for line_end in (b"\n", b"\r\n"):
        paragraphs = [(b"paragraph %d" % i + line_end) * 40 + line_end for i in range(200)]
        path.write_bytes(b"".join(paragraphs))
        pieces = read_texts(f"text:{path}")
        assert len(pieces) > 3
        assert b"".join(pieces) == path.read_bytes()
        for piece in pieces[:-1]:
            assert piece.endswith(line_end + line_end)
            assert len(piece) >= text_files.PIECE_BYTES


def test_parts_of_a_file_hold_every_document_once(tmp_path, monkeypatch):
    text = random_text(num_paragraphs=400)
    text_path = tmp_path / "play.txt"
    text_path.write_text(text)
    documents = read_texts(f"text:{text_path}")
    lines = [json.dumps({"text": document.decode()}) for document in documents]
    jsonl_path = tmp_path / "a.jsonl"
    jsonl_path.write_text("\n".join(lines) + "\n")
    for part_bytes in (20_000, 50_001, 99_999):
        monkeypatch.setattr(source_files, "PART_BYTES", part_bytes)
        assert len(sources.find_parts(f"text:{text_path}")) > 3
        assert b"".join(read_texts(f"text:{text_path}")) == text.encode()
        assert read_texts(f"jsonl:{jsonl_path}") == documents


def test_parts_meet_for_any_blank_lines(tmp_path, monkeypatch):
    """Blank lines everywhere, nowhere, and exactly at the ends of parts."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 50)
    monkeypatch.setattr(text_files, "LARGEST_PIECE", 200)
    path = tmp_path / "fuzz.txt"
    rng = random.Random(0)
    for _ in range(400):
        characters = rng.choice((b"ab\n", b"a\n\n\r", b"abcdefgh", b"aaaaaaaaaaaaaaa\n"))
        size = rng.randrange(1, 3000)
        text = bytes(rng.choice(characters) for _ in range(size))
        path.write_bytes(text)
        monkeypatch.setattr(source_files, "PART_BYTES", rng.randrange(60, 700))
        assert b"".join(read_texts(f"text:{path}")) == text


def test_text_without_lines_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LARGEST_PIECE", 1000)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 100)
    text = b"x" * 5000 + "\u4e16".encode() * 5000
    (tmp_path / "long.txt").write_bytes(text)
    pieces = read_texts(f"text:{tmp_path / 'long.txt'}")
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 1102
    for piece in pieces:
        assert piece.decode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "has no field 'text' (fields: body)",
        ),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "field 'text' of the line before byte 12 is not text"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 5000, mtime=0)[:60],
            "check that the file is complete",
        ),
        ("a.parquet", b"PAR1 nonsense", "is not a Parquet file"),
    ],
)
def test_invalid_files_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    kind = name.split(".")[1]
    with pytest.raises(UserError) as error:
        prepare_source(f"{kind}:{path}", "bytes", tmp_path / "out")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_parquet_column_is_refused(tmp_path):
    path = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match="has no column 'text'; columns: body"):
        prepare_source(f"parquet:{path}", "bytes", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no files"):
        prepare_source("jsonl:missing", "bytes", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_tfds_dataset_names_the_command_that_builds_it():
    command = "tfds build no_such_dataset --file_format=array_record"
    with pytest.raises(UserError, match=command):
        sources.find_parts("tfds:no_such_dataset")


def test_standard_library_is_a_source():
    names = [name for name, _ in source_files.find_files("python_stdlib")]
    assert "argparse.py" in names
    assert names == sorted(names)
    assert not any("site-packages" in name for name in names)
