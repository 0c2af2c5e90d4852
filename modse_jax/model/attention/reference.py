"""Plain attention, which computes all scores in one matmul.

Decoding uses it, and the other implementations are tested against it.

Legend: B batch, L query length, S key length, A query heads, G key/value heads, R = A / G query
heads that share a key head, C head size.
"""

import jax
import jax.numpy as jnp


def attend(
    query_BLAC: jax.Array, key_BSGC: jax.Array, value_BSGC: jax.Array, mask_BLS: jax.Array
) -> jax.Array:
    """Returns softmax(q k / sqrt(C)) v over the keys that the mask allows, [B, L, A, C].

    The softmax is computed in float32, and the result has the dtype of the queries. A / G query
    heads share a key head.

    Args:
        query_BLAC, key_BSGC, value_BSGC: queries, keys and values, with rotary positions.
        mask_BLS: True where a query may attend to a key.
    """
    B, L, A, C = query_BLAC.shape
    query_BLGRC = query_BLAC.reshape(B, L, key_BSGC.shape[2], -1, C)
    scores_BGRLS = jnp.einsum(
        "blgrc,bsgc->bgrls", query_BLGRC, key_BSGC, preferred_element_type=jnp.float32
    )
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS * C**-0.5, -1e30)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1).astype(value_BSGC.dtype)
    out_BLGRC = jnp.einsum(
        "bgrls,bsgc->blgrc", weights_BGRLS, value_BSGC, preferred_element_type=jnp.float32
    )
    return out_BLGRC.reshape(query_BLAC.shape).astype(query_BLAC.dtype)
