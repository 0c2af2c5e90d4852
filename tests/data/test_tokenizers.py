"""Tokenizers are lossless, and training them is deterministic."""

import subprocess
import sys

import numpy as np
import pytest
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
