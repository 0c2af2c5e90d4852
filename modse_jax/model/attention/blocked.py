"""Attention over packed rows in blocks of queries, in plain XLA, with a hand-written gradient.

The queries of a row are divided into at most 8 blocks. A block is only multiplied with keys up to
its own end, because later keys are masked by causality; this leaves out about half of the work.
Scores are stored as [keys, queries]: then no matmul has to transpose a large operand, which halves
its speed in XLA for CPU. On CPU, forward and backward take about half of the time of
`jax.nn.dot_product_attention` (126-149 ms against 266 ms, LOG.md, 2026-11-22). The file can be
deleted when that function, under XLA, is as fast; `reference.attend` is the plain version.

Legend: B batch, L length, S keys up to the end of a block, A query heads, G key/value heads,
R = A / G query heads that share a key head, C head size, Q = R * queries of a block.

    name      axes                                    used for
    x_BLAC    as the layer makes them                 queries, output and their gradients
    x_BLGC    as the layer makes them                 keys, values and their gradients
    x_BGCRL   transposed; the length is the last      queries, output: sliced into blocks
    x_BGCQ    a block of x_BGCRL, R and L merged      right operand of scores, output, dweights
    x_BGRLC   transposed; the head size is the last   queries, dout: sliced into blocks
    x_BGQC    a block of x_BGRLC, R and L merged      right operand of dkey, dvalue
    x_BGSC    keys or values, transposed              left operand of scores, dweights
    x_BGCS    keys or values, transposed              left operand of output, dquery
    x_BGSQ    scores of a block                       scores, softmax weights, their gradients

The matmuls of a block, in these layouts:

    scores_BGSQ   = key_BGSC   query_BGCQ           dweights_BGSQ = value_BGSC   dout_BGCQ
    out_BGCQ      = value_BGCS weights_BGSQ         dquery_BGCQ   = key_BGCS     dscores_BGSQ
                                                    dkey_BGSC     = dscores_BGSQ query_BGQC
                                                    dvalue_BGSC   = weights_BGSQ dout_BGQC
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.model.attention.masks import packed_mask

MAX_BLOCKS = 8


class SavedForBackward(NamedTuple):
    """The arrays that the forward pass saves for the backward pass."""

    query_BLAC: jax.Array
    key_BLGC: jax.Array
    value_BLGC: jax.Array
    segments_BL: jax.Array
    out_BLAC: jax.Array | None  # in float32; None in other types
    sum_BLA1: jax.Array  # denominators of the softmax
    blocks: list[jax.Array]  # per block: softmax weights if saved, else the maximum score per query


class BlockGradients(NamedTuple):
    """The contribution of one block of queries to the gradients, float32."""

    dquery_BGCRL: jax.Array
    dkey_BGSC: jax.Array
    dvalue_BGSC: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_packed(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    save_weights: bool = False,
    min_block: int = 128,
) -> jax.Array:
    """Returns causal attention within every document of packed rows, [B, L, A, C].

    The result is that of `reference.attend` with the mask `packed_mask(segments_BL)`.

    Args:
        query_BLAC, key_BLGC, value_BLGC: queries, keys and values, with rotary positions.
        segments_BL: the document number of every token, 0 for padding.
        save_weights: saves the softmax weights for the backward pass, about L * L / 2 numbers per
            head; otherwise they are recomputed there.
        min_block: the smallest number of queries of a block; there are at most MAX_BLOCKS blocks.
    """
    out_BLAC, _ = _attend_forward(
        query_BLAC, key_BLGC, value_BLGC, segments_BL, save_weights, min_block
    )
    return out_BLAC


def _attend_forward(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    save_weights: bool,
    min_block: int,
) -> tuple[jax.Array, SavedForBackward]:
    num_groups = key_BLGC.shape[2]
    query_BGCRL = _blac_to_bgcrl(scale_queries(query_BLAC), num_groups)
    key_BGSC = _blgc_to_bgsc(key_BLGC)
    value_BGCS = _blgc_to_bgcs(value_BLGC)
    shared = query_BGCRL.shape[3]
    out_blocks, sum_blocks, saved_blocks = [], [], []
    for first, stop in block_ranges(query_BLAC.shape[1], min_block):
        scores_BGSQ = _compute_scores(
            query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], segments_BL, first
        )
        max_BG1Q = jnp.max(scores_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = jnp.exp(scores_BGSQ - max_BG1Q)
        sum_BG1Q = jnp.sum(weights_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = weights_BGSQ.astype(value_BLGC.dtype)
        out_BGCQ = _matmul("bgcs,bgsq->bgcq", value_BGCS[..., :stop], weights_BGSQ) / sum_BG1Q
        out_blocks.append(_bgcq_to_bgcrl(out_BGCQ, shared))
        sum_blocks.append(_bgcq_to_bgcrl(sum_BG1Q, shared))
        saved_blocks.append(weights_BGSQ if save_weights else max_BG1Q)
    out_BLAC = _bgcrl_to_blac(jnp.concatenate(out_blocks, axis=4))
    sum_BLA1 = _bgcrl_to_blac(jnp.concatenate(sum_blocks, axis=4))
    out_BLAC = out_BLAC.astype(query_BLAC.dtype)
    # The gradient of the scores is weights * (dweights - inner), where inner is the mean of
    # dweights, weighted by the weights. In exact arithmetic that is the sum over C of dout * out,
    # which costs less. But if `out` is rounded to bfloat16, the gradients of the scores no longer
    # sum to 0 over the keys. The rest is multiplied by the mean key, which can be larger than the
    # gradient of the queries itself (Qiu and Yao, arXiv 2510.04212). So `out` is only used in
    # float32.
    saved = SavedForBackward(
        query_BLAC,
        key_BLGC,
        value_BLGC,
        segments_BL,
        out_BLAC if out_BLAC.dtype == jnp.float32 else None,
        sum_BLA1,
        saved_blocks,
    )
    return out_BLAC, saved


def _attend_backward(
    save_weights: bool, min_block: int, saved: SavedForBackward, dout_BLAC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    dtype = saved.query_BLAC.dtype
    num_groups = saved.key_BLGC.shape[2]
    # The saved softmax weights are not normalized. The output gradient is divided by the
    # denominators instead, because it has fewer elements than the weights.
    dout_BLAC = (dout_BLAC / saved.sum_BLA1).astype(dtype)
    inner_BG1RL = None
    if saved.out_BLAC is not None:
        inner_BLA1 = jnp.sum(dout_BLAC * saved.out_BLAC, axis=3, keepdims=True)
        inner_BG1RL = _blac_to_bgcrl(inner_BLA1, num_groups)
    query_BLAC = scale_queries(saved.query_BLAC)
    query_BGRLC = _blac_to_bgrlc(query_BLAC, num_groups)
    query_BGCRL = _blac_to_bgcrl(query_BLAC, num_groups)
    dout_BGRLC = _blac_to_bgrlc(dout_BLAC, num_groups)
    dout_BGCRL = _blac_to_bgcrl(dout_BLAC, num_groups)
    key_BGSC = _blgc_to_bgsc(saved.key_BLGC)
    key_BGCS = _blgc_to_bgcs(saved.key_BLGC)
    value_BGSC = _blgc_to_bgsc(saved.value_BLGC)
    gradients = []
    ranges = block_ranges(query_BLAC.shape[1], min_block)
    for (first, stop), saved_block in zip(ranges, saved.blocks):
        weights_BGSQ = saved_block
        if not save_weights:
            scores_BGSQ = _compute_scores(
                query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], saved.segments_BL, first
            )
            weights_BGSQ = jnp.exp(scores_BGSQ - saved_block).astype(dtype)
        gradients.append(
            _block_gradients(
                weights_BGSQ,
                _bgcrl_to_bgcq(dout_BGCRL[..., first:stop]),
                None if inner_BG1RL is None else inner_BG1RL[..., first:stop],
                query_BGRLC[:, :, :, first:stop],
                dout_BGRLC[:, :, :, first:stop],
                key_BGCS[..., :stop],
                value_BGSC[:, :, :stop],
            )
        )
    dquery_BGCRL = jnp.concatenate([block.dquery_BGCRL for block in gradients], axis=4)
    dquery_BLAC = scale_queries(_bgcrl_to_blac(dquery_BGCRL))
    dkey_BLGC = _bgsc_to_blgc(_sum_of_prefixes([block.dkey_BGSC for block in gradients]))
    dvalue_BLGC = _bgsc_to_blgc(_sum_of_prefixes([block.dvalue_BGSC for block in gradients]))
    return dquery_BLAC.astype(dtype), dkey_BLGC.astype(dtype), dvalue_BLGC.astype(dtype), None


attend_packed.defvjp(_attend_forward, _attend_backward)


def _block_gradients(
    weights_BGSQ: jax.Array,
    dout_BGCQ: jax.Array,
    inner_BG1RL: jax.Array | None,
    query_BGRLC: jax.Array,
    dout_BGRLC: jax.Array,
    key_BGCS: jax.Array,
    value_BGSC: jax.Array,
) -> BlockGradients:
    """Returns the gradients of one block of queries with respect to its queries, keys and values.

    Args:
        weights_BGSQ: softmax weights before the division by their sum.
        dout_BGCQ, dout_BGRLC: the output gradient divided by that sum, in two layouts.
        inner_BG1RL: sum over C of the divided output gradient times the output; None computes the
            same from the softmax weights.
        query_BGRLC: the queries of the block.
        key_BGCS, value_BGSC: keys and values up to the end of the block.
    """
    dweights_BGSQ = _matmul("bgsc,bgcq->bgsq", value_BGSC, dout_BGCQ)
    if inner_BG1RL is None:
        inner_BG1Q = _weighted_mean(weights_BGSQ, dweights_BGSQ)
    else:
        inner_BG1Q = _bgcrl_to_bgcq(inner_BG1RL)
    dscores_BGSQ = weights_BGSQ * (dweights_BGSQ - inner_BG1Q)
    dscores_BGSQ = dscores_BGSQ.astype(query_BGRLC.dtype)
    dquery_BGCQ = _matmul("bgcs,bgsq->bgcq", key_BGCS, dscores_BGSQ)
    return BlockGradients(
        dquery_BGCRL=_bgcq_to_bgcrl(dquery_BGCQ, shared=query_BGRLC.shape[2]),
        dkey_BGSC=_matmul("bgsq,bgqc->bgsc", dscores_BGSQ, _bgrlc_to_bgqc(query_BGRLC)),
        dvalue_BGSC=_matmul("bgsq,bgqc->bgsc", weights_BGSQ, _bgrlc_to_bgqc(dout_BGRLC)),
    )


def _weighted_mean(weights_BGSQ: jax.Array, values_BGSQ: jax.Array) -> jax.Array:
    """Returns the mean of values over the keys S with the given weights, [B, G, 1, Q] in float32.

    The differences to this mean, multiplied by the weights, sum to 0 over the keys up to rounding
    in float32, even if the weights are rounded to bfloat16.
    """
    weights_BGSQ = weights_BGSQ.astype(jnp.float32)
    sum_BG1Q = jnp.sum(weights_BGSQ, axis=2, keepdims=True)
    return jnp.sum(weights_BGSQ * values_BGSQ, axis=2, keepdims=True) / sum_BG1Q


def block_ranges(length: int, min_block: int) -> list[tuple[int, int]]:
    """Divides `length` queries into at most MAX_BLOCKS blocks; returns (first, stop) of each."""
    size = max(min_block, -(-length // MAX_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def scale_queries(query_BLAC: jax.Array) -> jax.Array:
    """Returns the queries times 1 / sqrt(C), in their type.

    They are scaled in float32: 1 / sqrt(C) is usually not representable in bfloat16, and the
    rounding error would bias every score in the same direction.
    """
    scaled_BLAC = query_BLAC.astype(jnp.float32) * query_BLAC.shape[3] ** -0.5
    return scaled_BLAC.astype(query_BLAC.dtype)


def _compute_scores(
    query_BGCRL: jax.Array, key_BGSC: jax.Array, segments_BL: jax.Array, first: int
) -> jax.Array:
    """Returns the scores q k of a block, scores_BGSQ in float32; -1e30 where they are masked.

    Args:
        query_BGCRL: the queries of the block, scaled.
        key_BGSC: the keys up to the end of the block.
        segments_BL: the document number of every token of the rows.
        first: the position of the first query of the block.
    """
    S = key_BGSC.shape[2]
    mask_BLS = packed_mask(segments_BL[:, :S], first)
    mask_BSQ = jnp.tile(mask_BLS.swapaxes(1, 2), (1, 1, query_BGCRL.shape[3]))
    mask_B1SQ = mask_BSQ[:, None]
    scores_BGSQ = _matmul("bgsc,bgcq->bgsq", key_BGSC, _bgcrl_to_bgcq(query_BGCRL))
    return jnp.where(mask_B1SQ, scores_BGSQ, -1e30)


def _sum_of_prefixes(parts: Sequence[jax.Array]) -> jax.Array:
    """Sums the gradients of keys (or values) over the blocks of queries, [B, G, L, C].

    Args:
        parts: for each block of queries, the gradients of the keys up to the end of the block,
            [B, G, S, C] with rising S. Keys after the end of a block get none from it.
    """
    ends = [0] + [part.shape[2] for part in parts]
    sums = []
    for i, (first, stop) in enumerate(zip(ends, ends[1:])):
        sums.append(functools.reduce(jnp.add, [part[:, :, first:stop] for part in parts[i:]]))
    return jnp.concatenate(sums, axis=2)


def _matmul(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _blac_to_bgcrl(x_BLAC: jax.Array, num_groups: int) -> jax.Array:
    B, L, A, C = x_BLAC.shape
    x_BLGRC = x_BLAC.reshape(B, L, num_groups, A // num_groups, C)
    return x_BLGRC.transpose(0, 2, 4, 3, 1)


def _blac_to_bgrlc(x_BLAC: jax.Array, num_groups: int) -> jax.Array:
    B, L, A, C = x_BLAC.shape
    x_BLGRC = x_BLAC.reshape(B, L, num_groups, A // num_groups, C)
    return x_BLGRC.transpose(0, 2, 3, 1, 4)


def _bgcrl_to_blac(x_BGCRL: jax.Array) -> jax.Array:
    B, G, C, R, L = x_BGCRL.shape
    return x_BGCRL.transpose(0, 4, 1, 3, 2).reshape(B, L, G * R, C)


def _bgcrl_to_bgcq(x_BGCRL: jax.Array) -> jax.Array:
    B, G, C, R, L = x_BGCRL.shape
    return x_BGCRL.reshape(B, G, C, R * L)


def _bgcq_to_bgcrl(x_BGCQ: jax.Array, shared: int) -> jax.Array:
    """Undoes _bgcrl_to_bgcq; `shared` is the number R of query heads that share a key head."""
    return x_BGCQ.reshape(*x_BGCQ.shape[:3], shared, -1)


def _bgrlc_to_bgqc(x_BGRLC: jax.Array) -> jax.Array:
    B, G, R, L, C = x_BGRLC.shape
    return x_BGRLC.reshape(B, G, R * L, C)


def _blgc_to_bgsc(x_BLGC: jax.Array) -> jax.Array:
    return x_BLGC.transpose(0, 2, 1, 3)


def _blgc_to_bgcs(x_BLGC: jax.Array) -> jax.Array:
    return x_BLGC.transpose(0, 2, 3, 1)


def _bgsc_to_blgc(x_BGSC: jax.Array) -> jax.Array:
    return x_BGSC.transpose(0, 2, 1, 3)
