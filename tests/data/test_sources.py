"""Sources of every kind, prepared by any number of processes and after kills: the same records."""

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
import tensorflow_datasets as tfds
from pyarrow import parquet

from modse_jax.config.options import TrainingConfig
from modse_jax.data import inspect, loader, prepare, sources
from modse_jax.errors import ExitCode, UserError
from modse_jax.runtime import integrity, lock
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import alone, make
from tests.helpers.runs import ROOT


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of ours, of the texts in a file."""

    VERSION = tfds.core.Version("1.0.0")
    texts = ()

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate({"text": text} for text in self.texts)


def play(seed=0, count=120):
    rng = random.Random(seed)
    return "".join(
        "\n".join("".join(rng.choice("abcdefgh \u00e9") for _ in range(60)) for _ in range(20))
        + "\n\n"
        for _ in range(count)
    )


def same_records(a, b):
    one, two = (loader.open_prepared(d) for d in (a, b))
    for split in prepare.SPLITS:
        assert len(one.splits[split]) == len(two.splits[split]) > 0
        for x, y in zip(one.splits[split], two.splits[split]):
            np.testing.assert_array_equal(x["tokens"], y["tokens"])
            np.testing.assert_array_equal(x["segments"], y["segments"])


def test_the_same_text_in_every_form_gives_the_same_records(tmp_path):
    (tmp_path / "play.txt").write_text(play())
    texts = [d.text.decode() for d in sources.documents(f"text:{tmp_path / 'play.txt'}")]
    assert len(texts) > 5 and "".join(texts) == play()
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as out:
        out.write(lines)
    with pyarrow.output_stream(str(tmp_path / "play.txt.zst"), compression="zstd") as out:
        out.write(play().encode())
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet", row_group_size=4)
    TinyTexts.texts = texts
    TinyTexts(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    make(f"text:{tmp_path / 'play.txt'}", "bytes", tmp_path / "plain", fraction=0.3)
    # Parquet in groups of four documents, so in parts with padding of their own: concat would differ at their ends.
    for source, field in (
        (f"jsonl:{tmp_path / 'a.jsonl'}", "text"),
        (f"jsonl:{tmp_path / 'a.jsonl.gz'}", "text"),
        (f"jsonl:{tmp_path / 'b.jsonl.zst'}", "text"),
        (f"text:{tmp_path / 'play.txt.zst'}", "text"),
    ):
        out = tmp_path / source.replace("/", "_")
        make(source, "bytes", out, fraction=0.3, field=field)
        same_records(tmp_path / "plain", out)
    # In a process that does not know the builder's class, as a user's.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "modse_jax.data.prepare",
            "--source=tfds:tiny_texts",
            "--tokenizer=bytes",
            "--sequence_length=32",
            "--validation_fraction=0.3",
            f"--out={tmp_path / 'from_tfds'}",
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "TFDS_DATA_DIR": str(tmp_path / "tfds")},
        capture_output=True,
    )
    same_records(tmp_path / "plain", tmp_path / "from_tfds")
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "whole.parquet")
    make(
        f"parquet:{tmp_path / 'whole.parquet'}", "bytes", tmp_path / "q", fraction=0.3, field="body"
    )
    same_records(tmp_path / "plain", tmp_path / "q")
    card = make(
        f"parquet:{tmp_path / 'a.parquet'}", "bytes", tmp_path / "p", fraction=0.3, field="body"
    )
    held = list(loader.documents(loader.open_prepared(tmp_path / "p"), "validation"))
    assert (
        held == list(loader.documents(loader.open_prepared(tmp_path / "plain"), "validation"))
        and len(held) > 1
    )
    assert (
        card["splits"]["train"]["tokens"]
        == loader.open_prepared(tmp_path / "q").card["splits"]["train"]["tokens"]
    )


def test_parts_meet_and_hold_every_document_once(tmp_path, monkeypatch):
    (tmp_path / "play.txt").write_text(play(count=400))
    texts = [d.text for d in sources.documents(f"text:{tmp_path / 'play.txt'}")]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t.decode()}) + "\n" for t in texts)
    )
    for size in (20_000, 50_001, 99_999):
        monkeypatch.setattr(sources, "PART_BYTES", size)
        cut = [list(sources.read(p)) for p in sources.parts(f"text:{tmp_path / 'play.txt'}")]
        assert (
            len(cut) > 3
            and b"".join(d.text for part in cut for d in part) == play(count=400).encode()
        )
        lines = [
            d.text for p in sources.parts(f"jsonl:{tmp_path / 'a.jsonl'}") for d in sources.read(p)
        ]
        assert lines == texts
    rng = random.Random(0)
    monkeypatch.setattr(sources, "PIECE_BYTES", 50)
    monkeypatch.setattr(sources, "LARGEST_PIECE", 200)
    for _ in range(400):  # blank lines everywhere, nowhere, and just at the ends of parts
        signs = rng.choice((b"ab\n", b"a\n\n\r", b"abcdefgh", b"aaaaaaaaaaaaaaa\n"))
        text = bytes(rng.choice(signs) for _ in range(rng.randrange(1, 3000)))
        (tmp_path / "fuzz.txt").write_bytes(text)
        monkeypatch.setattr(sources, "PART_BYTES", rng.randrange(60, 700))
        cut = [
            [d.text for d in sources.read(p)]
            for p in sources.parts(f"text:{tmp_path / 'fuzz.txt'}")
        ]
        assert b"".join(d for part in cut for d in part) == text
    monkeypatch.setattr(sources, "PART_BYTES", 10**6)
    no_border = b"x" * 5000 + "\u4e16".encode() * 5000
    monkeypatch.setattr(sources, "LARGEST_PIECE", 1000)
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    (tmp_path / "long.txt").write_bytes(no_border)
    pieces = [d.text for d in sources.documents(f"text:{tmp_path / 'long.txt'}")]
    assert b"".join(pieces) == no_border and max(map(len, pieces)) <= 1102
    assert all(p.decode() for p in pieces)  # never cut inside a character


def test_any_number_of_processes_gives_the_same_dataset(tmp_path, monkeypatch):
    for i in range(6):
        rows = [json.dumps({"text": play(i * 10 + j, 3)}) + "\n" for j in range(9)]
        (tmp_path / f"{i}.jsonl").write_text("".join(rows))
    cards = [
        make(f"jsonl:{tmp_path}/*.jsonl", "sentencepiece", tmp_path / f"out{n}", workers=n)
        for n in (1, 3)
    ]
    assert cards[0] == cards[1] and len([f for f in cards[0]["files"] if "train" in f]) == 6


def test_killed_at_random_while_preparing_it_ends_in_the_same_dataset(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.jsonl").write_text(
            "".join(json.dumps({"text": play(i * 10 + j, 20)}) + "\n" for j in range(9))
        )

    def start(out):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "modse_jax.data.prepare",
                f"--source=jsonl:{tmp_path}/*.jsonl",
                "--tokenizer=sentencepiece",
                "--vocab_size=300",
                "--sequence_length=64",
                "--workers=1",
                f"--out={tmp_path / out}",
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    assert start("straight").wait() == 0
    rng, hit, went_on = random.Random(0), 0, 0
    for _ in range(10):
        process, partial = start("killed"), tmp_path / "killed.partial"
        before = len(list(partial.rglob("*.json")))
        deadline = time.time() + 60
        while (
            process.poll() is None
            and len(list(partial.rglob("*.json"))) <= before
            and time.time() < deadline
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        hit += process.poll() is None
        process.kill()
        process.wait()
        went_on += before > 1
        if (tmp_path / "killed").exists():
            break
    assert (tmp_path / "killed").exists() or start("killed").wait() == 0
    assert hit >= 5 and went_on >= 4
    assert integrity.manifest_entries(tmp_path / "straight") == integrity.manifest_entries(
        tmp_path / "killed"
    )


def test_repeated_documents_are_counted_and_dropped_if_asked(tmp_path, monkeypatch):
    texts = [play(i, 2) for i in (0, 1, 2, 0, 3, 1, 0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    card = make(f"jsonl:{tmp_path / 'a.jsonl'}", "bytes", tmp_path / "kept", fraction=0.3)
    assert (card["duplicate_documents"], card["dropped_documents"]) == (3, 0)
    card = make(
        f"jsonl:{tmp_path / 'a.jsonl'}",
        "bytes",
        tmp_path / "dropped",
        fraction=0.3,
        drop_duplicates=True,
    )
    assert (card["duplicate_documents"], card["dropped_documents"]) == (3, 3)
    got = [
        d
        for s in prepare.SPLITS
        for d in loader.documents(loader.open_prepared(tmp_path / "dropped"), s)
    ]
    assert sorted(got) == sorted(t.encode() for t in set(texts))
    paths = []
    for i, digests in enumerate(([5, 6, 70], [5, 8, 6, 9], [70])):
        np.array(digests, np.uint64).tofile(tmp_path / f"{i}.hashes")
        paths.append(tmp_path / f"{i}.hashes")
    assert [r.tolist() for r in prepare._repeated(paths)] == [[], [0, 2], [0]]
    monkeypatch.setattr(prepare, "FEW_DOCUMENTS", 1)  # in buckets
    assert [r.tolist() for r in prepare._repeated(paths)] == [[], [0, 2], [0]]


def test_a_validation_source_is_all_held_out(tmp_path):
    for name, seed in (("train", 1), ("valid", 2)):
        (tmp_path / f"{name}.txt").write_text(play(seed, 30))
    make(
        f"text:{tmp_path / 'train.txt'}",
        "bytes",
        tmp_path / "out",
        validation_source=f"text:{tmp_path / 'valid.txt'}",
    )
    data = loader.open_prepared(tmp_path / "out")
    for split, seed in (("train", 1), ("validation", 2)):
        assert b"".join(loader.documents(data, split)).decode() == play(seed, 30)


def test_best_fit_records_hold_every_document(tmp_path, corpus):
    make(f"text:{corpus}", "bytes", tmp_path / "concat", 256)
    card = make(f"text:{corpus}", "bytes", tmp_path / "best", 256, packing="best_fit")
    want = sorted(loader.documents(loader.open_prepared(tmp_path / "concat"), "validation"))
    data = loader.open_prepared(tmp_path / "best")
    pieces = [
        r["tokens"][r["segments"] == n]
        for r in data.splits["validation"]
        for n in range(1, r["segments"].max() + 1)
    ]
    assert sum(len(p) - 1 for p in pieces) == card["splits"]["validation"]["tokens"]
    begins = sorted(data.tokenizer.decode(p) for p in pieces if p[0] == data.tokenizer.bos_id)
    assert [w[: len(b)] for w, b in zip(want, begins)] == begins


@pytest.mark.parametrize(
    "policy, count, message", [("skip", 2, ""), ("replace", 3, ""), ("fail", 0, "is not UTF-8")]
)
def test_what_is_not_utf8(tmp_path, policy, count, message):
    for name, text in (("a", b"fine" * 9), ("b", b"caf\xe9" * 9), ("c", b"well" * 9)):
        (tmp_path / f"{name}.txt").write_bytes(text)
    if message:
        with pytest.raises(UserError, match=message):
            make(f"text:{tmp_path}/*.txt", "bytes", tmp_path / "out", 8, undecodable=policy)
        return
    card = make(f"text:{tmp_path}/*.txt", "bytes", tmp_path / "out", 8, undecodable=policy)
    assert (
        card["undecodable_documents"] == 1
        and sum(c["documents"] for c in card["splits"].values()) == count
    )


def test_the_policy_reaches_texts_inside_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "fine and long enough"}\n{"text": "caf\xe9"}\n{"text": "well, also"}\n'
    )
    rows = pyarrow.array([b"fine and long enough", b"caf\xe9", b"well, also"], pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, rows.buffers())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    for source in (f"jsonl:{tmp_path / 'a.jsonl'}", f"parquet:{tmp_path / 'a.parquet'}"):
        card = make(source, "bytes", tmp_path / source[:5], 4)
        assert (
            card["undecodable_documents"] == 1
            and sum(c["documents"] for c in card["splits"].values()) == 2
        )


def test_a_part_is_not_prepared_twice_at_once_and_orphans_end(tmp_path):
    held = lock.Lock(tmp_path / "out.preparing", "x")
    (tmp_path / "a.txt").write_text(play())
    with pytest.raises(UserError, match="out is being prepared by process"):
        make(f"text:{tmp_path / 'a.txt'}", "bytes", tmp_path / "out")
    held.release()
    code = (
        "import multiprocessing, os, time; from concurrent import futures; from modse_jax.data import prepare\n"
        "if __name__ == '__main__':\n"
        "    pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), prepare._join)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(60)"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(500):
        state = pathlib.Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("a worker outlived its parent")


def test_a_byte_level_tokenizer_without_all_bytes_is_refused():
    import tokenizers as library

    from modse_jax.data import tokenizers

    t = library.Tokenizer(library.models.BPE())
    t.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(
        ["plain text only"], library.trainers.BpeTrainer(vocab_size=60, show_progress=False)
    )
    with pytest.raises(UserError, match="lacks pieces for .* of the 256 bytes"):
        tokenizers.from_serialized("hf", t.to_str().encode(), "x")


def test_records_are_serialized_as_tfds_does():
    rng = np.random.default_rng(0)
    for length, vocab in ((9, 300), (65, 70_000)):
        tokens, segments = rng.integers(0, vocab, (5, length)), rng.integers(0, 4, (5, length))
        serialize = prepare.Serializer(length, vocab)
        kinds = {name: f.np_dtype for name, f in prepare.features(length, vocab).items()}
        for fast, t, s in zip(serialize(tokens, segments), tokens, segments):
            record = {"tokens": t.astype(kinds["tokens"]), "segments": s.astype(kinds["segments"])}
            assert fast == serialize.slow(record)


@pytest.mark.parametrize(
    "name, content, source, field, message",
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "jsonl",
            "text",
            "has no field 'text' (fields: body)",
        ),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "jsonl", "text", "is not a JSON object"),
        (
            "a.jsonl",
            b'{"text": 5}\n',
            "jsonl",
            "text",
            "field 'text' of the line before byte 12 is not text",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 5000, mtime=0)[:60],
            "jsonl",
            "text",
            "is the file whole?",
        ),
        ("a.parquet", b"PAR1 nonsense", "parquet", "text", "is not a Parquet file"),
        ("b.parquet", None, "parquet", "text", "has no column 'text'; columns: body"),
        ("a.txt", b"x", "jsonl:missing", "text", "has no files"),
    ],
)
def test_sources_that_are_not_what_they_should_be(name, content, source, field, message, tmp_path):
    if content is None:
        parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    where = source if ":" in source else f"{source}:{tmp_path / name}"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        make(where, "bytes", tmp_path / "out", field=field)
    assert message in str(error.value) and sorted(tmp_path.iterdir()) == before


def test_a_tfds_name_that_is_not_there_says_what_to_run():
    with pytest.raises(UserError, match="tfds build no_such_dataset --file_format=array_record"):
        sources.parts("tfds:no_such_dataset")


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    for name, seed, count in (("a", 1, 8), ("b", 2, 16), ("c", 3, 4)):
        (tmp_path / f"{name}.txt").write_text(play(seed, 40 * count))
        make(f"text:{tmp_path / name}.txt", "bytes", tmp_path / name, 64)
    config = tiny_config(
        data=dict(
            sequence_length=64,
            mixture=tuple((str(tmp_path / n), w) for n, w in (("a", 6.0), ("b", 3.0), ("c", 1.0))),
        ),
        training=dict(batch_size=8),
    )
    return loader.load(config, tmp_path), config


def test_a_mixture_keeps_its_shares_and_every_dataset_its_epochs(mixed):
    data, config = mixed
    order = loader.MixtureOrder(data, config)
    places = [p for n in range(2600) for p in order.batch(n, range(8))]
    for count in (8, 4096, 4104, 20_000):
        counts = np.bincount([d for d, _ in places[:count]], minlength=3)
        assert order.counts(count) == counts.tolist()
        if count >= 4096:
            np.testing.assert_allclose(counts / count, (0.6, 0.3, 0.1), atol=0.01)
    for dataset in range(3):
        size = len(data.datasets[dataset].splits["train"])
        mine = [r for d, r in places if d == dataset]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
        if len(mine) >= 2 * size:
            assert mine[:size] != mine[size : 2 * size]
    size = len(data.datasets[0].splits["train"])
    assert loader.epochs(data, config, 1000)["a"] == pytest.approx(4800 / size, rel=0.02)


def test_every_batch_is_the_same_on_any_number_of_processes_and_after_any_restart(mixed):
    """The multiset of records of every global batch over three epochs."""
    mixture, config = mixed
    for data in (alone(mixture.datasets[2]), mixture):
        per_epoch = len(data.datasets[-1].splits["train"]) // 8
        numbers = range(3 * per_epoch)
        order = loader.MixtureOrder(data, config)
        whole = [sorted(order.batch(n, range(8))) for n in numbers]
        for count in (2, 4):
            size = 8 // count
            shards = [loader.MixtureOrder(data, config) for _ in range(count)]
            for n in numbers:
                rows = [
                    p
                    for i, shard in enumerate(shards)
                    for p in shard.batch(n, range(i * size, (i + 1) * size))
                ]
                assert sorted(rows) == whole[n]
    rng = random.Random(0)
    straight = loader.train_batches(data, config, 0)
    batches = [next(straight)["tokens"] for _ in range(12)]
    for start in rng.sample(range(10), 4):
        for rows in ((), (4, 5, 6, 7)):
            again = loader.train_batches(data, config, start, rows)
            for n in range(start, 12):
                np.testing.assert_array_equal(
                    next(again)["tokens"], batches[n][list(rows) or slice(None)]
                )


def test_mixtures_that_cannot_be_are_refused(mixed, tmp_path):
    data, config = mixed
    names = [name for name, _ in config.data.mixture]
    for mixture, message in (
        (((names[0], 0.0),), "weights must be positive"),
        (((names[0], -1.0),), "weights must be positive"),
        (((names[0], 1.0), (names[0], 2.0)), "names a directory twice"),
        (((names[0], 1.0), (names[1], 1e-4)), "none below a thousandth"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(data=dict(sequence_length=64, mixture=mixture))
    (tmp_path / "d.txt").write_text(play(9, 80))
    make(f"text:{tmp_path / 'd.txt'}", "sentencepiece", tmp_path / "d", 64, vocab_size=290)
    with pytest.raises(UserError, match="was prepared with|does not match"):
        loader.load(
            tiny_config(
                data=dict(sequence_length=64, mixture=((names[0], 1.0), (str(tmp_path / "d"), 1.0)))
            ),
            tmp_path,
        )
    with pytest.raises(
        UserError, match="was prepared with packing 'concat', but data.packing='best_fit'"
    ):
        loader.load(
            tiny_config(
                data=dict(sequence_length=64, packing="best_fit", mixture=((names[0], 1.0),))
            ),
            tmp_path,
        )
    with pytest.raises(UserError, match="is not prepared data"):
        loader.check_source(tiny_config(data=dict(mixture=((str(tmp_path), 1.0),))), tmp_path)


def test_a_run_on_a_mixture_tells_of_every_source(mixed, tmp_path):
    from modse_jax.training import loop, run_logs

    _, config = mixed
    import dataclasses

    config = dataclasses.replace(
        config, training=TrainingConfig(batch_size=8, steps=2, log_every=1, checkpoint_every=2)
    )
    assert loop.train(config, str(tmp_path / "run")) == ExitCode.FINISHED
    train, held = (run_logs.read_log(tmp_path / "run" / "metrics.jsonl")[i] for i in (1, 2))
    assert sum(train["tokens_by_source"].values()) == 2 * 8 * 64 == train["tokens"]
    assert (
        set(train["epochs"]) == set(held["sources"]) == {"a", "b", "c"}
        and 0 <= train["data_wait"] <= 1
    )
    weights = [held["sources"][n]["tokens"] for n in "abc"]
    assert held["loss"] == pytest.approx(
        np.average([held["sources"][n]["loss"] for n in "abc"], weights=weights)
    )


def test_inspect_shows_card_borders_and_pictures(tmp_path, corpus, capsys):
    make(f"text:{corpus}", "bytes", tmp_path / "data")
    inspect.main([f"--data={tmp_path / 'data'}", "--record=1", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert "24 documents" in said or "documents" in said and "def f" in said and "segment" in said
    assert (tmp_path / "lengths.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as stop:
        inspect.main([f"--data={tmp_path / 'data'}", "--record=100000"])
    assert stop.value.code == 2 and "records 0 to" in capsys.readouterr().err
