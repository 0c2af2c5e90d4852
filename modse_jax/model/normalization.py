"""RMSNorm, the normalization of every branch, of queries and keys, and before the logits.

Legend: B batch, L length, D the normalized dimension.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """Root mean square layer normalization (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.eps = eps

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns the normalized activations in the type of x_BLD."""
        dtype = x_BLD.dtype
        x_BLD = x_BLD.astype(jnp.float32)
        mean_square_BL1 = jnp.mean(x_BLD * x_BLD, axis=-1, keepdims=True)
        x_BLD = x_BLD * jax.lax.rsqrt(mean_square_BL1 + self.eps)
        return (x_BLD * self.scale[...][None, None, :]).astype(dtype)
