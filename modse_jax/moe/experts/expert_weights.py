"""TODO"""

from typing import NamedTuple

import jax


class ExpertWeights(NamedTuple):
    w_gate: jax.Array  # [D, H]
    w_up: jax.Array  # [D, H]
    w_down: jax.Array  # [H, D]
