"""The attention mask of packed rows.

Legend: B batch, L query length, S key length.
"""

import jax
import jax.numpy as jnp


def packed_mask(segments_BL: jax.Array, first: int = 0) -> jax.Array:
    """Returns the mask [B, L - first, L] of packed rows; True where a query may attend to a key.

    A token attends to itself and to earlier tokens of its document. Padding (segment 0) attends to
    padding only, so that no row of the mask is empty: the softmax of an empty row is NaN.

    Args:
        segments_BL: the document number of every token, 0 for padding.
        first: the position of the first query; earlier queries are left out.
    """
    L = segments_BL.shape[1]
    is_same_document_BLS = segments_BL[:, first:, None] == segments_BL[:, None, :]
    is_earlier_LS = jnp.arange(first, L)[:, None] >= jnp.arange(L)[None, :]
    return is_same_document_BLS & is_earlier_LS[None]
