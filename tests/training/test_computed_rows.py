"""The tokens that experts computed: routed ones without those that a full expert dropped."""

import numpy as np

from modse_jax.model import accounting
from modse_jax.moe.router import RouterStatistics
from modse_jax.training import metrics
from tests.helpers.configs import tiny_config


def make_statistics(counts_LKE: np.ndarray, dropped_LP: np.ndarray) -> RouterStatistics:
    layers, _, num_experts = counts_LKE.shape
    return RouterStatistics(
        counts_KE=counts_LKE,
        gates_E=np.zeros((layers, num_experts)),
        entropy_P=np.zeros(dropped_LP.shape),
        tokens=np.full(layers, 10),
        dropped_P=dropped_LP,
    )


def test_drops_are_taken_from_the_pool_that_has_them():
    """Two pools of two experts; the second drops 4 of 10 tokens in layer 0, and none in layer 1."""
    config = tiny_config(moe=dict(pools=((2, 12, 1), (2, 8, 1)), widths=(), pairs=False))
    counts_LKE = np.array([[[7, 3, 0, 0], [0, 0, 8, 2]], [[5, 5, 0, 0], [0, 0, 5, 5]]])
    statistics = make_statistics(counts_LKE, np.array([[0, 4], [0, 0]]))
    rows_E = metrics.count_computed_rows(config, statistics)
    np.testing.assert_allclose(rows_E, [12, 8, 8 * 0.6 + 5, 2 * 0.6 + 5])
    flops = accounting.realized_flops_per_token(config, 32, rows_E, 10)
    without = accounting.nominal_flops_per_token(config, 32)
    dropped_flops = 6 * 3 * config.model.dim * 8 * 4 / 10  # 4 of 10 tokens, at width 8
    assert without - flops == round(dropped_flops) == 922


def test_experts_of_width_zero_drop_no_tokens():
    config = tiny_config(moe=dict(widths=(20, 20, 0, 0), pairs=False, copy_experts=(3,)))
    counts_LKE = np.array([[[8, 2, 4, 6], [0, 0, 0, 0]]])
    rows_E = metrics.count_computed_rows(config, make_statistics(counts_LKE, np.array([[5]])))
    np.testing.assert_allclose(rows_E, [4, 1, 4, 6])
    assert rows_E @ np.array(config.widths) == 5 * 20


def test_a_dense_model_computes_no_rows():
    config = tiny_config(model=dict(dense_width=24))
    statistics = make_statistics(np.zeros((2, 0, 0)), np.zeros((2, 0)))
    rows_E = metrics.count_computed_rows(config, statistics)
    nominal = accounting.nominal_flops_per_token(config, 32)
    assert accounting.realized_flops_per_token(config, 32, rows_E, 10) == nominal
