"""Counts of parameters and FLOPs against the built models and the tables of the paper."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from modse_jax.config import loading
from modse_jax.config.options import Config
from modse_jax.model import accounting, transformer
from tests.helpers.configs import tiny_config

CONFIG_FOLDER = pathlib.Path(__file__).parents[2] / "configs"
CONFIG_NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.py"))


def load_config(name: str) -> Config:
    module = importlib.import_module(f"configs.{name}")
    return loading.from_dict(module.get_config().to_dict())


def count_built_parameters(config: Config) -> int:
    """Builds the model abstractly, which takes no memory at any size."""
    _, params = transformer.build_abstract_model(config)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_counts_equal_the_built_model(name):
    config = load_config(name)
    assert count_built_parameters(config) == accounting.count_parameters(config).total


@pytest.mark.parametrize(
    "options",
    [
        dict(model=dict(tie_embeddings=True)),
        dict(model=dict(num_kv_heads=1)),
        dict(moe=dict(router_noise="learned")),
    ],
)
def test_counts_equal_the_built_model_with_other_options(options):
    config = tiny_config(**options)
    assert count_built_parameters(config) == accounting.count_parameters(config).total


@pytest.mark.parametrize(
    "name, weights, total, active, active_with_one_expert",
    [
        ("modse_300m_x8", 1.3003e9, 1.3005e9, 451.0e6, 309.4e6),
        ("modse_700m_x8", 3.3444e9, 3.3448e9, 1079.4e6, 702.0e6),
    ],
)
def test_counts_equal_the_tables_of_the_paper(name, weights, total, active, active_with_one_expert):
    config = load_config(name)
    counts = accounting.count_parameters(config)
    width = accounting.nominal_width(config)
    assert counts.weights == pytest.approx(weights, abs=5e4)
    assert counts.total == pytest.approx(total, abs=5e4)
    assert accounting.active_parameters(config) == pytest.approx(active, abs=5e4)
    one_expert = accounting.active_parameters(config, width / config.top_k)
    assert one_expert == pytest.approx(active_with_one_expert, abs=5e4)
    for first, second in zip(config.widths[::2], config.widths[1::2]):
        assert first + second == 2 * width


def test_baseline_with_more_parameters_has_the_count_of_the_paper():
    counts = accounting.count_parameters(load_config("baseline105_300m_x8"))
    assert counts.weights == pytest.approx(1.3569e9, abs=5e4)


@pytest.mark.parametrize("widths, active", [((6912, 6144), 649.2e6), ((768, 1536), 252.8e6)])
def test_active_parameters_of_the_widest_and_narrowest_experts(widths, active):
    config = load_config("modse_300m_x8")
    mean_width = sum(widths) / 2
    assert accounting.active_parameters(config, mean_width) == pytest.approx(active, abs=5e4)


@pytest.mark.parametrize(
    "modse, baseline",
    [
        ("modse_300m_x8", "baseline_300m_x8"),
        ("modse_700m_x8", "baseline_700m_x8"),
        ("tiny", "tiny_baseline"),
    ],
)
def test_modse_has_exactly_the_parameters_of_its_baseline(modse, baseline):
    modse_counts = accounting.count_parameters(load_config(modse))
    assert modse_counts == accounting.count_parameters(load_config(baseline))


def test_realized_width_is_weighted_by_tokens():
    config = tiny_config()
    assert accounting.nominal_width(config) == 12
    assert accounting.realized_width(config, np.full(4, 10)) == 12
    uneven_LE = np.array([[3, 0, 0, 1]])
    assert accounting.realized_width(config, uneven_LE) == (3 * 20 + 12) / 4


def test_flops_are_those_of_the_matmuls_of_the_built_model():
    """A forward pass has twice the size of every active matrix, and the scores; the factor is 3."""
    config = tiny_config()
    model = config.model
    counts = accounting.count_parameters(config)
    experts = model.num_layers * 3 * model.dim * 2 * 12
    matmul_weights = counts.embeddings / 2 + counts.attention + counts.gates + experts
    scores = model.num_layers * 2 * 2 * model.dim * 32
    expected = 3 * (2 * matmul_weights + scores)
    assert accounting.train_flops_per_token(config, 32, 12) == expected
