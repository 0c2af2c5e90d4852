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
    """Returns y_ND, the output of every row's own expert.

    Every expert runs on all rows, which takes E times the necessary FLOPs, and of its outputs those
    of its own rows are selected.

    Args:
      x_ND: routed tokens sorted by expert, then padding rows, whose outputs are 0.
      rows_E: the number of rows of each expert.
      weights: the weights of all experts.
      widths: the number of hidden units of each expert.
    """
    end_E = jnp.cumsum(rows_E)
    row_N1 = jnp.arange(x_ND.shape[0])[:, None]
    y_ND = jnp.zeros_like(x_ND)
    for expert, (first, width) in enumerate(zip(expert_widths.offsets(widths), widths)):
        is_own_N1 = (row_N1 >= end_E[expert] - rows_E[expert]) & (row_N1 < end_E[expert])
        # Padding rows may hold NaN. The input is masked before the matmuls, because in the backward
        # pass a NaN times a gradient of 0 would be NaN.
        x_own_ND = jnp.where(is_own_N1, x_ND, 0)
        gate_NW = x_own_ND @ weights.w_gate[:, first : first + width]
        up_NW = x_own_ND @ weights.w_up[:, first : first + width]
        y_own_ND = (jax.nn.silu(gate_NW) * up_NW) @ weights.w_down[first : first + width]
        y_ND = jnp.where(is_own_N1, y_own_ND, y_ND)
    return y_ND
