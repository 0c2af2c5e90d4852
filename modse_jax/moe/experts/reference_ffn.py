"""The reference implementation of the expert FFN: slow and simple.

Legend: N routed tokens, D model dimension, E experts, W width of one expert.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from modse_jax.moe import expert_widths
from modse_jax.moe.experts.expert_weights import ExpertWeights


def reference(
    x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, widths: Sequence[int]
) -> jax.Array:
    """Returns y_ND by running every expert on every row and selecting the expert's own rows.

    This takes E times the necessary FLOPs. Padding rows give 0.
    """
    end_E = jnp.cumsum(rows_E)
    row_N1 = jnp.arange(x_ND.shape[0])[:, None]
    y_ND = jnp.zeros_like(x_ND)
    for expert, (first, width) in enumerate(zip(expert_widths.offsets(widths), widths)):
        is_own_N1 = (row_N1 >= end_E[expert] - rows_E[expert]) & (row_N1 < end_E[expert])
        # The input is masked before the matmuls, because a NaN times a zero gradient is a NaN.
        x_own_ND = jnp.where(is_own_N1, x_ND, 0)
        gate_NW = x_own_ND @ weights.w_gate[:, first : first + width]
        up_NW = x_own_ND @ weights.w_up[:, first : first + width]
        y_own_ND = (jax.nn.silu(gate_NW) * up_NW) @ weights.w_down[first : first + width]
        y_ND = jnp.where(is_own_N1, y_own_ND, y_ND)
    return y_ND
