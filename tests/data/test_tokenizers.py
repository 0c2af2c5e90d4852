"""Tokenizers are lossless, and training them is deterministic."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers as hugging_face

from modse_jax.data import sources, tokenizers
from modse_jax.errors import UserError

SCRIPTS = (
    "plain, caf\u00e9 \u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600\tx\r\n\n"
    "    indented\u00a0\u2581 end"
).encode()


def test_tokenizers_are_lossless(corpus):
    documents = sources.read_documents(f"text:{corpus}")
    texts = [document.text for document in documents if document.name != "latin.py"]
    for tokenizer in (
        tokenizers.Bytes(),
        tokenizers.train_sentencepiece(texts, 400),
        tokenizers.train_hf(texts, 400),
    ):
        for text in (*texts, SCRIPTS, b""):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
        batch = tokenizer.encode_batch([*texts, SCRIPTS])
        for ids, text in zip(batch, [*texts, SCRIPTS]):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_equal_input_trains_equal_tokenizers_in_every_process(corpus):
    """Trains on fewer lines than there are: sentencepiece's own sample differs by process."""
    code = (
        "from modse_jax.data import sources, tokenizers\n"
        "tokenizers.TRAINING_LINES = 50\n"
        f"documents = sources.read_documents('text:{corpus}')\n"
        "texts = [document.text for document in documents if document.name != 'latin.py']\n"
        "print(tokenizers.fingerprint(tokenizers.train_sentencepiece(texts, 340)))\n"
    )
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first.startswith("sentencepiece:")
    assert first == second


def test_thin_out_samples_evenly():
    assert tokenizers.thin_out(range(1000), 50) == list(range(0, 1000, 16))
    assert tokenizers.thin_out(range(100), 50) == list(range(100))


def test_byte_level_tokenizer_without_all_bytes_is_refused():
    tokenizer = hugging_face.Tokenizer(hugging_face.models.BPE())
    byte_level = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    trainer = hugging_face.trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer.train_from_iterator(["plain text only"], trainer)
    model = tokenizer.to_str().encode()
    with pytest.raises(UserError, match="lacks pieces for .* of the 256 bytes"):
        tokenizers.deserialize("hf", model, "x")


def test_long_lines_train_a_tokenizer():
    words = " ".join(["alpha beta"] * 4000)
    texts = [words.encode()] * 4 + [b"short text"] * 20
    tokenizer = tokenizers.train_sentencepiece(texts, 290)
    assert len(tokenizer.encode(b"alpha beta")) <= 3


@pytest.mark.parametrize("line", ["word " * 9000, "\u4e16" * 12_000, "x" * 40_000])
def test_long_lines_are_divided_without_loss(line):
    pieces = list(tokenizers._split_into_lines(f"a\n\n{line}\n b".encode()))
    assert pieces[0] == "a" and pieces[-1] == " b"
    assert "".join(pieces[1:-1]) == line
    sizes = [len(piece.encode()) for piece in pieces[1:-1]]
    assert max(sizes) <= tokenizers.TRAINING_LINE_BYTES
    assert min(sizes[:-1]) > tokenizers.TRAINING_LINE_BYTES - 10
    assert " " not in line or all(not piece.endswith("w") for piece in pieces)


@pytest.fixture
def byte_level(corpus):
    """The parsed tokenizer.json of a tokenizer that loses nothing."""
    texts = [document.text for document in sources.read_documents(f"text:{corpus}")]
    model = tokenizers.train_hf([text for text in texts if text != b"caf\xe9\n"], 300).serialize()
    return json.loads(model)


def load_hf(parsed, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed))
    return tokenizers.load(f"hf:{path}")


def add_token(parsed, content, **options):
    number = 1 + max(token["id"] for token in parsed["added_tokens"])
    number = max(number, 1 + max(parsed["model"]["vocab"].values()))
    token = dict(id=number, content=content, single_word=False, lstrip=False, rstrip=False)
    parsed["added_tokens"].append({**token, "normalized": False, "special": False, **options})


def test_added_tokens_are_decoded_as_text(byte_level, tmp_path):
    """An added token is not written in the byte-level alphabet, in which an O umlaut is a byte."""
    add_token(byte_level, "\u00d6l")
    tokenizer = load_hf(byte_level, tmp_path)
    text = "Das \u00d6l".encode()
    ids = tokenizer.encode(text)
    assert ids[-1] == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_strip_blanks_are_refused(side, byte_level, tmp_path):
    add_token(byte_level, "<x>", **{side: True})
    with pytest.raises(UserError, match="loses text"):
        load_hf(byte_level, tmp_path)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Lowercase"},
        {"type": "Nmt"},
        {"type": "Replace", "pattern": {"String": "\x00"}, "content": ""},
    ],
)
def test_normalizers_that_lose_text_are_refused(normalizer, byte_level, tmp_path):
    byte_level["normalizer"] = normalizer
    with pytest.raises(UserError, match="loses text"):
        load_hf(byte_level, tmp_path)


def test_prepared_data_of_a_lossy_tokenizer_is_still_opened(byte_level):
    """Older versions accepted it, so that runs with it exist."""
    add_token(byte_level, "<x>", lstrip=True)
    tokenizers.deserialize("hf", json.dumps(byte_level).encode(), "x")


def test_ids_of_a_tokenizer_may_have_gaps(byte_level, tmp_path):
    vocab = byte_level["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 3
    tokenizer = load_hf(byte_level, tmp_path)
    assert tokenizer.vocab_size == vocab[last] + 1
    assert tokenizer.decode([vocab[last] - 1, vocab[last]]) == tokenizer.decode([vocab[last]])
    for text in (SCRIPTS, b"def f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_model_without_padding_piece_is_taken():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn pieces from"] * 50),
        model_writer=model,
        vocab_size=275,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = tokenizers.deserialize("sentencepiece", model.getvalue(), "x")
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode(SCRIPTS)) == SCRIPTS
