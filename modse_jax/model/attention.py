"""Causal self-attention with rotary positions, grouped-query heads, packed documents and a key/value cache.

Legend: B batch, L length, S cached or key length, D model, A query heads, G key/value heads, R = A / G, C head size,
Q queries that share a key head: R times those of a block of rows.
"""
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from modse_jax import chips
from modse_jax import mesh as meshes
from modse_jax.config import Model, UserError

KEPT_LENGTH = 1024    # sequences up to here keep their softmax weights on CPU: less than an expert's activations


class Place(NamedTuple):
    """Where the tokens of a pass stand: the same for every block, so worked out once, outside the scan."""
    positions_BL: jax.Array
    rotary_BL1C: tuple[jax.Array, jax.Array]    # sine and cosine, float32, [.., C / 2]; B may be 1
    segments_BL: jax.Array | None               # packed rows: document numbers, 0 = padding
    mask_BLS: jax.Array | None                  # with a cache: what each token may see of it


def packed_place(segments_BL: jax.Array, config: Model) -> Place:
    """Of packed rows. A document's positions start wherever it does: rotary attention sees differences only."""
    L = segments_BL.shape[1]
    return Place(jnp.arange(L)[None, :], tuple(a[None, :, None] for a in rotary(L, config)), segments_BL, None)


def cached_place(positions_BL: jax.Array, cache_length: int, config: Model) -> Place:
    """Of one document per row, behind a cache of S positions: a token sees everything at or before its own."""
    mask_BLS = jnp.arange(cache_length)[None, None, :] <= positions_BL[:, :, None]
    table = (jnp.asarray(a).at[positions_BL].get(mode="clip")[:, :, None] for a in rotary(cache_length, config))
    return Place(positions_BL, tuple(table), None, mask_BLS)


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
        A, G, chip = self.w_query.shape[1], self.w_key.shape[1], meshes.chip(self.mesh)
        w_in = jnp.concatenate([self._weight(n) for n in ("w_query", "w_key", "w_value")], axis=1)    # one product
        in_BLAC = _product(x_BLD, w_in.reshape(w_in.shape[0], -1), chip).reshape(*x_BLD.shape[:2], A + 2 * G, -1)
        query_BLAC, key_BSGC, value_BSGC = jnp.split(in_BLAC, (A, A + G), axis=2)
        query_BLAC, key_BSGC = (rotate(t, *place.rotary_BL1C) for t in (query_BLAC, key_BSGC))
        if cache is None:
            out_BLAC = self._packed(query_BLAC, key_BSGC, value_BSGC, place.segments_BL)
        else:
            rows_B1 = jnp.arange(x_BLD.shape[0])[:, None]
            key_BSGC = cache[0].at[rows_B1, place.positions_BL].set(key_BSGC, mode="drop")
            value_BSGC = cache[1].at[rows_B1, place.positions_BL].set(value_BSGC, mode="drop")
            out_BLAC = attend(query_BLAC, key_BSGC, value_BSGC, place.mask_BLS)
        w_out = self._weight("w_out")
        y_BLD = _product(out_BLAC.reshape(*x_BLD.shape[:2], -1), w_out.reshape(-1, w_out.shape[-1]), chip)
        return y_BLD, (key_BSGC, value_BSGC)

    def _packed(self, query_BLAC, *rest):
        chip, length = meshes.chip(self.mesh), query_BLAC.shape[1]
        kind = chosen(self.kind, query_BLAC.shape, chip, str(self.dtype))
        blocks = functools.partial(attend_packed, keep=chip == "cpu" and length <= KEPT_LENGTH)
        function = {"blocks": blocks, "splash": attend_splash, "cudnn": attend_cudnn}[kind]
        if kind == "blocks" or self.mesh is None or self.mesh.size == 1:
            return function(query_BLAC, *rest)
        rows = meshes.spec(("batch",))    # XLA cannot cut a kernel
        return jax.shard_map(function, mesh=self.mesh, in_specs=(rows,) * 4, out_specs=rows,
                             check_vma=False)(query_BLAC, *rest)

    def _weight(self, name):
        return getattr(self, name)[...].astype(self.dtype)


def _product(x_BLX, w_XY, chip):
    """x w, as a product of two matrices: of more axes XLA for CPU would transpose the gradient, to multiply it by x."""
    product = _product_on_cpu if chip == "cpu" else jnp.dot
    return product(x_BLX.reshape(-1, x_BLX.shape[-1]), w_XY).reshape(*x_BLX.shape[:-1], -1)


@jax.custom_vjp
def _product_on_cpu(x_NX, w_XY):
    """jnp.dot. Its gradient by w is a product over both leading axes, at which XLA for CPU is 1.2 times as slow as at
    transposing x first; and if the two were not kept apart, it would make them one again."""
    return jnp.dot(x_NX, w_XY)


def _product_backward(saved, dy_NY):
    x_NX, w_XY = saved
    return jnp.dot(dy_NY, w_XY.T), jnp.dot(jax.lax.optimization_barrier(x_NX.T), dy_NY)


_product_on_cpu.defvjp(lambda x_NX, w_XY: (jnp.dot(x_NX, w_XY), (x_NX, w_XY)), _product_backward)


def chosen(kind: str, shape: tuple[int, int, int, int], chip: str, dtype: str) -> str:
    """model.attention for queries of a shape [B, L, A, C] and type on a chip: "auto" is splash where it runs, cuDNN
    where it is installed and takes the shape, else blocks. Raises UserError where what is asked for does not run."""
    able = chip in chips.TPUS and shape[1] % 128 == 0 and shape[3] % 64 == 0
    if kind == "splash" and not able:
        raise UserError(f"model.attention=splash needs a TPU ({', '.join(chips.TPUS)}), sequences of a multiple of "
                        f"128 and heads of one of 64; this is {chip}, {shape[1]} and {shape[3]}; take "
                        "model.attention=auto")
    takes = chip in chips.GPUS and dtype == "bfloat16" and shape[1] % 2 == 0 and shape[3] % 8 == 0 and shape[3] <= 128
    if kind == "cudnn" and not takes:
        raise UserError(f"model.attention=cudnn needs one of {', '.join(chips.GPUS)}, model.dtype=bfloat16, sequences "
                        f"of an even length and heads of a multiple of 8 up to 128; this is {chip}, {dtype}, "
                        f"{shape[1]} and {shape[3]}; take model.attention=auto")
    if kind == "cudnn" and not cudnn_version():
        raise UserError("model.attention=cudnn needs cuDNN, which jax does not find; install jax[cuda13] (its package "
                        "is nvidia-cudnn-cu13), or take model.attention=blocks")
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
    except Exception:    # RuntimeError of a missing library, ImportError, AttributeError
        return 0


def attend_splash(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                  interpret: bool = False) -> jax.Array:
    """`attend_packed` by JAX's splash attention kernels for TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    _, L, A, C = query_BLAC.shape
    block = next(b for b in (512, 256, 128) if L % b == 0)
    sizes = splash.BlockSizes(**dict.fromkeys((
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
        "block_kv_dq"), block))
    kernel = splash.make_splash_mha(mask=splash.MultiHeadMask([splash.CausalMask((L, L))] * A), block_sizes=sizes,
                                    head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = (a.transpose(0, 2, 1, 3) for a in (_scaled(query_BLAC), key_BLGC, value_BLGC))
    out_BALC = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(*heads_first, segments_BL)
    return out_BALC.transpose(0, 2, 1, 3).astype(query_BLAC.dtype)


def attend_cudnn(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                 implementation: str = "cudnn") -> jax.Array:
    """`attend_packed` by cuDNN's flash attention. Documents are kept apart by a mask, which cuDNN takes as a bias: 2 L
    bytes per token."""
    same_B1LS = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    with _without_mask_gradient():
        return jax.nn.dot_product_attention(query_BLAC, key_BLGC, value_BLGC, mask=same_B1LS, is_causal=True,
                                            implementation=implementation)


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


def check_cudnn(shape: tuple[int, int, int], length: int, attend_by: Callable = attend_cudnn) -> None:
    """Runs cuDNN's attention on this device, over a small batch of packed rows, and compares outputs and gradients with
    those of `attend`. Raises UserError if it fails, or differs by more than bfloat16 explains.

    Args: shape: query heads, key/value heads, head size. length: of the training sequences; at most 512 are used.
      attend_by: the function to check.
    """
    A, G, C = shape
    L = min(length, 512)
    keys = jax.random.split(jax.random.key(0), 4)
    query_BLAC, key_BLGC, value_BLGC, dout_BLAC = (
        jax.random.normal(k, (2, L, heads, C), jnp.bfloat16) for k, heads in zip(keys, (A, G, G, A)))
    # One row of three documents, the last of which is padding (0), and one row of a single document.
    segments_BL = jnp.stack([jnp.where(jnp.arange(L) < L // 3, 1, jnp.where(jnp.arange(L) < L - L // 5, 2, 0)),
                             jnp.ones(L, jnp.int32)])

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
        raise UserError(f"cuDNN's attention does not run on this device ({str(error).splitlines()[0][:200]}); "
                        "set --config.model.attention=blocks") from None
    want = run(lambda q, k, v: attend(q, k, v, packed_mask(segments_BL)), *(a.astype(jnp.float32) for a in arrays))
    for name, a, b in zip(("output", "gradient of queries", "gradient of keys", "gradient of values"), got, want):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error < 0.02:
            raise UserError(f"cuDNN's attention is wrong on this device: its {name} differs from the reference by "
                            f"{error:.3g} of its norm; set --config.model.attention=blocks, and report it")


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_packed(query_BLAC: jax.Array, key_BLGC: jax.Array, value_BLGC: jax.Array, segments_BL: jax.Array,
                  keep: bool = False, min_block: int = 128) -> jax.Array:
    """`attend` under packed_mask(segments), in at most eight blocks of queries, each over no more keys than precede
    it. keep: softmax weights, half of [L, L] a head, for the backward pass; else scores are computed again there.

    Scores stand as [keys, queries]: no product then has to turn a large operand around, which XLA for CPU does at half
    speed. Written out rather than jax.nn.dot_product_attention: LOG.md, 2026-11-22.
    """
    return _attend_forward(query_BLAC, key_BLGC, value_BLGC, segments_BL, keep, min_block)[0]


def _attend_forward(query_BLAC, key_BLGC, value_BLGC, segments_BL, keep, min_block):
    query_BGCRL = _across(_scaled(query_BLAC), key_BLGC.shape[2])
    key_BGSC, value_BGCS = key_BLGC.transpose(0, 2, 1, 3), value_BLGC.transpose(0, 2, 3, 1)
    out, sums, kept = [], [], []
    for first, stop in _blocks(query_BLAC.shape[1], min_block):
        scores_BGSQ = _scores(query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], segments_BL, first)
        max_BG1Q = jnp.max(scores_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = jnp.exp(scores_BGSQ - max_BG1Q)
        sum_BG1Q = jnp.sum(weights_BGSQ, axis=2, keepdims=True)
        weights_BGSQ = weights_BGSQ.astype(value_BLGC.dtype)
        out_BGCQ = jnp.einsum("bgcs,bgsq->bgcq", value_BGCS[..., :stop], weights_BGSQ,
                              preferred_element_type=jnp.float32) / sum_BG1Q
        out.append(_apart(out_BGCQ, query_BGCRL))
        sums.append(_apart(sum_BG1Q, query_BGCRL))
        kept.append(weights_BGSQ if keep else max_BG1Q)
    out_BLAC, sum_BLA1 = (_from_across(jnp.concatenate(parts, axis=4)) for parts in (out, sums))
    out_BLAC = out_BLAC.astype(query_BLAC.dtype)
    return out_BLAC, (query_BLAC, key_BLGC, value_BLGC, segments_BL, out_BLAC, sum_BLA1, kept)


def _attend_backward(keep, min_block, saved, dout_BLAC):
    query_BLAC, key_BLGC, value_BLGC, segments_BL, out_BLAC, sum_BLA1, kept = saved
    G, C, dtype = *key_BLGC.shape[2:], query_BLAC.dtype
    dout_BLAC = (dout_BLAC / sum_BLA1).astype(dtype)    # once, in place of every weight
    inner_BLA1 = jnp.sum(dout_BLAC.astype(jnp.float32) * out_BLAC.astype(jnp.float32), axis=3, keepdims=True)
    inner_BG1RL = _across(inner_BLA1, G)
    query_BGRLC, query_BGCRL = _down(_scaled(query_BLAC), G), _across(_scaled(query_BLAC), G)
    dout_BGRLC, dout_BGCRL = _down(dout_BLAC, G), _across(dout_BLAC, G)
    key_BGSC, key_BGCS = key_BLGC.transpose(0, 2, 1, 3), key_BLGC.transpose(0, 2, 3, 1)
    value_BGSC = value_BLGC.transpose(0, 2, 1, 3)
    dquery, dkey, dvalue = [], [], []
    for (first, stop), of_block in zip(_blocks(query_BLAC.shape[1], min_block), kept):
        weights_BGSQ = of_block if keep else jnp.exp(
            _scores(query_BGCRL[..., first:stop], key_BGSC[:, :, :stop], segments_BL, first) - of_block).astype(dtype)
        dweights_BGSQ = jnp.einsum("bgsc,bgcq->bgsq", value_BGSC[:, :, :stop], _flat(dout_BGCRL[..., first:stop]),
                                   preferred_element_type=jnp.float32)
        dscores_BGSQ = (weights_BGSQ * (dweights_BGSQ - _flat(inner_BG1RL[..., first:stop]))).astype(dtype)
        dquery.append(_apart(jnp.einsum("bgcs,bgsq->bgcq", key_BGCS[..., :stop], dscores_BGSQ,
                                        preferred_element_type=jnp.float32), query_BGCRL))
        for parts, a_BGSQ, b_BGRLC in ((dkey, dscores_BGSQ, query_BGRLC), (dvalue, weights_BGSQ, dout_BGRLC)):
            b_BGQC = b_BGRLC[:, :, :, first:stop].reshape(*key_BGSC.shape[:2], -1, C)
            parts.append(jnp.einsum("bgsq,bgqc->bgsc", a_BGSQ, b_BGQC, preferred_element_type=jnp.float32))
    dquery_BLAC = _scaled(_from_across(jnp.concatenate(dquery, axis=4)))
    dkey_BLGC, dvalue_BLGC = (_sum_of_prefixes(parts).transpose(0, 2, 1, 3) for parts in (dkey, dvalue))
    return dquery_BLAC.astype(dtype), dkey_BLGC.astype(dtype), dvalue_BLGC.astype(dtype), None


attend_packed.defvjp(_attend_forward, _attend_backward)


def _blocks(length, min_block):
    size = max(min_block, -(-length // 8))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scaled(query_BLAC):
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
    mask_BQS = packed_mask(segments_BL[:, :key_BGSC.shape[2]], first)
    mask_B1SQ = jnp.tile(mask_BQS.swapaxes(1, 2), (1, 1, query_BGCRL.shape[3]))[:, None]
    scores_BGSQ = jnp.einsum("bgsc,bgcq->bgsq", key_BGSC, _flat(query_BGCRL), preferred_element_type=jnp.float32)
    return jnp.where(mask_B1SQ, scores_BGSQ, -1e30)


def _sum_of_prefixes(parts):
    """Sum over arrays [B, G, S, C] of rising S, each as if it went on with zeros. By ranges, and not padded."""
    ends = [0] + [part.shape[2] for part in parts]
    ranges = [functools.reduce(jnp.add, [part[:, :, first:stop] for part in parts[i:]])
              for i, (first, stop) in enumerate(zip(ends, ends[1:]))]
    return jnp.concatenate(ranges, axis=2)


def rotary(length: int, config: Model) -> tuple[np.ndarray, np.ndarray]:
    """(sine, cosine) [L, C / 2] of the rotary angles (RoFormer) of positions 0 to L - 1, float32.

    A table known before compilation: XLA for CPU moves sines into what reads them, and works them out for every head.
    """
    half = config.dim // config.num_heads // 2
    frequency_C = config.rope_base ** (-np.arange(half) / half)
    angle_LC = np.arange(length)[:, None] * frequency_C[None, :]
    return np.sin(angle_LC).astype(np.float32), np.cos(angle_LC).astype(np.float32)


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
