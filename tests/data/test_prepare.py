"""Preparation: the same records for every kind of source, number of processes, and after kills."""

import gzip
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
import sentencepiece
import tensorflow_datasets as tfds
from pyarrow import parquet

from modse_jax.data import data_card, prepared_data, sources
from modse_jax.data.prepare import command_line, scanning
from modse_jax.data.sources import folder_files, source_files
from modse_jax.errors import UserError
from modse_jax.runtime import integrity, lock
from tests.helpers.datasets import (
    assert_same_records,
    prepare_source,
    random_text,
    read_documents,
)
from tests.helpers.runs import ROOT

PREPARE_COMMAND = [sys.executable, "-m", "modse_jax.data.prepare"]


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of the given texts."""

    VERSION = tfds.core.Version("1.0.0")
    texts = ()

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate({"text": text} for text in self.texts)


def write_jsonl(path, texts):
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines))


@pytest.fixture
def texts(tmp_path):
    """Documents that are cut out of play.txt, which is prepared in `plain`."""
    path = tmp_path / "play.txt"
    path.write_text(random_text())
    documents = sources.read_documents(f"text:{path}")
    texts = [document.text.decode() for document in documents]
    assert len(texts) > 5
    assert "".join(texts) == random_text()
    prepare_source(f"text:{path}", "bytes", tmp_path / "plain", fraction=0.3)
    return texts


def test_jsonl_and_compressed_files_give_the_same_records(texts, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts)
    lines = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name, content in (("b.jsonl.zst", lines), ("play.txt.zst", random_text().encode())):
        with pyarrow.output_stream(str(tmp_path / name), compression="zstd") as out:
            out.write(content)
    for source in ("jsonl:a.jsonl", "jsonl:a.jsonl.gz", "jsonl:b.jsonl.zst", "text:play.txt.zst"):
        kind, name = source.split(":")
        out = tmp_path / f"out_{name}"
        prepare_source(f"{kind}:{tmp_path / name}", "bytes", out, fraction=0.3)
        assert_same_records(tmp_path / "plain", out)


def test_tfds_gives_the_same_records_without_tensorflow(texts, tmp_path):
    """Runs in a process that, like a user's, does not have the builder's class.

    A module `tensorflow` on its path leaves a file when it is imported.
    """
    TinyTexts.texts = texts
    builder = TinyTexts(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    trace = tmp_path / "tensorflow_was_imported"
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "tensorflow.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nraise ImportError('the stub of tensorflow')\n"
    )
    environment = {"TFDS_DATA_DIR": str(tmp_path / "tfds"), "PYTHONPATH": str(stub)}
    flags = [
        "--source=tfds:tiny_texts",
        "--tokenizer=bytes",
        "--sequence_length=32",
        "--validation_fraction=0.3",
        f"--out={tmp_path / 'from_tfds'}",
    ]
    subprocess.run(
        [*PREPARE_COMMAND, *flags],
        check=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
    )
    assert_same_records(tmp_path / "plain", tmp_path / "from_tfds")
    assert not trace.exists()


def test_parquet_gives_the_same_records(texts, tmp_path):
    table = pyarrow.table({"body": texts})
    parquet.write_table(table, tmp_path / "whole.parquet")
    parquet.write_table(table, tmp_path / "groups.parquet", row_group_size=1)
    for name in ("whole", "groups"):
        source = f"parquet:{tmp_path / name}.parquet"
        prepare_source(source, "bytes", tmp_path / name, fraction=0.3, field="body")
        assert_same_records(tmp_path / "plain", tmp_path / name)


def test_small_files_are_packed_together(tmp_path):
    """A source of many small files has the records of one file with the same lines."""
    (tmp_path / "many").mkdir()
    texts = [f"short post number {i}, about forty letters." for i in range(60)]
    for i, text in enumerate(texts):
        write_jsonl(tmp_path / "many" / f"{i:02}.jsonl", [text])
    write_jsonl(tmp_path / "one.jsonl", texts)
    for name in ("many", "one.jsonl"):
        card = prepare_source(f"jsonl:{tmp_path / name}", "bytes", tmp_path / f"{name}.out", 512)
    assert_same_records(tmp_path / "many.out", tmp_path / "one.jsonl.out")
    padding = sum(split["padding"] for split in card["splits"].values())
    records = sum(split["records"] for split in card["splits"].values())
    share = f"{padding / (records * 513):.2%}"
    assert padding and f"packing concat: {share} padding, " in data_card.summarize_card(card)


def test_summary_warns_of_a_validation_split_of_too_many_bytes(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"{i:02} " + "x" * 50)
    card = prepare_source(f"text:{folder}", "bytes", tmp_path / "even", fraction=0.1)
    assert "warning" not in data_card.summarize_card(card)
    for text in read_documents(tmp_path / "even", "validation"):
        (folder / f"{text[:2].decode()}.txt").write_bytes(text * 60)
    card = prepare_source(f"text:{folder}", "bytes", tmp_path / "uneven", fraction=0.1)
    sizes = {name: split["bytes"] for name, split in card["splits"].items()}
    share = sizes["validation"] / sum(sizes.values())
    warning = f"the validation split has {share:.0%} of the bytes, though validation_fraction=0.1"
    assert share > 0.3 and warning in data_card.summarize_card(card)


def test_names_that_are_passed_over_are_counted(corpus, tmp_path):
    clean = prepare_source(f"text:{corpus}", "bytes", tmp_path / "clean")
    assert "passed_over" not in clean
    (corpus / ".hidden").write_text("x")
    (corpus / "a.zip").write_text("x")
    # The directory is in its source, and so is what an earlier preparation has written.
    for name in ("first", "second"):
        card = prepare_source(f"text:{corpus}", "bytes", corpus / name)
        assert card["splits"] == clean["splits"]
        assert card["passed_over"][folder_files.HIDDEN] == 1
        assert card["passed_over"][folder_files.NOT_SUPPORTED] == 1
    assert card["passed_over"][folder_files.RUN_OR_DATA] == 1
    assert "passed over in the source: 1 hidden, 1 in a comp" in data_card.summarize_card(card)


def test_any_number_of_processes_gives_the_same_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "GROUP_BYTES", 1)  # a part for each file
    for i in range(6):
        texts = [random_text(i * 10 + j, 3) for j in range(9)]
        write_jsonl(tmp_path / f"{i}.jsonl", texts)
    source = f"jsonl:{tmp_path}/*.jsonl"
    one = prepare_source(source, "sentencepiece", tmp_path / "out1", workers=1)
    three = prepare_source(source, "sentencepiece", tmp_path / "out3", workers=3)
    assert one == three
    assert len([name for name in one["files"] if "train" in name]) == 6


def start_preparing(source, out):
    flags = [
        f"--source={source}",
        "--tokenizer=sentencepiece",
        "--vocab_size=300",
        "--sequence_length=64",
        "--workers=1",
        f"--out={out}",
    ]
    code = (  # the command, with a part for each file
        "import sys\n"
        "from modse_jax.data.prepare import command_line\n"
        "from modse_jax.data.sources import source_files\n"
        "source_files.GROUP_BYTES = 1\n"
        "command_line.main(sys.argv[1:])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def count_finished_parts(partial):
    return len(list(partial.rglob("*.json")))


def wait_for_progress(process, partial, before):
    """Waits until a part is finished, or the process has ended."""
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if count_finished_parts(partial) > before:
            return
        time.sleep(0.002)


@pytest.mark.parametrize(
    "num_files, num_kills, min_resumed",
    [(16, 3, 2), pytest.param(40, 10, 4, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_ends_in_the_same_dataset(
    num_files, num_kills, min_resumed, tmp_path
):
    texts = [random_text(seed, 20) for seed in range(90)]
    for i in range(num_files):
        write_jsonl(tmp_path / f"{i:02}.jsonl", [f"{i} {text}" for text in texts[i::10]])
    source = f"jsonl:{tmp_path}/*.jsonl"
    assert start_preparing(source, tmp_path / "straight").wait() == 0
    killed = tmp_path / "killed"
    partial = tmp_path / "killed.partial"
    rng = random.Random(0)
    num_killed = 0
    num_resumed = 0
    for _ in range(3 * num_kills):  # a busy machine may finish no part between two kills
        process = start_preparing(source, killed)
        before = count_finished_parts(partial)
        wait_for_progress(process, partial, before)
        time.sleep(rng.random() * 0.05)
        num_killed += process.poll() is None
        process.kill()
        process.wait()
        num_resumed += before > 1
        if killed.exists() or (num_killed >= num_kills and num_resumed >= min_resumed):
            break
    assert killed.exists() or start_preparing(source, killed).wait() == 0
    assert num_killed >= min_resumed
    assert num_resumed >= min_resumed
    expected = integrity.manifest_entries(tmp_path / "straight")
    assert integrity.manifest_entries(killed) == expected


def test_duplicates_are_counted_and_dropped_on_request(tmp_path):
    texts = [random_text(seed, 2) for seed in (0, 1, 2, 0, 3, 1, 0)]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, texts)
    card = prepare_source(f"jsonl:{path}", "bytes", tmp_path / "kept", fraction=0.3)
    assert card["duplicate_documents"] == 3
    assert card["dropped_documents"] == 0
    out = tmp_path / "dropped"
    card = prepare_source(f"jsonl:{path}", "bytes", out, fraction=0.3, drop_duplicates=True)
    assert card["duplicate_documents"] == 3
    assert card["dropped_documents"] == 3
    documents = read_documents(out, "train") + read_documents(out, "validation")
    assert sorted(documents) == sorted(text.encode() for text in set(texts))


@pytest.mark.parametrize("max_documents", [scanning.MAX_DOCUMENTS_IN_MEMORY, 1])
def test_duplicates_are_found_across_parts(max_documents, tmp_path, monkeypatch):
    """With a limit of one document, hashes are compared in buckets."""
    monkeypatch.setattr(scanning, "MAX_DOCUMENTS_IN_MEMORY", max_documents)
    paths = []
    for i, hashes in enumerate(([5, 6, 70], [5, 8, 6, 9], [70])):
        paths.append(tmp_path / f"{i}.hashes")
        np.array(hashes, np.uint64).tofile(paths[-1])
    duplicates = scanning.find_duplicates(paths)
    assert [numbers.tolist() for numbers in duplicates] == [[], [0, 2], [0]]


def test_documents_of_a_validation_source_are_all_validation(tmp_path):
    for name, seed in (("train", 1), ("validation", 2)):
        (tmp_path / f"{name}.txt").write_text(random_text(seed, 30))
    prepare_source(
        f"text:{tmp_path / 'train.txt'}",
        "bytes",
        tmp_path / "out",
        validation_source=f"text:{tmp_path / 'validation.txt'}",
    )
    for split, seed in (("train", 1), ("validation", 2)):
        text = b"".join(read_documents(tmp_path / "out", split))
        assert text.decode() == random_text(seed, 30)


def test_best_fit_records_hold_every_document(tmp_path, corpus):
    source = f"text:{corpus}"
    prepare_source(source, "bytes", tmp_path / "concat", 256)
    card = prepare_source(source, "bytes", tmp_path / "best", 256, packing="best_fit")
    data = prepared_data.open_prepared(tmp_path / "best")
    pieces = []
    for record in data.splits["validation"]:
        segments = record["segments"]
        for segment in range(1, segments.max() + 1):
            pieces.append(record["tokens"][segments == segment])
    num_tokens = sum(len(piece) - 1 for piece in pieces)
    assert num_tokens == card["splits"]["validation"]["tokens"]
    is_begin = [piece[0] == data.tokenizer.bos_id for piece in pieces]
    begins = sorted(data.tokenizer.decode(p) for p, begin in zip(pieces, is_begin) if begin)
    documents = sorted(read_documents(tmp_path / "concat", "validation"))
    assert len(begins) == len(documents)
    for begin, document in zip(begins, documents):
        assert document.startswith(begin)


@pytest.fixture
def folder_with_latin1(tmp_path):
    """Three files, one of which is not UTF-8."""
    for name, text in (("a", b"fine" * 9), ("b", b"caf\xe9" * 9), ("c", b"well" * 9)):
        (tmp_path / f"{name}.txt").write_bytes(text)
    return f"text:{tmp_path}/*.txt"


@pytest.mark.parametrize("policy, num_documents", [("skip", 2), ("replace", 3)])
def test_undecodable_documents_are_skipped_or_replaced(
    policy, num_documents, folder_with_latin1, tmp_path
):
    out = tmp_path / "out"
    card = prepare_source(folder_with_latin1, "bytes", out, 8, undecodable=policy)
    assert card["undecodable_documents"] == 1
    counts = [split["documents"] for split in card["splits"].values()]
    assert sum(counts) == num_documents


def test_undecodable_documents_are_refused_on_request(folder_with_latin1, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        prepare_source(folder_with_latin1, "bytes", tmp_path / "out", 8, undecodable="fail")


def test_undecodable_texts_inside_files_are_skipped(tmp_path):
    texts = [b"fine and long enough", b"caf\xe9", b"well, also"]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(b"".join(b'{"text": "' + text + b'"}\n' for text in texts))
    rows = pyarrow.array(texts, pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, rows.buffers())
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), table)
    for kind, path in (("jsonl", jsonl), ("parquet", table)):
        card = prepare_source(f"{kind}:{path}", "bytes", tmp_path / kind, 4)
        assert card["undecodable_documents"] == 1
        counts = [split["documents"] for split in card["splits"].values()]
        assert sum(counts) == 2


def test_directory_is_not_prepared_by_two_processes(tmp_path):
    held = lock.Lock(tmp_path / "out.preparing", "x")
    (tmp_path / "a.txt").write_text(random_text())
    with pytest.raises(UserError, match="out is being prepared by process"):
        prepare_source(f"text:{tmp_path / 'a.txt'}", "bytes", tmp_path / "out")
    held.release()


def test_workers_exit_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent import futures\n"
        "from modse_jax.data.prepare import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = futures.ProcessPoolExecutor(1, context, worker_pool.init_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    status = pathlib.Path(f"/proc/{worker}/stat")
    for _ in range(500):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("a worker is alive after its parent was killed")


def test_preparing_twice_gives_the_same_card(corpus, tmp_path):
    cards = [prepare_source(f"text:{corpus}", "bytes", tmp_path / name) for name in "ab"]
    assert cards[0] == cards[1]
    assert cards[0] == json.loads((tmp_path / "a" / data_card.CARD_NAME).read_text())


def test_failed_preparation_leaves_no_files(corpus, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="fewer than one record"):
        prepare_source(f"text:{corpus}", "bytes", tmp_path / "c" / "d", 10**6)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def bad_inputs(tmp_path):
    """An empty folder, a single short document, an empty document, and a lossy tokenizer."""
    (tmp_path / "empty").mkdir()
    for name, text in (("one", "some text"), ("blank", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    with (tmp_path / "lossy.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(  # normalizes by default
            sentence_iterator=iter(["some words to learn pieces from"] * 50),
            vocab_size=22,
            model_writer=model,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    return tmp_path


@pytest.mark.parametrize(
    "source, tokenizer, message",
    [
        ("nonsense:x", "bytes", "must be text:PATH, jsonl:PATH, parquet:PATH"),
        ("text:{tmp}/missing", "bytes", "has no files"),
        ("text:{tmp}/empty", "bytes", "has no files"),
        ("text:{tmp}/one", "bytes", "single document"),
        ("text:{tmp}/blank", "bytes", "has no document that is not empty"),
        ("text:{corpus}", "morse", "must be bytes, sentencepiece:FILE, hf:FILE or sentencepiece"),
        ("text:{corpus}", "sentencepiece:{tmp}/none.model", "does not exist"),
        ("text:{corpus}", "sentencepiece:{tmp}/one/a.txt", "is not a sentencepiece model"),
        ("text:{corpus}", "sentencepiece", "could not train 100 pieces"),
        ("text:{corpus}", "sentencepiece:{tmp}/lossy.model", "loses text"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    source, tokenizer, message, corpus, bad_inputs, capsys
):
    before = sorted(bad_inputs.rglob("*"))
    flags = [
        f"--source={source.format(tmp=bad_inputs, corpus=corpus)}",
        f"--tokenizer={tokenizer.format(tmp=bad_inputs)}",
        f"--out={bad_inputs}/out",
        "--sequence_length=32",
        "--vocab_size=100",
    ]
    with pytest.raises(SystemExit) as stop:
        command_line.main(flags)
    output = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert sorted(bad_inputs.rglob("*")) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_output_that_cannot_be_made_is_refused(out, corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        prepare_source(f"text:{corpus}", "bytes", tmp_path / out)
