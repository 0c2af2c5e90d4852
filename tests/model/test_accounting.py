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
CONFIG_NAMES = sorted(
    ".".join(path.relative_to(CONFIG_FOLDER).with_suffix("").parts)
    for path in (*CONFIG_FOLDER.glob("*.py"), *CONFIG_FOLDER.glob("study/*.py"))
)


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
    width = float(accounting.nominal_routed_width(config) / config.top_k)
    assert counts.weights == pytest.approx(weights, abs=5e4)
    assert counts.total == pytest.approx(total, abs=5e4)
    assert accounting.count_active_parameters(config).weights == pytest.approx(active, abs=5e4)
    one_expert = accounting.count_active_parameters(config, width / config.top_k)
    assert one_expert.weights == pytest.approx(active_with_one_expert, abs=5e4)
    for first, second in zip(config.widths[::2], config.widths[1::2]):
        assert first + second == 2 * width


def test_baseline_with_more_parameters_has_the_count_of_the_paper():
    counts = accounting.count_parameters(load_config("baseline105_300m_x8"))
    assert counts.weights == pytest.approx(1.3569e9, abs=5e4)


@pytest.mark.parametrize("widths, active", [((6912, 6144), 649.2e6), ((768, 1536), 252.8e6)])
def test_active_parameters_of_the_widest_and_narrowest_experts(widths, active):
    config = load_config("modse_300m_x8")
    mean_width = sum(widths) / 2
    counts = accounting.count_active_parameters(config, mean_width)
    assert counts.weights == pytest.approx(active, abs=5e4)


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
    assert accounting.nominal_routed_width(config) == 2 * 12
    assert accounting.realized_width(config, np.full(4, 10)) == 12
    uneven_LE = np.array([[3, 0, 0, 1]])
    assert accounting.realized_width(config, uneven_LE) == (3 * 20 + 12) / 4


def test_flops_are_those_of_the_matmuls_of_the_built_model():
    """A forward pass has twice the size of every active matrix, and the scores; the factor is 3."""
    config = tiny_config(moe=dict(router_noise="learned"))
    model = config.model
    counts = accounting.count_parameters(config)
    experts = model.num_layers * 3 * model.dim * 2 * 12
    router = model.num_layers * 2 * model.dim * 4
    assert counts.router == router + model.num_layers * 4  # and a scale of the noise per expert
    matmul_weights = counts.embeddings // 2 + counts.attention + router + experts
    scores = model.num_layers * 2 * 2 * model.dim * 32
    expected = 3 * (2 * matmul_weights + scores)
    assert accounting.nominal_flops_per_token(config, 32) == expected
    assert accounting.nominal_expert_flops_per_token(config) == 6 * experts


def test_realized_flops_are_those_of_the_routing_that_happened():
    """Six tokens: routed evenly, as nominal; then only to the widest, with three tokens dropped."""
    config = tiny_config()
    layers, dim = config.model.num_layers, config.model.dim
    even_LE = np.full((layers, 4), 3)
    nominal = accounting.nominal_flops_per_token(config, 32)
    assert accounting.realized_flops_per_token(config, 32, even_LE, 6) == nominal
    widest_LE = np.array([[9, 0, 0, 0], [9, 0, 0, 0]])
    without_experts = nominal - accounting.nominal_expert_flops_per_token(config)
    experts = 6 * 3 * dim * (2 * 9 * 20) // 6
    realized = accounting.realized_flops_per_token(config, 32, widest_LE, 6)
    assert realized == without_experts + experts


POOLS = dict(
    pools=((4, 12, 2), (3, 8, 1)), widths=(), pairs=False, router_noise="learned", copy_experts=()
)
ZERO_WIDTHS = dict(widths=(20, 4, 0, 0), pairs=False, copy_experts=(3,))


@pytest.mark.parametrize(
    "options, active_width",
    [
        (dict(moe=POOLS), 2 * 12 + 8),
        (dict(moe={**POOLS, "pools": ((2, 0, 1), (3, 0, 2)), "widths": (8, 4, 5, 3, 0)}), 34 / 3),
        (dict(moe=ZERO_WIDTHS), 2 * 24 / 4),
        (dict(moe=dict(shared_width=6, shared_placement="in_layer")), 24 + 6),
        (dict(moe=dict(shared_width=6, shared_placement="parallel")), 24 + 6),
        (dict(model=dict(dense_width=40)), 40),
        (dict(model=dict(norm_position="post", qk_norm="full", num_kv_heads=1)), 24),
        (dict(moe=dict(bias_rule="sign")), 24),
    ],
)
def test_every_axis_counts_to_the_unit(options, active_width):
    config = tiny_config(**options)
    counts = accounting.count_parameters(config)
    assert count_built_parameters(config) == counts.total
    assert float(config.active_width) == pytest.approx(active_width)
    active = accounting.count_active_parameters(config)
    per_unit = config.model.num_layers * 3 * config.model.dim
    assert active.experts + active.shared + active.dense == round(per_unit * config.active_width)
    assert (counts.router == 0) == config.is_dense


def test_zero_experts_cost_no_flops():
    """Tokens at the experts of width 0 count in no matmul but the router's."""
    config = tiny_config(moe=ZERO_WIDTHS)
    idle_LE = np.array([[0, 0, 6, 6], [0, 0, 6, 6]])
    nominal = accounting.nominal_flops_per_token(config, 32)
    realized = accounting.realized_flops_per_token(config, 32, idle_LE, 6)
    assert realized == nominal - accounting.nominal_expert_flops_per_token(config)
