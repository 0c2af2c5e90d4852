"""TODO"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from modse_jax.moe import expert_widths
from modse_jax.moe.experts.expert_weights import ExpertWeights


def reference(
    x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, widths: Sequence[int]
) -> jax.Array:
    """Every expert over every row, and a select: E times the work, nothing to get wrong."""
    end_E = jnp.cumsum(rows_E)
    row_N1 = jnp.arange(x_ND.shape[0])[:, None]
    y_ND = jnp.zeros_like(x_ND)
    for expert, (first, width) in enumerate(zip(expert_widths.offsets(widths), widths)):
        mine_N1 = (row_N1 >= end_E[expert] - rows_E[expert]) & (row_N1 < end_E[expert])
        x_mine_ND = jnp.where(
            mine_N1, x_ND, 0
        )  # before the products: NaN times a zero gradient is NaN
        gate_NH = x_mine_ND @ weights.w_gate[:, first : first + width]
        up_NH = x_mine_ND @ weights.w_up[:, first : first + width]
        y_mine_ND = (jax.nn.silu(gate_NH) * up_NH) @ weights.w_down[first : first + width]
        y_ND = jnp.where(mine_N1, y_mine_ND, y_ND)
    return y_ND
