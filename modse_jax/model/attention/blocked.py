"""TODO"""

import functools

import jax
import jax.numpy as jnp

from modse_jax.model.attention.masks import packed_mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_packed(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    keep: bool = False,
    min_block: int = 128,
) -> jax.Array:
    """`attend` under packed_mask(segments), in at most eight blocks of queries, each over no more keys than precede
    it. keep: softmax weights, half of [L, L] a head, for the backward pass; else scores are computed again there.

    Scores stand as [keys, queries]: no product then has to turn a large operand around, which XLA for CPU does at half
    speed. Written out rather than jax.nn.dot_product_attention: LOG.md, 2026-11-22.
    """
    return attend_forward(query_BLAC, key_BLGC, value_BLGC, segments_BL, keep, min_block)[0]


def attend_forward(query_BLAC, key_BLGC, value_BLGC, segments_BL, keep, min_block):
    query_BGCRL = _across(scale_queries(query_BLAC), key_BLGC.shape[2])
    key_BGSC, value_BGCS = key_BLGC.transpose(0, 2, 1, 3), value_BLGC.transpose(0, 2, 3, 1)
    out, sums, kept = [], [], []
    for first, stop in _blocks(query_BLAC.shape[1], min_block):
        scores_BGSQ = _scores(
            query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], segments_BL, first
        )
        max_BG1Q = jnp.max(scores_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = jnp.exp(scores_BGSQ - max_BG1Q)
        sum_BG1Q = jnp.sum(weights_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = weights_BGSQ.astype(value_BLGC.dtype)
        out_BGCQ = (
            jnp.einsum(
                "bgcs,bgsq->bgcq",
                value_BGCS[..., :stop],
                weights_BGSQ,
                preferred_element_type=jnp.float32,
            )
            / sum_BG1Q
        )
        out.append(_apart(out_BGCQ, query_BGCRL))
        sums.append(_apart(sum_BG1Q, query_BGCRL))
        kept.append(weights_BGSQ if keep else max_BG1Q)
    out_BLAC, sum_BLA1 = (_from_across(jnp.concatenate(parts, axis=4)) for parts in (out, sums))
    out_BLAC = out_BLAC.astype(query_BLAC.dtype)
    return out_BLAC, (query_BLAC, key_BLGC, value_BLGC, segments_BL, out_BLAC, sum_BLA1, kept)


def attend_backward(keep, min_block, saved, dout_BLAC):
    query_BLAC, key_BLGC, value_BLGC, segments_BL, out_BLAC, sum_BLA1, kept = saved
    G, C, dtype = *key_BLGC.shape[2:], query_BLAC.dtype
    dout_BLAC = (dout_BLAC / sum_BLA1).astype(dtype)  # once, in place of every weight
    inner_BLA1 = jnp.sum(
        dout_BLAC.astype(jnp.float32) * out_BLAC.astype(jnp.float32), axis=3, keepdims=True
    )
    inner_BG1RL = _across(inner_BLA1, G)
    query_BGRLC, query_BGCRL = (
        _down(scale_queries(query_BLAC), G),
        _across(scale_queries(query_BLAC), G),
    )
    dout_BGRLC, dout_BGCRL = _down(dout_BLAC, G), _across(dout_BLAC, G)
    key_BGSC, key_BGCS = key_BLGC.transpose(0, 2, 1, 3), key_BLGC.transpose(0, 2, 3, 1)
    value_BGSC = value_BLGC.transpose(0, 2, 1, 3)
    dquery, dkey, dvalue = [], [], []
    for (first, stop), of_block in zip(_blocks(query_BLAC.shape[1], min_block), kept):
        weights_BGSQ = (
            of_block
            if keep
            else jnp.exp(
                _scores(query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], segments_BL, first)
                - of_block
            ).astype(dtype)
        )
        dweights_BGSQ = jnp.einsum(
            "bgsc,bgcq->bgsq",
            value_BGSC[:, :, :stop],
            _flat(dout_BGCRL[..., first:stop]),
            preferred_element_type=jnp.float32,
        )
        dscores_BGSQ = (
            weights_BGSQ * (dweights_BGSQ - _flat(inner_BG1RL[..., first:stop]))
        ).astype(dtype)
        dquery.append(
            _apart(
                jnp.einsum(
                    "bgcs,bgsq->bgcq",
                    key_BGCS[..., :stop],
                    dscores_BGSQ,
                    preferred_element_type=jnp.float32,
                ),
                query_BGCRL,
            )
        )
        for parts, a_BGSQ, b_BGRLC in (
            (dkey, dscores_BGSQ, query_BGRLC),
            (dvalue, weights_BGSQ, dout_BGRLC),
        ):
            b_BGQC = b_BGRLC[:, :, :, first:stop].reshape(*key_BGSC.shape[:2], -1, C)
            parts.append(
                jnp.einsum("bgsq,bgqc->bgsc", a_BGSQ, b_BGQC, preferred_element_type=jnp.float32)
            )
    dquery_BLAC = scale_queries(_from_across(jnp.concatenate(dquery, axis=4)))
    dkey_BLGC, dvalue_BLGC = (
        _sum_of_prefixes(parts).transpose(0, 2, 1, 3) for parts in (dkey, dvalue)
    )
    return dquery_BLAC.astype(dtype), dkey_BLGC.astype(dtype), dvalue_BLGC.astype(dtype), None


attend_packed.defvjp(attend_forward, attend_backward)


def _blocks(length, min_block):
    size = max(min_block, -(-length // 8))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def scale_queries(query_BLAC):
    """In float32: most scales are no numbers of bfloat16, and all scores would be off alike."""
    return (query_BLAC.astype(jnp.float32) * query_BLAC.shape[3] ** -0.5).astype(query_BLAC.dtype)


def _across(x_BLAC, groups):
    """x_BGCRL. Queries that share a key head stand side by side in a block of them: R, then L."""
    B, L, A, C = x_BLAC.shape
    return x_BLAC.reshape(B, L, groups, A // groups, C).transpose(0, 2, 4, 3, 1)


def _down(x_BLAC, groups):
    """x_BGRLC."""
    B, L, A, C = x_BLAC.shape
    return x_BLAC.reshape(B, L, groups, A // groups, C).transpose(0, 2, 3, 1, 4)


def _from_across(x_BGCRL):
    B, G, C, R, L = x_BGCRL.shape
    return x_BGCRL.transpose(0, 4, 1, 3, 2).reshape(B, L, G * R, C)


def _flat(x_BGCRL):
    """x_BGCQ."""
    return x_BGCRL.reshape(*x_BGCRL.shape[:3], -1)


def _apart(x_BGCQ, like_BGCRL):
    """x_BGCRL: the inverse of _flat."""
    return x_BGCQ.reshape(*x_BGCQ.shape[:3], like_BGCRL.shape[3], -1)


def _scores(query_BGCRL, key_BGSC, segments_BL, first):
    """scores_BGSQ of queries that begin at `first`, in float32; -1e30 where the mask is."""
    mask_BQS = packed_mask(segments_BL[:, : key_BGSC.shape[2]], first)
    mask_B1SQ = jnp.tile(mask_BQS.swapaxes(1, 2), (1, 1, query_BGCRL.shape[3]))[:, None]
    scores_BGSQ = jnp.einsum(
        "bgsc,bgcq->bgsq", key_BGSC, _flat(query_BGCRL), preferred_element_type=jnp.float32
    )
    return jnp.where(mask_B1SQ, scores_BGSQ, -1e30)


def _sum_of_prefixes(parts):
    """Sum over arrays [B, G, S, C] of rising S, each as if it went on with zeros. By ranges, and not padded."""
    ends = [0] + [part.shape[2] for part in parts]
    ranges = [
        functools.reduce(jnp.add, [part[:, :, first:stop] for part in parts[i:]])
        for i, (first, stop) in enumerate(zip(ends, ends[1:]))
    ]
    return jnp.concatenate(ranges, axis=2)
