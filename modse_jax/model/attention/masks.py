"""TODO"""

import jax
import jax.numpy as jnp


def packed_mask(segments_BL: jax.Array, first: int = 0) -> jax.Array:
    """Rows `first` and later of mask_BLL: a token sees itself and earlier tokens of its own document. Padding (segment
    0) sees padding only, so that no row of the mask is empty (an empty row's softmax is NaN)."""
    L = segments_BL.shape[1]
    same_BLS = segments_BL[:, first:, None] == segments_BL[:, None, :]
    return same_BLS & (jnp.arange(first, L)[:, None] >= jnp.arange(L)[None, :])[None]
