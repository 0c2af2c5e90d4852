"""Parameter and FLOP counts against the built models and the paper's tables."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from modse_jax.config import loading
from modse_jax.model import accounting, transformer
from tests.helpers.configs import tiny_config

FILES = sorted(p.stem for p in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def load(name):
    return loading.from_dict(importlib.import_module(f"configs.{name}").get_config().to_dict())


@pytest.mark.parametrize("name", FILES)
def test_counts_equal_the_built_model(name):
    """Built abstractly: no memory is spent, whatever the size."""
    config = load(name)
    _, params = transformer.build_abstract_model(config)
    assert sum(a.size for a in jax.tree.leaves(params)) == accounting.count_parameters(config).total


@pytest.mark.parametrize(
    "extra",
    [
        dict(model=dict(tie_embeddings=True)),
        dict(model=dict(num_kv_heads=1)),
        dict(moe=dict(gate_term="learned")),
    ],
)
def test_counts_follow_the_options(extra):
    config = tiny_config(**extra)
    _, params = transformer.build_abstract_model(config)
    assert sum(a.size for a in jax.tree.leaves(params)) == accounting.count_parameters(config).total


def test_the_papers_tables():
    small, large = load("modse_300m_x8"), load("modse_700m_x8")
    for config, total, everything, active, one_expert in (
        (small, 1.3003e9, 1.3005e9, 451.0e6, 309.4e6),
        (large, 3.3444e9, 3.3448e9, 1079.4e6, 702.0e6),
    ):
        p, h = accounting.count_parameters(config), accounting.nominal_width(config)
        assert p.weights == pytest.approx(total, abs=5e4)
        assert p.total == pytest.approx(everything, abs=5e4)
        assert accounting.active_parameters(config) == pytest.approx(active, abs=5e4)
        dense = accounting.active_parameters(config, h / config.moe.top_k)
        assert dense == pytest.approx(one_expert, abs=5e4)
        pairs = zip(config.widths[::2], config.widths[1::2])
        assert all(a + b == 2 * h for a, b in pairs)
    assert accounting.count_parameters(load("baseline105_300m_x8")).weights == pytest.approx(
        1.3569e9, abs=5e4
    )
    assert accounting.active_parameters(small, (6912 + 6144) / 2) == pytest.approx(649.2e6, abs=5e4)
    assert accounting.active_parameters(small, (768 + 1536) / 2) == pytest.approx(252.8e6, abs=5e4)


@pytest.mark.parametrize("size", ["300m", "700m"])
def test_modse_has_exactly_the_baselines_parameters(size):
    assert accounting.count_parameters(load(f"modse_{size}_x8")) == accounting.count_parameters(
        load(f"baseline_{size}_x8")
    )
    assert accounting.count_parameters(load("tiny")) == accounting.count_parameters(
        load("tiny_baseline")
    )


def test_realised_width_follows_the_counts():
    config = tiny_config()
    assert (
        accounting.realized_width(config, np.full(4, 10)) == accounting.nominal_width(config) == 12
    )
    assert accounting.realized_width(config, np.array([[3, 0, 0, 1]])) == (3 * 20 + 12) / 4


def test_flops_equal_the_products_of_the_built_model():
    """Twice the size of every matrix a token meets, and the scores, times 3."""
    config = tiny_config()
    m, p = config.model, accounting.count_parameters(config)
    met = p.embeddings / 2 + p.attention + p.gates + m.num_layers * 3 * m.dim * 2 * 12
    scores = m.num_layers * 2 * 2 * m.dim * 32
    assert accounting.train_flops_per_token(config, 32, 12) == 3 * (2 * met + scores)
