"""Text to records to batches: exact round trips, a split by document, and batches that depend on (seed, step) alone."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from modse_jax.data import loader, packing, prepare, sources, tokenizers
from modse_jax.errors import UserError
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import alone, make

SCRIPTS = (
    "plain, caf\u00e9 \u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600\tx\r\n\n"
    "    indented\u00a0\u2581 end"
).encode()


@pytest.fixture(params=["bytes", "sentencepiece"])
def prepared(request, corpus, tmp_path):
    make(f"text:{corpus}", request.param, tmp_path / "data")
    return loader.open_prepared(tmp_path / "data")


def test_tokenizers_give_back_the_same_bytes(corpus):
    texts = [d.text for d in sources.documents(f"text:{corpus}") if d.name != "latin.py"]
    for tokenizer in (
        tokenizers.Bytes(),
        tokenizers.train_sentencepiece(texts, 400),
        tokenizers.train_hf(texts, 400),
    ):
        for text in (*texts, SCRIPTS, b""):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        for a, b in zip(
            tokenizer.encode_batch([*texts, SCRIPTS]), map(tokenizer.encode, [*texts, SCRIPTS])
        ):
            np.testing.assert_array_equal(a, b)


def test_equal_input_trains_equal_tokenizers_in_every_process(corpus):
    """With fewer lines allowed than there are: sentencepiece's own sample differs from process to process."""
    code = (
        "from modse_jax.data import sources, tokenizers; tokenizers.SAMPLED_LINES = 50; "
        f"texts = [d.text for d in sources.documents('text:{corpus}') if d.name != 'latin.py']; "
        "print(tokenizers.fingerprint(tokenizers.train_sentencepiece(texts, 340)))"
    )
    a, b = (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert a == b != tokenizers.fingerprint(tokenizers.Bytes())
    assert tokenizers._thin(range(1000), 50) == list(range(0, 1000, 16))


def test_records_decode_to_the_documents_and_counts_are_right(prepared, corpus):
    card = prepared.card
    assert (card["empty_documents"], card["undecodable_documents"]) == (1, 1)
    everything = {
        d.name: d.text for d in sources.documents(f"text:{corpus}") if d.name[:2].isdigit()
    }
    for split in prepare.SPLITS:
        want = [
            text
            for name, text in everything.items()
            if (sources.holdout_score(name) < 0.1) == (split == "validation")
        ]
        assert list(loader.documents(prepared, split)) == want
        c, records = card["splits"][split], list(prepared.splits[split])
        assert (
            c["documents"] == len(want)
            and c["bytes"] == sum(map(len, want))
            and c["records"] == len(records)
        )
        whole = hashlib.sha256(b"".join(want)).hexdigest()  # of one part
        assert c["sha256"] == hashlib.sha256(whole.encode()).hexdigest()
        assert c["padding"] == sum(int((r["segments"] == 0).sum()) for r in records)
        predicted = sum(
            int(((r["segments"][1:] == r["segments"][:-1]) & (r["segments"][1:] > 0)).sum())
            for r in records
        )
        assert c["tokens"] == predicted == sum(len(prepared.tokenizer.encode(t)) + 1 for t in want)


def packed(kind, documents, length):
    packer = packing.Packer(kind, length, 0)
    blocks = [block for ids in documents for block in packer.add(ids)] + packer.rest()
    return tuple(np.concatenate(a).tolist() for a in zip(*blocks))


def test_concat_overlaps_by_one_and_numbers_segments_from_one():
    documents = [np.arange(10, 17), np.arange(20, 23), np.arange(30, 36)]
    tokens, segments = packed("concat", documents, 4)
    stream = np.concatenate(documents)
    assert tokens == [
        stream[i : i + 5].tolist() + [0] * max(0, i + 5 - len(stream))
        for i in range(0, len(stream) - 1, 4)
    ]
    assert segments[1] == [1, 1, 1, 2, 2] and segments[-1] == [1, 1, 1, 1, 0]
    many = [np.arange(1, 100 + i) for i in range(40)]  # more than the packer holds
    stream, (tokens, segments) = np.concatenate(many), packed("concat", many, 4)
    assert [t[0] for t in tokens] == stream[:-1:4].tolist() and len(tokens) > 512
    assert sum(s.count(0) for s in segments) == -(len(stream) - 1) % 4


def test_best_fit_cuts_no_document_that_fits_and_predicts_every_token_once():
    documents = [np.arange(1, 1 + n) for n in (9, 3, 5, 2, 12, 4)]
    tokens, segments = packed("best_fit", documents, 8)
    pieces = [
        [t for t, s in zip(row, ids) if s == number]
        for row, ids in zip(tokens, segments)
        for number in range(1, max(ids) + 1)
    ]
    assert sorted(map(len, pieces)) == sorted([9, 3, 5, 2, 9, 4, 4])  # 12 = 9 + 4 - 1, shared
    assert sum(len(p) - 1 for p in pieces) == sum(len(d) - 1 for d in documents)
    assert packing.best_fit([5, 4, 3, 6], 9) == [[0, 1], [2, 3]]
    waste = packing.waste([9, 3, 5, 2, 12, 4], 8)
    assert waste["best_fit"]["cut"] == 0 < waste["concat"]["cut"] < 1
    assert (
        waste["concat"]["padding"] == pytest.approx(1 - 34 / 40)
        and waste["best_fit"]["padding"] == 0
    )
    assert packing.waste([6, 6, 6], 8)["best_fit"]["padding"] == pytest.approx(1 / 3)


def test_held_out_is_stable_and_never_empty_nor_all():
    names = [f"n{i}" for i in range(200)]
    places = sorted(map(sources.holdout_score, names))

    def held(fraction, places):
        limit = sources.holdout_threshold(
            sum(p < fraction for p in places), min(places), max(places), fraction
        )
        return sum(p < limit for p in places)

    assert 5 < held(0.1, places) < 40 and held(0.1, places) == sum(p < 0.1 for p in places)
    a, b = sources.holdout_score("a"), sources.holdout_score("b")
    assert held(min(a, b) / 2, [a, b]) == 1 and held(0.9999, [a, b]) == 1


def test_a_lone_file_is_cut_at_blank_lines(tmp_path):
    for end in (b"\n", b"\r\n"):
        text = b"".join((b"paragraph %d" % i + end) * 40 + end for i in range(200))
        (tmp_path / "a.txt").write_bytes(text)
        pieces = list(sources.documents(f"text:{tmp_path / 'a.txt'}"))
        assert len(pieces) > 3 and b"".join(p.text for p in pieces) == text
        assert all(
            p.text.endswith(end + end) and len(p.text) >= sources.PIECE_BYTES for p in pieces[:-1]
        )


def test_batches_are_a_function_of_seed_and_step(prepared):
    config = tiny_config(model=dict(vocab_size=400))

    def batches(start, count, **training):
        it = loader.train_batches(
            alone(prepared), tiny_config(model=dict(vocab_size=400), training=training), start
        )
        return [next(it)["tokens"] for _ in range(count)]

    per_epoch = prepared.card["splits"]["train"]["records"] // config.training.batch_size
    straight = batches(0, 2 * per_epoch + 3)
    for start in (1, per_epoch, per_epoch + 2):
        np.testing.assert_array_equal(
            np.array(batches(start, 2)), np.array(straight[start : start + 2])
        )
    assert not np.array_equal(straight[0], batches(0, 1, seed=1)[0])

    def rows(some):
        return sorted(r.tobytes() for b in some for r in b)

    epoch = straight[:per_epoch]
    assert len(set(rows(epoch))) == len(
        {r["tokens"].astype(np.int32).tobytes() for r in prepared.splits["train"]}
        & set(rows(epoch))
    )
    assert rows(epoch[:2]) != rows(straight[per_epoch : per_epoch + 2]), (
        "epochs must differ in order"
    )


def test_validation_covers_every_record_once(prepared):
    for batch_size in (1, 3, 8):
        batches = list(loader.validation_batches(prepared, batch_size, 400))
        real = [row for b in batches for row, s in zip(b["tokens"], b["segments"]) if s.any()]
        np.testing.assert_array_equal(real, [r["tokens"] for r in prepared.splits["validation"]])
        assert all(len(b["tokens"]) == batch_size for b in batches)
    assert (
        sum(
            bool(s.any())
            for b in loader.validation_batches(prepared, 2, 400, limit=3)
            for s in b["segments"]
        )
        == 3
    )


def test_preparing_twice_gives_the_same_card_and_leaves_nothing_half_done(corpus, tmp_path):
    cards = [make(f"text:{corpus}", "bytes", tmp_path / name) for name in "ab"]
    assert cards[0] == cards[1] == json.loads((tmp_path / "a" / "card.json").read_text())
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="fewer than one record"):
        make(f"text:{corpus}", "bytes", tmp_path / "c" / "d", 10**6)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


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
def test_bad_input_is_one_line_and_exit_code_2(
    source, tokenizer, message, corpus, tmp_path, capsys
):
    for name, text in (("empty", None), ("one", "some text"), ("blank", "")):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "a.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(  # the library's defaults normalise
        sentence_iterator=iter(["some words to learn pieces from"] * 50),
        vocab_size=22,
        model_writer=(tmp_path / "lossy.model").open("wb"),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    names = dict(tmp=tmp_path, corpus=corpus)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        prepare.main(
            [
                f"--source={source.format(**names)}",
                f"--tokenizer={tokenizer.format(**names)}",
                f"--out={tmp_path}/out",
                "--sequence_length=32",
                "--vocab_size=100",
            ]
        )
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and message in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_that_cannot_be_made_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be made"):
            make(f"text:{corpus}", "bytes", tmp_path / out)


def test_data_of_another_source_is_not_taken_for_this_one(corpus, tmp_path):
    config = tiny_config(data=dict(source=f"text:{corpus}"))
    loader.load(config, tmp_path)
    with pytest.raises(UserError, match="was prepared with validation_fraction 0.02"):
        loader.load(
            tiny_config(data=dict(source=f"text:{corpus}", validation_fraction=0.3)), tmp_path
        )


def test_data_and_config_must_agree(prepared, tmp_path):
    source = f"prepared:{prepared.directory}"
    kind = prepared.tokenizer.kind
    other = "sentencepiece" if kind == "bytes" else "bytes"
    for changes, message in (
        (dict(data=dict(tokenizer=other)), "does not match"),
        (dict(data=dict(tokenizer=kind, sequence_length=16)), "records of 32 tokens"),
        (dict(data=dict(tokenizer=kind), model=dict(vocab_size=64)), "more than model.vocab_size"),
        (dict(data=dict(tokenizer=kind), training=dict(batch_size=10**6)), "fewer than training"),
    ):
        changes["data"]["source"] = source
        changes.setdefault("model", dict(vocab_size=512))
        with pytest.raises(UserError, match=message):
            loader.load(tiny_config(**changes), tmp_path)
    with pytest.raises(
        UserError,
        match="^record .* token id .* outside the vocabulary 0..49 .model.vocab_size=50.$",
    ):
        next(loader.train_batches(alone(prepared), tiny_config(model=dict(vocab_size=50)), 0))
    model = (prepared.directory / "tokenizer.model").read_bytes()
    (prepared.directory / "tokenizer.model").write_bytes(model[:-1] + b"?")
    with pytest.raises(UserError, match="tokenizer.model holds other bytes than were written"):
        loader.open_prepared(prepared.directory)
    (prepared.directory / "card.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="data format 99"):
        loader.open_prepared(prepared.directory)
    with pytest.raises(UserError, match="is not prepared data"):
        loader.open_prepared(tmp_path)


def test_the_standard_library_is_a_source():
    names = [name for name, _ in sources.files("python_stdlib")]
    assert (
        "argparse.py" in names
        and names == sorted(names)
        and not any("site-packages" in n for n in names)
    )


def test_nothing_imports_tensorflow(prepared):
    assert "tensorflow" not in sys.modules
