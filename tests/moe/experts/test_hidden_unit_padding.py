"""The padding of experts to widths that kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import hidden_unit_padding, select
from tests.helpers.expert_kernels import place_on_one_shard

DIM = 32


def test_shards_of_unequal_padded_width_get_an_expert_without_tokens():
    placement = expert_placement.place_experts((40, 9, 24, 25), 2, "whole")
    assert placement.widths == ((40, 9), (24, 25))
    padded = hidden_unit_padding.pad_placement(placement, 16)
    assert padded.widths == ((48, 16), (32, 32))
    assert padded.slots == 2
    padded = hidden_unit_padding.pad_placement(placement, 10)
    assert padded.widths == ((40, 10, 10), (30, 30))
    assert padded.slots == 3
    assert hidden_unit_padding.pad_placement(padded, 10) is padded


def test_flops_of_padding_are_reported():
    assert hidden_unit_padding.flops_ratio((64, 128), 64) == 1
    assert hidden_unit_padding.flops_ratio((1, 63, 65), 64) == pytest.approx(256 / 129)
    uneven = place_on_one_shard((1000, 3096))
    job = (4096, 128), "h100", "bfloat16"
    assert select.padding("pallas_gpu", uneven, *job) == (
        4160 / 4096,
        "hidden units padded to multiples of 64: 1.6% more FLOPs",
    )
    _, note = select.padding("pallas_triton", uneven, *job)
    assert note.startswith("hidden units padded to mult")
    narrow_model = (4096, 96), "h100", "bfloat16"
    ratio, note = select.padding("pallas_gpu", uneven, *narrow_model)
    assert ratio == 4160 / 4096 * 4 / 3
    assert note == (
        "hidden units padded to multiples of 64 and model.dim=96 padded to 128: 35.4% more FLOPs"
    )
    exact = place_on_one_shard((1024, 512))
    assert select.padding("pallas_gpu", exact, *narrow_model) == (
        4 / 3,
        "model.dim=96 padded to 128: 33.3% more FLOPs",
    )
    assert select.padding("pallas_triton", exact, *job) == (1, "")


def test_gradients_of_padded_weights_need_no_scatter():
    placement = place_on_one_shard((5, 3))
    weights = jnp.ones((DIM, 8)), jnp.ones((DIM, 8)), jnp.ones((8, DIM))

    def sum_with_distinct_coefficients(weights):
        rows_E = jnp.array([1, 1])
        _, padded, _ = hidden_unit_padding.pad_experts(rows_E, weights, jnp.int32(0), placement, 4)
        return sum(jnp.sum(w * (1 + jnp.arange(w.size).reshape(w.shape))) for w in padded)

    gradient = jax.grad(sum_with_distinct_coefficients)
    assert "scatter" not in jax.jit(gradient).lower(weights).as_text()
    # Widths of 5 and 3 are padded to 8 and 4.
    padded_unit = np.array([0, 1, 2, 3, 4, 8, 9, 10])
    expected = 1 + np.arange(DIM)[:, None] * 12 + padded_unit[None, :]
    np.testing.assert_array_equal(gradient(weights)[0], expected)
