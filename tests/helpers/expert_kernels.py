"""Inputs of the expert FFN for tests of its kernels, and the reference that they are compared with.

Legend: N routed tokens and padding rows, D model dimension, E experts, H flat hidden axis.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import expert_weights, reference_ffn


class ExpertInputs(NamedTuple):
    """The arguments of an expert FFN and the gradient of its output."""

    x_ND: jax.Array
    rows_E: jax.Array
    weights: expert_weights.ExpertWeights
    dy_ND: jax.Array

    def astype(self, dtype: Any) -> "ExpertInputs":
        weights = expert_weights.ExpertWeights(*(w.astype(dtype) for w in self.weights))
        return ExpertInputs(self.x_ND.astype(dtype), self.rows_E, weights, self.dy_ND.astype(dtype))


def place_on_one_shard(widths: Sequence[int]) -> expert_placement.Placement:
    return expert_placement.place_experts(widths, 1, "whole")


def make_inputs(
    widths: Sequence[int],
    rows: Sequence[int],
    num_rows: int,
    dim: int,
    dtype: Any = jnp.float32,
    weight_scale: float = 1.0,
) -> ExpertInputs:
    """Returns random inputs, with NaN in the padding rows of x and dy."""
    rng = np.random.default_rng(0)
    num_hidden = sum(widths)

    def make_weights(*shape: int) -> jax.Array:
        return jnp.asarray(weight_scale * rng.normal(size=shape), dtype)

    def make_rows() -> jax.Array:
        values = jnp.asarray(rng.normal(size=(num_rows, dim)), dtype)
        return values.at[sum(rows) :].set(jnp.nan)

    weights = expert_weights.ExpertWeights(
        w_gate=make_weights(dim, num_hidden),
        w_up=make_weights(dim, num_hidden),
        w_down=make_weights(num_hidden, dim),
    )
    x_ND = make_rows()
    dy_ND = make_rows()
    return ExpertInputs(x_ND, jnp.asarray(rows, jnp.int32), weights, dy_ND)


def compute_output_and_gradients(
    function: Callable[..., jax.Array], inputs: ExpertInputs
) -> list[jax.Array]:
    """Returns [y, dx, dw_gate, dw_up, dw_down] of y = function(x, weights)."""
    y_ND, pull_back = jax.vjp(function, inputs.x_ND, inputs.weights)
    return jax.tree.leaves((y_ND, pull_back(inputs.dy_ND)))


@functools.partial(jax.jit, static_argnums=1)
def run_reference(inputs: ExpertInputs, widths: tuple[int, ...]) -> list[jax.Array]:
    """Returns what `compute_output_and_gradients` returns, by the reference."""

    def reference(x: jax.Array, weights: expert_weights.ExpertWeights) -> jax.Array:
        return reference_ffn.reference(x, inputs.rows_E, weights, widths)

    return compute_output_and_gradients(reference, inputs)
