"""The tuple of expert weights that all backends of the expert FFN take."""

from typing import NamedTuple

import jax


class ExpertWeights(NamedTuple):
    """SwiGLU weights of all experts of a layer, or of those that one shard of it holds.

    The hidden units of the experts lie one after another on one flat hidden axis H. H is the sum of
    the experts' widths, so no memory is spent on padding to the widest expert.
    """

    w_gate: jax.Array  # [D, H]
    w_up: jax.Array  # [D, H]
    w_down: jax.Array  # [H, D]
