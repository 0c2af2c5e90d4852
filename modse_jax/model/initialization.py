"""The distribution of initial weights outside the MoE layer."""

import jax
import jax.numpy as jnp
from flax import nnx


def draw_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """Returns normal numbers truncated at 3 standard deviations, float32."""
    return std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
