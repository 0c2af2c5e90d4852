"""TODO"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.errors import UserError
from modse_jax.model.attention.blocked import scale_queries
from modse_jax.model.attention.masks import packed_mask
from modse_jax.model.attention.reference import attend
from modse_jax.runtime import chips


def select_attention(kind: str, shape: tuple[int, int, int, int], chip: str, dtype: str) -> str:
    """model.attention for queries of a shape [B, L, A, C] and type on a chip: "auto" is splash where it runs, cuDNN
    where it is installed and takes the shape, else blocks. Raises UserError where what is asked for does not run."""
    able = chip in chips.TPUS and shape[1] % 128 == 0 and shape[3] % 64 == 0
    if kind == "splash" and not able:
        raise UserError(
            f"model.attention=splash needs a TPU ({', '.join(chips.TPUS)}), sequences of a multiple of "
            f"128 and heads of one of 64; this is {chip}, {shape[1]} and {shape[3]}; take "
            "model.attention=auto"
        )
    takes = (
        chip in chips.GPUS
        and dtype == "bfloat16"
        and shape[1] % 2 == 0
        and shape[3] % 8 == 0
        and shape[3] <= 128
    )
    if kind == "cudnn" and not takes:
        raise UserError(
            f"model.attention=cudnn needs one of {', '.join(chips.GPUS)}, model.dtype=bfloat16, sequences "
            f"of an even length and heads of a multiple of 8 up to 128; this is {chip}, {dtype}, "
            f"{shape[1]} and {shape[3]}; take model.attention=auto"
        )
    if kind == "cudnn" and not cudnn_version():
        raise UserError(
            "model.attention=cudnn needs cuDNN, which jax does not find; install jax[cuda13] (its package "
            "is nvidia-cudnn-cu13), or take model.attention=blocks"
        )
    if kind != "auto":
        return kind
    return "splash" if able else "cudnn" if takes and cudnn_version() else "blocks"


def cudnn_version() -> int:
    """Returns the version of the installed cuDNN as jax reports it, such as 92801, or 0 if there is none.

    jax has no public function for it. Raises nothing: a jax without the private one has no cuDNN that we can use.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return int(check_cudnn_version())
    except Exception:  # RuntimeError of a missing library, ImportError, AttributeError
        return 0


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
    """`attend_packed` by cuDNN's flash attention. Documents are kept apart by a mask, which cuDNN takes as a bias: 2 L
    bytes per token."""
    same_B1LS = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    with _without_mask_gradient():
        return jax.nn.dot_product_attention(
            query_BLAC,
            key_BLGC,
            value_BLGC,
            mask=same_B1LS,
            is_causal=True,
            implementation=implementation,
        )


@contextlib.contextmanager
def _without_mask_gradient() -> Iterator[None]:
    """Keeps cuDNN from writing a gradient of the mask, [B, 1, L, L], where jax would have it written.

    jax 0.10 asks for the gradient of every bias, and so of every mask; nothing reads it, and there is no public switch.
    jax 0.11 asks for it only where a bias can have one, and no longer has the function replaced here. Delete this when
    jax 0.10 is no longer supported.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    asks = getattr(fused_attention_stablehlo, "should_export_dbias", None)
    if asks is None:
        yield
        return
    fused_attention_stablehlo.should_export_dbias = lambda *_: False
    try:
        yield
    finally:
        fused_attention_stablehlo.should_export_dbias = asks


def check_cudnn(
    shape: tuple[int, int, int], length: int, attend_by: Callable = attend_cudnn
) -> None:
    """Runs cuDNN's attention on this device, over a small batch of packed rows, and compares outputs and gradients with
    those of `attend`. Raises UserError if it fails, or differs by more than bfloat16 explains.

    Args: shape: query heads, key/value heads, head size. length: of the training sequences; at most 512 are used.
      attend_by: the function to check.
    """
    A, G, C = shape
    L = min(length, 512)
    keys = jax.random.split(jax.random.key(0), 4)
    query_BLAC, key_BLGC, value_BLGC, dout_BLAC = (
        jax.random.normal(k, (2, L, heads, C), jnp.bfloat16) for k, heads in zip(keys, (A, G, G, A))
    )
    # One row of three documents, the last of which is padding (0), and one row of a single document.
    segments_BL = jnp.stack(
        [
            jnp.where(jnp.arange(L) < L // 3, 1, jnp.where(jnp.arange(L) < L - L // 5, 2, 0)),
            jnp.ones(L, jnp.int32),
        ]
    )

    def run(function, *arrays):
        @jax.jit
        def both(query_BLAC, key_BLGC, value_BLGC, dout_BLAC):
            out_BLAC, pull = jax.vjp(function, query_BLAC, key_BLGC, value_BLGC)
            return out_BLAC, *pull(dout_BLAC.astype(out_BLAC.dtype))

        return [np.asarray(a, np.float32) for a in both(*arrays)]

    arrays = query_BLAC, key_BLGC, value_BLGC, dout_BLAC
    try:
        got = run(lambda q, k, v: attend_by(q, k, v, segments_BL), *arrays)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"cuDNN's attention does not run on this device ({str(error).splitlines()[0][:200]}); "
            "set --config.model.attention=blocks"
        ) from None
    want = run(
        lambda q, k, v: attend(q, k, v, packed_mask(segments_BL)),
        *(a.astype(jnp.float32) for a in arrays),
    )
    for name, a, b in zip(
        ("output", "gradient of queries", "gradient of keys", "gradient of values"), got, want
    ):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error < 0.02:
            raise UserError(
                f"cuDNN's attention is wrong on this device: its {name} differs from the reference by "
                f"{error:.3g} of its norm; set --config.model.attention=blocks, and report it"
            )
