"""The weights of the experts of one layer, or of one shard of them."""

from typing import NamedTuple

import jax


class ExpertWeights(NamedTuple):
    """SwiGLU weights of all experts, side by side along one flat hidden axis H.

    H is the sum of the experts' widths, so that no memory is spent on padding.
    """

    w_gate: jax.Array  # [D, H]
    w_up: jax.Array  # [D, H]
    w_down: jax.Array  # [H, D]
