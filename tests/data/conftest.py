"""Fixtures of prepared data."""

import pytest

from modse_jax.config.options import Config
from modse_jax.data import prepared_data, training_data
from modse_jax.data.prepared_data import Dataset
from modse_jax.data.training_data import TrainingData
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import prepare_source, random_text


@pytest.fixture(params=["bytes", "sentencepiece"])
def prepared(request, corpus, tmp_path) -> Dataset:
    """The corpus, prepared with each kind of tokenizer."""
    prepare_source(f"text:{corpus}", request.param, tmp_path / "data")
    return prepared_data.open_prepared(tmp_path / "data")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> tuple[TrainingData, Config]:
    """Three datasets of different sizes with weights 6 : 3 : 1, and a config that mixes them."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, seed, size in (("a", 1, 8), ("b", 2, 16), ("c", 3, 4)):
        path = folder / f"{name}.txt"
        path.write_text(random_text(seed, 40 * size))
        prepare_source(f"text:{path}", "bytes", folder / name, 64)
    weights = (("a", 6.0), ("b", 3.0), ("c", 1.0))
    directories = tuple((str(folder / name), weight) for name, weight in weights)
    config = tiny_config(
        data=dict(sequence_length=64, mixture=directories),
        training=dict(batch_size=8),
    )
    return training_data.load(config, folder), config
