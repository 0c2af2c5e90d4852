"""Prepared directories decode to the documents, and damage is found when they are opened."""

import hashlib
import random

import numpy as np
import pytest

from modse_jax.data import data_card, decoding, prepared_data, sources
from modse_jax.data.validation_split import holdout_score
from modse_jax.errors import UserError
from tests.helpers.datasets import prepare_source


def documents_of_split(corpus, split):
    texts = []
    for document in sources.read_documents(f"text:{corpus}"):
        is_validation = holdout_score(document.name) < 0.1
        is_used = document.name[:2].isdigit()  # the other files are empty or not UTF-8
        if is_used and is_validation == (split == "validation"):
            texts.append(document.text)
    return texts


@pytest.mark.parametrize("split", data_card.SPLITS)
def test_records_decode_to_the_documents_of_their_split(prepared, corpus, split):
    documents = documents_of_split(corpus, split)
    assert documents
    assert list(decoding.decode_documents(prepared, split)) == documents


def test_records_of_best_fit_decode_to_every_byte_once(tmp_path):
    """Records hold several documents, and documents of 100 bytes and more are cut into pieces."""
    rng = random.Random(0)
    sizes = [rng.randrange(5, 60) for _ in range(30)] + [100, 200]
    documents = ["".join(rng.choices("abcd \n", k=size)).encode() for size in sizes]
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(document)
    source = f"text:{tmp_path / 'texts'}"
    prepare_source(source, "bytes", tmp_path / "data", 64, 0.3, packing="best_fit")
    decoded = []
    for split in data_card.SPLITS:
        dataset = prepared_data.open_prepared(tmp_path / "data")
        texts = list(decoding.decode_documents(dataset, split))
        assert sum(map(len, texts)) == dataset.card["splits"][split]["bytes"]
        decoded += texts
    whole = [document for document in documents if len(document) < 63]
    assert set(whole) <= set(decoded)
    # 100 bytes with begin and end are two pieces of up to 65 tokens, and 200 bytes are four.
    assert len(decoded) == len(whole) + 2 + 4
    assert sorted(b"".join(decoded)) == sorted(b"".join(documents))


@pytest.mark.parametrize("split", data_card.SPLITS)
def test_card_counts_documents_and_tokens(prepared, corpus, split):
    documents = documents_of_split(corpus, split)
    records = list(prepared.splits[split])
    counts = prepared.card["splits"][split]
    assert counts["documents"] == len(documents)
    assert counts["bytes"] == sum(map(len, documents))
    assert counts["records"] == len(records)
    hash_of_only_part = hashlib.sha256(b"".join(documents)).hexdigest()
    assert counts["sha256"] == hashlib.sha256(hash_of_only_part.encode()).hexdigest()
    segments = np.stack([record["segments"] for record in records])
    assert counts["padding"] == np.sum(segments == 0)
    is_predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    num_tokens = sum(len(prepared.tokenizer.encode(text)) + 1 for text in documents)
    assert counts["tokens"] == np.sum(is_predicted) == num_tokens


def test_card_counts_unused_documents(prepared):
    assert prepared.card["empty_documents"] == 1
    assert prepared.card["undecodable_documents"] == 1


def test_damaged_directories_are_refused(prepared, tmp_path):
    model_path = prepared.directory / data_card.TOKENIZER_NAME
    model = model_path.read_bytes()
    model_path.write_bytes(model[:-1] + b"?")
    with pytest.raises(UserError, match="tokenizer.model holds other bytes than were written"):
        prepared_data.open_prepared(prepared.directory)
    (prepared.directory / data_card.CARD_NAME).write_text('{"format": 99}')
    with pytest.raises(UserError, match="data format 99"):
        prepared_data.open_prepared(prepared.directory)
    with pytest.raises(UserError, match="is not prepared data"):
        prepared_data.open_prepared(tmp_path)


def test_missing_and_additional_files_are_refused(prepared):
    addition = prepared.directory / "addition"
    addition.write_text("x")
    with pytest.raises(UserError, match="addition is not part of it"):
        prepared_data.open_prepared(prepared.directory)
    addition.unlink()
    (prepared.directory / data_card.TOKENIZER_NAME).unlink()
    with pytest.raises(UserError, match="tokenizer.model is missing"):
        prepared_data.open_prepared(prepared.directory)
