"""TODO"""

import jax

from modse_jax.errors import UserError
from modse_jax.model.attention.blocked import scale_queries
from modse_jax.runtime import chips


def select_attention(kind: str, shape: tuple[int, int, int, int], chip: str, dtype: str) -> str:
    """model.attention for queries of a shape [B, L, A, C] and type on a chip: "auto" is splash where it runs, and not
    cuDNN, which has not been timed. Raises UserError where what is asked for does not run."""
    able = chip in chips.TPUS and shape[1] % 128 == 0 and shape[3] % 64 == 0
    if kind == "splash" and not able:
        raise UserError(
            f"model.attention=splash needs a TPU ({', '.join(chips.TPUS)}), sequences of a multiple of "
            f"128 and heads of one of 64; this is {chip}, {shape[1]} and {shape[3]}; take "
            "model.attention=auto"
        )
    if kind == "cudnn" and (
        chip not in chips.GPUS
        or dtype != "bfloat16"
        or shape[1] % 2
        or shape[3] % 8
        or shape[3] > 128
    ):
        raise UserError(
            f"model.attention=cudnn needs one of {', '.join(chips.GPUS)}, model.dtype=bfloat16, sequences "
            f"of an even length and heads of a multiple of 8 up to 128; this is {chip}, {dtype}, "
            f"{shape[1]} and {shape[3]}; take model.attention=auto"
        )
    return kind if kind != "auto" else "splash" if able else "blocks"


def attend_splash(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`attend_packed` by JAX's splash attention kernels for TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, L, A, C = query_BLAC.shape
    block = next(b for b in (512, 256, 128) if L % b == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(
            (
                "block_q",
                "block_kv",
                "block_kv_compute",
                "block_q_dkv",
                "block_kv_dkv",
                "block_kv_dkv_compute",
                "block_q_dq",
                "block_kv_dq",
            ),
            block,
        )
    )
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([splash.CausalMask((L, L))] * A),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    heads_first = (
        a.transpose(0, 2, 1, 3) for a in (scale_queries(query_BLAC), key_BLGC, value_BLGC)
    )
    out_BALC = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(
        *heads_first, segments_BL
    )
    return out_BALC.transpose(0, 2, 1, 3).astype(query_BLAC.dtype)


def attend_cudnn(
    query_BLAC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    segments_BL: jax.Array,
    implementation: str = "cudnn",
) -> jax.Array:
    """`attend_packed` by cuDNN's flash attention. Documents are kept apart by a mask, which it takes as a bias: with
    the bias's gradient, 4 L bytes a token."""
    same_B1LS = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query_BLAC,
        key_BLGC,
        value_BLGC,
        mask=same_B1LS,
        is_causal=True,
        implementation=implementation,
    )
