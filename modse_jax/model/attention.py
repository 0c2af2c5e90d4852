"""Causal self-attention with rotary positions, grouped-query heads, packed documents and a key/value cache.

Legend: B batch, L length, S cached or key length, D model, A query heads, G key/value heads, R = A / G, C head size.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from modse_jax.config import Model


class Attention(nnx.Module):
    """(x_BLD, positions_BL, mask_BLS, cache) -> (y_BLD, cache). `cache` is None, or (keys_BSGC, values_BSGC)."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        D, A = config.dim, config.num_heads
        G, C = config.num_kv_heads or A, config.dim // A
        self.base, self.dtype = config.rope_base, jnp.dtype(config.dtype)

        def normal(shape, std):
            return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32))

        self.w_query, self.w_key = normal((D, A, C), D**-0.5), normal((D, G, C), D**-0.5)
        self.w_value = normal((D, G, C), D**-0.5)
        self.w_out = normal((A, C, D), D**-0.5 / (2 * config.num_layers) ** 0.5)

    def __call__(self, x_BLD, positions_BL, mask_BLS, cache=None):
        query_BLAC = rotate(jnp.einsum("bld,dac->blac", x_BLD, self._weight("w_query")), positions_BL, self.base)
        key_BSGC = rotate(jnp.einsum("bld,dgc->blgc", x_BLD, self._weight("w_key")), positions_BL, self.base)
        value_BSGC = jnp.einsum("bld,dgc->blgc", x_BLD, self._weight("w_value"))
        if cache is not None:
            rows_B1 = jnp.arange(x_BLD.shape[0])[:, None]
            key_BSGC = cache[0].at[rows_B1, positions_BL].set(key_BSGC, mode="drop")
            value_BSGC = cache[1].at[rows_B1, positions_BL].set(value_BSGC, mode="drop")
        out_BLAC = attend(query_BLAC, key_BSGC, value_BSGC, mask_BLS)
        y_BLD = jnp.einsum("blac,acd->bld", out_BLAC, self._weight("w_out"))
        return y_BLD, (key_BSGC, value_BSGC)

    def _weight(self, name):
        return getattr(self, name)[...].astype(self.dtype)


def attend(query_BLAC: jax.Array, key_BSGC: jax.Array, value_BSGC: jax.Array, mask_BLS: jax.Array) -> jax.Array:
    """out_BLAC: softmax(q k / sqrt(C)) v over the keys the mask allows, softmax in float32; A / G queries share a key.

    Written out rather than jax.nn.dot_product_attention: 1.6 times as fast forward and backward on 2 CPU cores.
    """
    B, L, A, C = query_BLAC.shape
    S, G = key_BSGC.shape[1:3]
    query_BGRLC = query_BLAC.reshape(B, L, G, A // G, C).transpose(0, 2, 3, 1, 4)
    key_BGSC, value_BGSC = key_BSGC.transpose(0, 2, 1, 3), value_BSGC.transpose(0, 2, 1, 3)
    scores_BGRLS = jnp.einsum("bgrlc,bgsc->bgrls", query_BGRLC, key_BGSC, preferred_element_type=jnp.float32)
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS * C**-0.5, -1e30)
    weights_BGRLS = jnp.exp(scores_BGRLS - jax.lax.stop_gradient(jnp.max(scores_BGRLS, axis=-1, keepdims=True)))
    out_BGRLC = jnp.einsum("bgrls,bgsc->bgrlc", weights_BGRLS.astype(value_BGSC.dtype), value_BGSC,
                           preferred_element_type=jnp.float32)
    out_BGRLC = out_BGRLC / jnp.sum(weights_BGRLS, axis=-1, keepdims=True)
    return out_BGRLC.transpose(0, 3, 1, 2, 4).reshape(B, L, A, C).astype(query_BLAC.dtype)


def rotate(x_BLAC: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
    """Rotary embedding (RoFormer; first half with second half, as Llama 2 checkpoints in common use), in float32."""
    half = x_BLAC.shape[-1] // 2
    frequency_C = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None, :]
    sin, cos = jnp.sin(angle_BL1C), jnp.cos(angle_BL1C)
    first, second = jnp.split(x_BLAC.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return out.astype(x_BLAC.dtype)


def packed_mask(segments_BL: jax.Array) -> jax.Array:
    """mask_BLL: a token sees itself and earlier tokens of its own document. Padding (segment 0) sees padding only, so
    that no row of the mask is empty (an empty row's softmax is NaN)."""
    L = segments_BL.shape[1]
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    return same_BLL & jnp.tril(jnp.ones((L, L), bool))[None]


def cached_mask(positions_BL: jax.Array, cache_length: int) -> jax.Array:
    """mask_BLS over a cache of one document per row: everything at or before a token's own position."""
    return jnp.arange(cache_length)[None, None, :] <= positions_BL[:, :, None]
