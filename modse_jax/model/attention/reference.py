"""TODO"""

import jax
import jax.numpy as jnp


def attend(
    query_BLAC: jax.Array, key_BSGC: jax.Array, value_BSGC: jax.Array, mask_BLS: jax.Array
) -> jax.Array:
    """out_BLAC: softmax(q k / sqrt(C)) v over the keys the mask allows, softmax in float32; A / G queries share a key.

    All scores at once: decoding's way, and the reference of `attend_packed`.
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
