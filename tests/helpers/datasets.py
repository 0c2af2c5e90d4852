"""Prepares small datasets for tests, and compares prepared directories."""

import pathlib
import random

import numpy as np

from modse_jax.config.options import DataConfig
from modse_jax.data import data_card, decoding, prepared_data
from modse_jax.data.prepare import pipeline
from modse_jax.data.prepared_data import Dataset
from modse_jax.data.training_data import TrainingData

ALPHABET = "abcdefgh \u00e9"


def prepare_source(
    source: str,
    tokenizer: str,
    out: pathlib.Path,
    length: int = 32,
    fraction: float = 0.1,
    vocab_size: int = 400,
    workers: int = 1,
    **options,
) -> dict:
    """Prepares a source with options that suit small texts, and returns the card."""
    data = DataConfig(
        source=source,
        tokenizer=tokenizer,
        sequence_length=length,
        validation_fraction=fraction,
        **options,
    )
    return pipeline.prepare_data(data, str(out), vocab_size, workers)


def single_dataset(dataset: Dataset) -> TrainingData:
    """Returns training data that holds one dataset."""
    return TrainingData((dataset,), (1.0,))


def random_text(seed: int = 0, num_paragraphs: int = 90) -> str:
    """Returns paragraphs of 20 lines of random characters, each followed by a blank line."""
    rng = random.Random(seed)
    paragraphs = []
    for _ in range(num_paragraphs):
        lines = ["".join(rng.choices(ALPHABET, k=60)) for _ in range(20)]
        paragraphs.append("\n".join(lines) + "\n\n")
    return "".join(paragraphs)


def read_documents(directory: pathlib.Path, split: str) -> list[bytes]:
    """Returns the documents of a split of a prepared directory."""
    return list(decoding.decode_documents(prepared_data.open_prepared(directory), split))


def assert_same_records(first: pathlib.Path, second: pathlib.Path) -> None:
    """Asserts that two prepared directories hold the same records, at least one in each split."""
    datasets = [prepared_data.open_prepared(directory) for directory in (first, second)]
    for split in data_card.SPLITS:
        records = [dataset.splits[split] for dataset in datasets]
        assert len(records[0]) == len(records[1]) > 0
        for record, other in zip(*records):
            # The functions of np.testing take a hundred times longer for thousands of records.
            assert np.array_equal(record["tokens"], other["tokens"])
            assert np.array_equal(record["segments"], other["segments"])
