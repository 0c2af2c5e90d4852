"""Causal self-attention with rotary positions, grouped-query heads, packed documents and a key/value cache.

Legend: B batch, L length, S cached or key length, D model, A query heads, G key/value heads, R = A / G, C head size,
Q queries that share a key head: R times those of a block of rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from modse_jax.config.options import ModelConfig
from modse_jax.model.attention.blocked import attend_packed
from modse_jax.model.attention.cpu_matmul import matmul
from modse_jax.model.attention.device_kernels import attend_cudnn, attend_splash, select_attention
from modse_jax.model.attention.reference import attend
from modse_jax.model.attention.rotary import rotary, rotate
from modse_jax.runtime import sharding

KEPT_LENGTH = 1024  # sequences up to here keep their softmax weights on CPU: less than an expert's activations


class AttentionInputs(NamedTuple):
    """Where the tokens of a pass stand: the same for every block, so worked out once, outside the scan."""

    positions_BL: jax.Array
    rotary_BL1C: tuple[jax.Array, jax.Array]  # sine and cosine, float32, [.., C / 2]; B may be 1
    segments_BL: jax.Array | None  # packed rows: document numbers, 0 = padding
    mask_BLS: jax.Array | None  # with a cache: what each token may see of it


def packed_inputs(segments_BL: jax.Array, config: ModelConfig) -> AttentionInputs:
    """Of packed rows. A document's positions start wherever it does: rotary attention sees differences only."""
    L = segments_BL.shape[1]
    return AttentionInputs(
        jnp.arange(L)[None, :],
        tuple(a[None, :, None] for a in rotary(L, config)),
        segments_BL,
        None,
    )


def cached_inputs(
    positions_BL: jax.Array, cache_length: int, config: ModelConfig
) -> AttentionInputs:
    """Of one document per row, behind a cache of S positions: a token sees everything at or before its own."""
    mask_BLS = jnp.arange(cache_length)[None, None, :] <= positions_BL[:, :, None]
    table = (
        jnp.asarray(a).at[positions_BL].get(mode="clip")[:, :, None]
        for a in rotary(cache_length, config)
    )
    return AttentionInputs(positions_BL, tuple(table), None, mask_BLS)


class Attention(nnx.Module):
    """(x_BLD, place, cache) -> (y_BLD, cache). `cache` is None, or (keys_BSGC, values_BSGC)."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, rngs: nnx.Rngs):
        self.kind, self.mesh = config.attention, mesh
        D, A = config.dim, config.num_heads
        G, C = config.num_kv_heads or A, config.dim // A
        self.dtype = jnp.dtype(config.dtype)

        def normal(shape, std):
            return nnx.Param(
                std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
            )

        self.w_query, self.w_key = normal((D, A, C), D**-0.5), normal((D, G, C), D**-0.5)
        self.w_value = normal((D, G, C), D**-0.5)
        self.w_out = normal((A, C, D), D**-0.5 / (2 * config.num_layers) ** 0.5)

    def __call__(self, x_BLD, place, cache=None):
        A, G, chip = self.w_query.shape[1], self.w_key.shape[1], sharding.chip_name(self.mesh)
        w_in = jnp.concatenate(
            [self._weight(n) for n in ("w_query", "w_key", "w_value")], axis=1
        )  # one product
        in_BLAC = matmul(x_BLD, w_in.reshape(w_in.shape[0], -1), chip).reshape(
            *x_BLD.shape[:2], A + 2 * G, -1
        )
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
        y_BLD = matmul(
            out_BLAC.reshape(*x_BLD.shape[:2], -1), w_out.reshape(-1, w_out.shape[-1]), chip
        )
        return y_BLD, (key_BSGC, value_BSGC)

    def _packed(self, query_BLAC, *rest):
        chip, length = sharding.chip_name(self.mesh), query_BLAC.shape[1]
        kind = select_attention(self.kind, query_BLAC.shape, chip, str(self.dtype))
        blocks = functools.partial(attend_packed, keep=chip == "cpu" and length <= KEPT_LENGTH)
        function = {"blocks": blocks, "splash": attend_splash, "cudnn": attend_cudnn}[kind]
        if kind == "blocks" or self.mesh is None or self.mesh.size == 1:
            return function(query_BLAC, *rest)
        rows = sharding.partition_spec(("batch",))  # XLA cannot cut a kernel
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False
        )(query_BLAC, *rest)

    def _weight(self, name):
        return getattr(self, name)[...].astype(self.dtype)
