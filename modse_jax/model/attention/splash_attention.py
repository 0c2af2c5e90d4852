"""JAX's splash attention kernels for TPU.

Legend: B batch, L length, A query heads, G key/value heads, C head size.
"""

import jax

from modse_jax.model.attention.blocked import scale_queries

BLOCK_SIZES = (512, 256, 128)  # the largest that divides the sequence is used


def attend_splash(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Returns causal attention within every document of packed rows, by the splash kernels.

    See `blocked.attend_packed` for the other arguments and the result.

    Args:
        interpret: runs the kernels in interpret mode, which needs no TPU.
    """
    # The kernels are imported on use: the import takes time, and only TPUs need them.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, L, A, _ = query_BLAC.shape
    block = next(size for size in BLOCK_SIZES if L % size == 0)
    kernel = splash_attention.make_splash_mha(
        mask=splash_attention.MultiHeadMask([splash_attention.CausalMask((L, L))] * A),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attend_row(
        query_ALC: jax.Array, key_GLC: jax.Array, value_GLC: jax.Array, segments_L: jax.Array
    ) -> jax.Array:
        segment_ids = splash_attention.SegmentIds(segments_L, segments_L)
        return kernel(query_ALC, key_GLC, value_GLC, segment_ids)

    query_BALC = scale_queries(query_BLAC).transpose(0, 2, 1, 3)
    key_BGLC = key_BLGC.transpose(0, 2, 1, 3)
    value_BGLC = value_BLGC.transpose(0, 2, 1, 3)
    out_BALC = jax.vmap(attend_row)(query_BALC, key_BGLC, value_BGLC, segments_BL)
    return out_BALC.transpose(0, 2, 1, 3).astype(query_BLAC.dtype)
