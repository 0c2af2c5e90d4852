"""Causal self-attention with rotary positions, grouped-query heads, packed documents and a key/value cache.

Legend: B batch, L length, S cached or key length, D model, A query heads, G key/value heads, R = A / G, C head size,
Q queries that share a key head: R times those of a block of rows.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from modse_jax import chips
from modse_jax import mesh as meshes
from modse_jax.config import Model, UserError


class Place(NamedTuple):
    """Where the tokens of a pass stand: the same for every block, so worked out once, outside the scan."""
    positions_BL: jax.Array
    rotary_BL1C: tuple[jax.Array, jax.Array]    # sine and cosine, float32, [.., C / 2]; B may be 1
    segments_BL: jax.Array | None               # packed rows: document numbers, 0 = padding
    mask_BLS: jax.Array | None                  # with a cache: what each token may see of it


def packed_place(segments_BL: jax.Array, config: Model) -> Place:
    """Of packed rows. A document's positions start wherever it does: rotary attention sees differences only."""
    positions_1L = jnp.arange(segments_BL.shape[1])[None, :]
    return Place(positions_1L, rotary(positions_1L, config), segments_BL, None)


def cached_place(positions_BL: jax.Array, cache_length: int, config: Model) -> Place:
    """Of one document per row, behind a cache of S positions: a token sees everything at or before its own."""
    mask_BLS = jnp.arange(cache_length)[None, None, :] <= positions_BL[:, :, None]
    return Place(positions_BL, rotary(positions_BL, config), None, mask_BLS)


class Attention(nnx.Module):
    """(x_BLD, place, cache) -> (y_BLD, cache). `cache` is None, or (keys_BSGC, values_BSGC)."""

    def __init__(self, config: Model, mesh: Mesh | None, rngs: nnx.Rngs):
        self.kind, self.mesh = config.attention, mesh
        D, A = config.dim, config.num_heads
        G, C = config.num_kv_heads or A, config.dim // A
        self.dtype = jnp.dtype(config.dtype)

        def normal(shape, std):
            return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32))

        self.w_query, self.w_key = normal((D, A, C), D**-0.5), normal((D, G, C), D**-0.5)
        self.w_value = normal((D, G, C), D**-0.5)
        self.w_out = normal((A, C, D), D**-0.5 / (2 * config.num_layers) ** 0.5)

    def __call__(self, x_BLD, place, cache=None):
        A, G = self.w_query.shape[1], self.w_key.shape[1]
        w_in = jnp.concatenate([self._weight(n) for n in ("w_query", "w_key", "w_value")], axis=1)    # one product
        query_BLAC, key_BSGC, value_BSGC = jnp.split(jnp.einsum("bld,dac->blac", x_BLD, w_in), (A, A + G), axis=2)
        query_BLAC, key_BSGC = (rotate(t, *place.rotary_BL1C) for t in (query_BLAC, key_BSGC))
        if cache is None:
            out_BLAC = self._packed(query_BLAC, key_BSGC, value_BSGC, place.segments_BL)
        else:
            rows_B1 = jnp.arange(x_BLD.shape[0])[:, None]
            key_BSGC = cache[0].at[rows_B1, place.positions_BL].set(key_BSGC, mode="drop")
            value_BSGC = cache[1].at[rows_B1, place.positions_BL].set(value_BSGC, mode="drop")
            out_BLAC = attend(query_BLAC, key_BSGC, value_BSGC, place.mask_BLS)
        y_BLD = jnp.einsum("blac,acd->bld", out_BLAC, self._weight("w_out"))
        return y_BLD, (key_BSGC, value_BSGC)

    def _packed(self, query_BLAC, *rest):
        kind = chosen(self.kind, query_BLAC.shape, meshes.chip(self.mesh), str(self.dtype))
        function = {"blocks": attend_packed, "splash": attend_splash, "cudnn": attend_cudnn}[kind]
        if kind == "blocks" or self.mesh is None or self.mesh.size == 1:
            return function(query_BLAC, *rest)
        rows = meshes.spec(("batch",))    # XLA cannot cut a kernel
        return jax.shard_map(function, mesh=self.mesh, in_specs=(rows,) * 4, out_specs=rows,
                             check_vma=False)(query_BLAC, *rest)

    def _weight(self, name):
        return getattr(self, name)[...].astype(self.dtype)


def chosen(kind: str, shape: tuple[int, int, int, int], chip: str, dtype: str) -> str:
    """model.attention for queries of a shape [B, L, A, C] and type on a chip: "auto" is splash where it runs, and not
    cuDNN, which has not been timed. Raises UserError where what is asked for does not run."""
    able = chip in chips.TPUS and shape[1] % 128 == 0 and shape[3] % 128 == 0
    if kind == "splash" and not able:
        raise UserError(f"model.attention=splash needs a TPU ({', '.join(chips.TPUS)}), sequences and heads of a "
                        f"multiple of 128; this is {chip}, {shape[1]} and {shape[3]}; take model.attention=auto")
    if kind == "cudnn" and (chip not in chips.GPUS or dtype != "bfloat16" or shape[1] % 2 or shape[3] % 8
                            or shape[3] > 128):
        raise UserError(f"model.attention=cudnn needs one of {', '.join(chips.GPUS)}, model.dtype=bfloat16, sequences "
                        f"of an even length and heads of a multiple of 8 up to 128; this is {chip}, {dtype}, "
                        f"{shape[1]} and {shape[3]}; take model.attention=auto")
    return kind if kind != "auto" else "splash" if able else "blocks"


def attend_splash(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                  interpret: bool = False) -> jax.Array:
    """`attend_packed` by JAX's splash attention kernels for TPU. Differs in rounding: queries are scaled beforehand."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    _, L, A, C = query_BLAC.shape
    block = next(b for b in (512, 256, 128) if L % b == 0)
    sizes = splash.BlockSizes(**dict.fromkeys((
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
        "block_kv_dq"), block))
    kernel = splash.make_splash_mha(mask=splash.MultiHeadMask([splash.CausalMask((L, L))] * A), block_sizes=sizes,
                                    head_shards=1, q_seq_shards=1, interpret=interpret)
    scaled_BLAC = (query_BLAC.astype(jnp.float32) * C**-0.5).astype(query_BLAC.dtype)
    heads_first = (a.transpose(0, 2, 1, 3) for a in (scaled_BLAC, key_BLGC, value_BLGC))
    out_BALC = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(*heads_first, segments_BL)
    return out_BALC.transpose(0, 2, 1, 3).astype(query_BLAC.dtype)


def attend_cudnn(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                 implementation: str = "cudnn") -> jax.Array:
    """`attend_packed` by cuDNN's flash attention. Documents are kept apart by a mask, which it takes as a bias: with
    the bias's gradient, 4 L bytes a token."""
    same_B1LS = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(query_BLAC, key_BLGC, value_BLGC, mask=same_B1LS, is_causal=True,
                                        implementation=implementation)


def attend(query_BLAC: jax.Array, key_BSGC: jax.Array, value_BSGC: jax.Array, mask_BLS: jax.Array) -> jax.Array:
    """out_BLAC: softmax(q k / sqrt(C)) v over the keys the mask allows, softmax in float32; A / G queries share a key.

    All scores at once: decoding's way, and the reference of `attend_packed`.
    """
    B, L, A, C = query_BLAC.shape
    query_BLGRC = query_BLAC.reshape(B, L, key_BSGC.shape[2], -1, C)
    scores_BGRLS = jnp.einsum("blgrc,bsgc->bgrls", query_BLGRC, key_BSGC, preferred_element_type=jnp.float32)
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS * C**-0.5, -1e30)
    weights_BGRLS = jax.nn.softmax(scores_BGRLS, axis=-1).astype(value_BSGC.dtype)
    out_BLGRC = jnp.einsum("bgrls,bsgc->blgrc", weights_BGRLS, value_BSGC, preferred_element_type=jnp.float32)
    return out_BLGRC.reshape(query_BLAC.shape).astype(query_BLAC.dtype)


def attend_packed(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                  min_block: int = 128) -> jax.Array:
    """`attend` under packed_mask(segments), in at most eight blocks of queries, each over no more keys than precede
    it, the scores recomputed in the backward pass: neither the masked half of the work nor [L, L] scores kept.

    Written out rather than jax.nn.dot_product_attention: 1.8 times as fast forward and backward on 2 CPU cores.
    """
    B, L, A, C = query_BLAC.shape
    G, size = key_BLGC.shape[2], max(min_block, -(-L // 8))
    query_BGRLC = query_BLAC.reshape(B, L, G, A // G, C).transpose(0, 2, 3, 1, 4)
    key_BGLC, value_BGLC = key_BLGC.transpose(0, 2, 1, 3), value_BLGC.transpose(0, 2, 1, 3)
    out = []
    for first in range(0, L, size):
        stop = min(first + size, L)
        mask_BQS = jnp.tile(packed_mask(segments_BL[:, :stop], first), (1, A // G, 1))
        query_BGQC = query_BGRLC[:, :, :, first:stop].reshape(B, G, -1, C)
        out_BGQC = _block(query_BGQC, key_BGLC[:, :, :stop], value_BGLC[:, :, :stop], mask_BQS)
        out.append(out_BGQC.reshape(B, G, A // G, stop - first, C))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(query_BLAC.shape)


@jax.custom_vjp
def _block(query_BGQC, key_BGSC, value_BGSC, mask_BQS):
    return _block_forward(query_BGQC, key_BGSC, value_BGSC, mask_BQS)[0]


def _block_forward(query_BGQC, key_BGSC, value_BGSC, mask_BQS):
    scores_BGQS = _scores(query_BGQC, key_BGSC, mask_BQS)
    max_BGQ1 = jnp.max(scores_BGQS, axis=-1, keepdims=True)
    weights_BGQS = jnp.exp(scores_BGQS - max_BGQ1)
    sum_BGQ1 = jnp.sum(weights_BGQS, axis=-1, keepdims=True)
    out_BGQC = jnp.einsum("bgqs,bgsc->bgqc", weights_BGQS.astype(value_BGSC.dtype), value_BGSC,
                          preferred_element_type=jnp.float32)
    out_BGQC = (out_BGQC / sum_BGQ1).astype(query_BGQC.dtype)
    return out_BGQC, (query_BGQC, key_BGSC, value_BGSC, mask_BQS, max_BGQ1 + jnp.log(sum_BGQ1), out_BGQC)


def _block_backward(saved, dout_BGQC):
    query_BGQC, key_BGSC, value_BGSC, mask_BQS, lse_BGQ1, out_BGQC = saved
    dtype = query_BGQC.dtype
    weights_BGQS = jnp.exp(_scores(query_BGQC, key_BGSC, mask_BQS) - lse_BGQ1)
    inner_BGQ1 = jnp.sum(dout_BGQC.astype(jnp.float32) * out_BGQC.astype(jnp.float32), axis=-1, keepdims=True)
    dweights_BGQS = jnp.einsum("bgqc,bgsc->bgqs", dout_BGQC, value_BGSC, preferred_element_type=jnp.float32)
    dscores_BGQS = weights_BGQS * (dweights_BGQS - inner_BGQ1) * query_BGQC.shape[-1] ** -0.5
    dscores_BGQS, weights_BGQS = dscores_BGQS.astype(dtype), weights_BGQS.astype(dtype)
    return (jnp.einsum("bgqs,bgsc->bgqc", dscores_BGQS, key_BGSC), _sum_over_queries(query_BGQC, dscores_BGQS),
            _sum_over_queries(dout_BGQC, weights_BGQS), None)


def _sum_over_queries(a_BGQC, b_BGQS):
    """sum_q b a, [B, G, S, C], as its transpose: on CPU the product that transposes the large operand takes twice as
    long (LOG.md, 2026-11-25). The barrier keeps XLA from turning it back."""
    out_BGCS = jnp.einsum("bgqc,bgqs->bgcs", a_BGQC, b_BGQS)
    return jax.lax.optimization_barrier(out_BGCS).swapaxes(2, 3)


_block.defvjp(_block_forward, _block_backward)


def _scores(query_BGQC, key_BGSC, mask_BQS):
    scores_BGQS = jnp.einsum("bgqc,bgsc->bgqs", query_BGQC, key_BGSC, preferred_element_type=jnp.float32)
    return jnp.where(mask_BQS[:, None], scores_BGQS * query_BGQC.shape[-1] ** -0.5, -1e30)


def rotary(positions_BL: jax.Array, config: Model) -> tuple[jax.Array, jax.Array]:
    """(sine, cosine) [B, L, 1, C / 2] of the rotary angles (RoFormer), float32."""
    half = config.dim // config.num_heads // 2
    frequency_C = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None, :]
    return jnp.sin(angle_BL1C), jnp.cos(angle_BL1C)


def rotate(x_BLAC: jax.Array, sin_BL1C: jax.Array, cos_BL1C: jax.Array) -> jax.Array:
    """Rotary embedding (first half with second half, as Llama 2 checkpoints in common use), in float32."""
    first, second = jnp.split(x_BLAC.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate((first * cos_BL1C - second * sin_BL1C, second * cos_BL1C + first * sin_BL1C), axis=-1)
    return out.astype(x_BLAC.dtype)


def packed_mask(segments_BL: jax.Array, first: int = 0) -> jax.Array:
    """Rows `first` and later of mask_BLL: a token sees itself and earlier tokens of its own document. Padding (segment
    0) sees padding only, so that no row of the mask is empty (an empty row's softmax is NaN)."""
    L = segments_BL.shape[1]
    same_BLS = segments_BL[:, first:, None] == segments_BL[:, None, :]
    return same_BLS & (jnp.arange(first, L)[:, None] >= jnp.arange(L)[None, :])[None]
