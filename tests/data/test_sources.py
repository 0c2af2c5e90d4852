"""Sources of every kind give the same documents, whatever parts they are cut into."""

import gzip
import json
import random

import pyarrow
import pytest
from pyarrow import parquet

from modse_jax.data import sources
from modse_jax.data.sources import folder_files, source_files, text_files, tfds_records
from modse_jax.errors import UserError
from tests.helpers.datasets import prepare_source, random_text

# An empty frame whose header asks for a window of 2 GiB, as zstd --long=31 writes it.
ZSTD_OF_LARGE_WINDOW = b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00"


def read_texts(source):
    return [document.text for document in sources.read_documents(source)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


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
    monkeypatch.setattr(text_files, "SEARCHED_BYTES", 200)
    path = tmp_path / "fuzz.txt"
    rng = random.Random(0)
    for _ in range(400):
        characters = rng.choice(
            (b"ab\n", b"a\n\n\r", b"abcdefgh", b"aaaaaaaaaaaaaaa\n", b"a" * 40 + b" \r")
        )
        size = rng.randrange(1, 3000)
        text = bytes(rng.choice(characters) for _ in range(size))
        path.write_bytes(text)
        monkeypatch.setattr(source_files, "PART_BYTES", rng.randrange(60, 700))
        assert b"".join(read_texts(f"text:{path}")) == text


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_file_without_blank_lines_is_cut_at_line_ends(line_end, tmp_path, monkeypatch):
    text = b"".join(b"name %d" % i + line_end for i in range(40_000))
    path = tmp_path / "names.txt"
    path.write_bytes(text)
    pieces = read_texts(f"text:{path}")
    assert b"".join(pieces) == text
    for piece in pieces:
        assert piece.startswith(b"name ") and piece.endswith(line_end)
    sizes = [len(piece) for piece in pieces]
    assert min(sizes[:-1]) >= text_files.PIECE_BYTES
    assert max(sizes[:-1]) < text_files.PIECE_BYTES + 20
    assert sizes[-1] < 2 * text_files.PIECE_BYTES
    monkeypatch.setattr(source_files, "PART_BYTES", 60_001)
    assert b"".join(read_texts(f"text:{path}")) == text


def test_a_line_end_is_no_border_where_a_blank_line_follows(tmp_path):
    section = (b"line\n" * 7000) + b"\n"  # 35 KiB, between the minimum size and what is searched
    path = tmp_path / "sections.txt"
    path.write_bytes(section * 4)
    assert read_texts(f"text:{path}") == [section] * 4


@pytest.mark.parametrize("text", [b"x" * 5000 + "\u4e16".encode() * 5000, b"some words " * 2000])
def test_text_without_lines_is_cut_between_words_or_characters(text, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "SEARCHED_BYTES", 300)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 100)
    (tmp_path / "long.txt").write_bytes(text)
    pieces = read_texts(f"text:{tmp_path / 'long.txt'}")
    assert b"".join(pieces) == text
    assert max(map(len, pieces[:-1])) <= 110
    for piece in pieces:
        assert piece.decode()
        assert b" " not in text or piece.endswith(b" ")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "has no field 'text' (fields: body)",
        ),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "byte 23 is not JSON: Expecting value: line 1"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "is a JSON list, not an object of fields"),
        ("a.jsonl", b'{"text": 5}\n', "the line before byte 12 has no text in the field 'text'"),
        (
            "a.jsonl",
            b'{"text": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
            "the line before byte 200021 is nested too deeply",
        ),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl is UTF-16; convert it to UTF-8"),
        ("a.jsonl.zst", ZSTD_OF_LARGE_WINDOW, "with a window of more than 128 MiB (zstd --long)"),
        (
            "a.text.xz",
            b"\xfd7zXZ\x00",
            "not supported; decompress it, or compress it as .gz or .zst",
        ),
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
    names = [name for name, _ in source_files.find_files("python_stdlib").files]
    assert "argparse.py" in names
    assert names == sorted(names)
    assert not any("site-packages" in name for name in names)


def test_byte_order_marks_and_nulls_of_jsonl_are_read(tmp_path):
    lines = b'\xef\xbb\xbf{"text": "a"}\n{"text": null}\n'
    (tmp_path / "a.jsonl").write_bytes(lines * 2)  # two files that were appended
    assert read_texts(f"jsonl:{tmp_path / 'a.jsonl'}") == [b"a", b"", b"a", b""]


def test_gzip_files_that_are_padded_with_zeros_are_read(tmp_path):
    lines = b'{"text": "a"}\n' * 80
    path = tmp_path / "a.jsonl.GZ"
    path.write_bytes(gzip.compress(lines[:420]) + gzip.compress(lines[420:]) + bytes(512))
    assert read_texts(f"jsonl:{path}") == [b"a"] * 80


@pytest.mark.parametrize(
    "column_type",
    [
        pyarrow.string_view(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
)
def test_parquet_text_of_every_type_is_read(column_type, tmp_path):
    column = pyarrow.array(["a", None, "b", "a"]).cast(column_type)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.field("text").type == column_type
    assert read_texts(f"parquet:{tmp_path / 'a.parquet'}") == [b"a", b"", b"b", b"a"]


def test_parquet_column_of_numbers_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' holds int64, not text"):
        read_texts(f"parquet:{tmp_path / 'a.parquet'}")


def test_parts_of_parquet_files_hold_every_row_once(tmp_path, monkeypatch):
    """A file of several parts, between two files that are grouped."""
    texts = [f"{i} " + "x" * (i % 700) for i in range(900)]
    for name, rows in (("a", texts[:10]), ("b", texts[10:890]), ("c", texts[890:])):
        path = tmp_path / f"{name}.parquet"
        table = pyarrow.table({"text": rows})
        parquet.write_table(table, path, row_group_size=7, compression="none", use_dictionary=False)
    monkeypatch.setattr(source_files, "PART_BYTES", 60_000)
    parts = sources.find_parts(f"parquet:{tmp_path}")
    assert [len(part.files) for part in parts] == [1] * (len(parts) - 1) + [2]
    assert len(parts) > 4
    assert sum(part.size for part in parts) == pytest.approx(
        sources.total_bytes(f"parquet:{tmp_path}"), abs=len(parts)
    )
    assert sorted(read_texts(f"parquet:{tmp_path}")) == sorted(text.encode() for text in texts)


def test_small_compressed_files_share_a_part(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(b"text %d" % i))
    (part,) = sources.find_parts(f"text:{tmp_path}")
    assert len(list(sources.read_part(part))) == 30


def test_tfds_name_may_have_a_version():
    split = tfds_records._name_and_split
    assert split("c4/en") == ("c4/en", "train")
    assert split("c4/en:test") == ("c4/en", "test")
    assert split("c4/en:3.0.1") == ("c4/en:3.0.1", "train")
    assert split("c4/en:3.*.*:train[:10%]") == ("c4/en:3.*.*", "train[:10%]")
    assert split("c4:train[:10%]") == ("c4", "train[:10%]")


def found_in(source, **options):
    """Returns (names, passed over) of the files of a source."""
    found = source_files.find_files(source, **options)
    return [name for name, _ in found.files], found.passed_over


def test_links_of_a_folder_are_followed_once(tmp_path):
    corpus = tmp_path / "corpus"
    elsewhere = tmp_path / "elsewhere"
    for folder in (corpus / "z", elsewhere):
        folder.mkdir(parents=True)
    for path in (corpus / "a.txt", corpus / "z" / "b.txt", elsewhere / "c.txt", tmp_path / "d.txt"):
        path.write_text("x")
    (corpus / "more").symlink_to(elsewhere)
    (corpus / "d").symlink_to(tmp_path / "d.txt")
    (corpus / "again").symlink_to(corpus / "z")
    (corpus / "latest.txt").symlink_to("a.txt")
    (corpus / "broken").symlink_to("missing")
    (elsewhere / "loop").symlink_to(corpus)
    names, passed_over = found_in(f"text:{corpus}")
    assert names == ["a.txt", "d", "more/c.txt", "z/b.txt"]
    assert passed_over == {folder_files.BAD_LINK: 4}


def test_hidden_names_and_other_endings_of_a_folder_are_passed_over(tmp_path):
    for name in (
        "a.jsonl",
        "b.JSONL",
        "c.jsonl.gz",
        "d.jsonl.zst",
        "a.jsonl.bak",
        "notes",
        "e.jsonl.xz",
        "._a.jsonl",
        ".git/hooks/b.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    names, passed_over = found_in(f"jsonl:{tmp_path}")
    assert names == ["a.jsonl", "b.JSONL", "c.jsonl.gz", "d.jsonl.zst"]
    assert passed_over == {
        folder_files.HIDDEN: 2,
        folder_files.NOT_SUPPORTED: 1,
        folder_files.OTHER_ENDING: 2,
    }
    names, passed_over = found_in(f"text:{tmp_path}")
    assert len(names) == 6 and set(passed_over) == {"hidden", folder_files.NOT_SUPPORTED}
    with pytest.raises(
        UserError, match=r"has no files \(passed over in the source: 2 hidden, 1 in"
    ):
        found_in(f"parquet:{tmp_path}")


def test_folders_of_runs_and_excluded_paths_are_no_part_of_a_source(tmp_path):
    for name in (
        "a.txt",
        "runs/1/config.json",
        "runs/1/environment.json",
        "runs/1/checkpoints/x",
        "old/card.json",
        "old/tokenizer.model",
        "old/token_records/x",
        "mine/deep/x.txt",
        "mine.lock",
        "b/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    excluded = [tmp_path / "mine", tmp_path / "mine.lock", tmp_path / "missing"]
    names, passed_over = found_in(f"text:{tmp_path}", excluded=excluded)
    assert names == ["a.txt", "b/config.json"]
    assert passed_over == {folder_files.OWN_OUTPUT: 2, folder_files.RUN_OR_DATA: 2}
    names, passed_over = found_in(f"text:{tmp_path}/**/*.txt", excluded=excluded)
    assert names == [f"{tmp_path}/a.txt"]
    assert passed_over == {folder_files.OWN_OUTPUT: 1}
