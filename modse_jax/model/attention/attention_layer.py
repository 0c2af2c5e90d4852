"""Causal self-attention with rotary positions and grouped-query heads.

Training and scoring attend over packed rows, which may hold several documents. Prefill and
decoding attend through a key/value cache, one document per row.

Legend: B batch, L length, S key length (of the cache, or L), D model, A query heads, G key/value
heads, C head size, H = C / 2 rotated pairs of a head, X = A + 2 G heads of the joint projection.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from modse_jax.config.options import ModelConfig
from modse_jax.model.attention.blocked import attend_packed
from modse_jax.model.attention.cudnn_attention import attend_cudnn
from modse_jax.model.attention.reference import attend
from modse_jax.model.attention.rotary import rotary_tables, rotate
from modse_jax.model.attention.selection import select_attention
from modse_jax.model.attention.splash_attention import attend_splash
from modse_jax.model.cpu_matmul import matmul
from modse_jax.model.initialization import draw_normal
from modse_jax.model.normalization import RMSNorm
from modse_jax.runtime import sharding

# On CPU, the softmax weights of sequences up to this length are saved for the backward pass, where
# they take less memory than the activations of an expert. For longer sequences they are recomputed.
MAX_SAVED_LENGTH = 1024

Cache = tuple[jax.Array, jax.Array]  # keys and values, [B, S, G, C]; [layers, ...] for a model


class AttentionInputs(NamedTuple):
    """Positions, rotary tables and masks of the tokens of one forward pass.

    They are the same for every block, so they are computed once, outside the scan over blocks.
    """

    positions_BL: jax.Array  # B may be 1
    rotary_BL1H: tuple[jax.Array, jax.Array]  # sine and cosine, float32; B may be 1
    segments_BL: jax.Array | None  # for packed rows: document numbers, 0 for padding
    mask_BLS: jax.Array | None  # with a cache: True where a token may attend to a key


def packed_inputs(segments_BL: jax.Array, config: ModelConfig) -> AttentionInputs:
    """Returns the attention inputs for packed rows, each of which may hold several documents.

    Positions count from the start of the row, not of the document. That gives the same result,
    because rotary attention depends on differences of positions only.

    Args:
        segments_BL: the document number of every token, 0 for padding.
        config: the model's config.
    """
    L = segments_BL.shape[1]
    sin_LH, cos_LH = rotary_tables(L, config)
    return AttentionInputs(
        positions_BL=jnp.arange(L)[None, :],
        rotary_BL1H=(sin_LH[None, :, None], cos_LH[None, :, None]),
        segments_BL=segments_BL,
        mask_BLS=None,
    )


def cached_inputs(
    positions_BL: jax.Array, cache_length: int, config: ModelConfig
) -> AttentionInputs:
    """Returns the attention inputs for decoding: one document per row, and a key/value cache.

    A token attends to all positions of the cache up to its own.

    Args:
        positions_BL: the position of every token in its document.
        cache_length: the number S of positions of the cache.
        config: the model's config.
    """
    mask_BLS = jnp.arange(cache_length)[None, None, :] <= positions_BL[:, :, None]
    sin_SH, cos_SH = rotary_tables(cache_length, config)
    return AttentionInputs(
        positions_BL=positions_BL,
        rotary_BL1H=(_look_up(sin_SH, positions_BL), _look_up(cos_SH, positions_BL)),
        segments_BL=None,
        mask_BLS=mask_BLS,
    )


def _look_up(table_SH: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """Returns the rows of a rotary table at some positions, [B, L, 1, H]."""
    return jnp.asarray(table_SH).at[positions_BL].get(mode="clip")[:, :, None]


class Attention(nnx.Module):
    """Multi-head attention with A query heads that share G key/value heads, without biases."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None, rngs: nnx.Rngs) -> None:
        self.kind = config.attention
        self.mesh = mesh
        self.dtype = jnp.dtype(config.dtype)
        D, A = config.dim, config.num_heads
        G = config.num_kv_heads or A
        C = D // A
        in_std = config.init_std or D**-0.5
        self.w_query = nnx.Param(draw_normal(rngs, (D, A, C), in_std))
        self.w_key = nnx.Param(draw_normal(rngs, (D, G, C), in_std))
        self.w_value = nnx.Param(draw_normal(rngs, (D, G, C), in_std))
        # The output of a residual branch is initialized 1 / sqrt(2 * num_layers) as large.
        out_std = config.init_std or D**-0.5 / (2 * config.num_layers) ** 0.5
        self.w_out = nnx.Param(draw_normal(rngs, (A, C, D), out_std))
        self.normalizes_queries_and_keys = config.qk_norm == "full"
        if self.normalizes_queries_and_keys:
            self.query_norm = RMSNorm(A * C, config.norm_eps)
            self.key_norm = RMSNorm(G * C, config.norm_eps)

    def __call__(
        self, x_BLD: jax.Array, attention_inputs: AttentionInputs, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layer.

        Args:
            x_BLD: the input of the layer.
            attention_inputs: from `packed_inputs`, or from `cached_inputs` if there is a cache.
            cache: keys and values of earlier tokens; None for packed rows.

        Returns:
            y_BLD, and the cache with the keys and values of these tokens added, or None.
        """
        query_BLAC, key_BLGC, value_BLGC = self._project(x_BLD)
        if self.normalizes_queries_and_keys:
            query_BLAC = _normalize_all_heads(self.query_norm, query_BLAC)
            key_BLGC = _normalize_all_heads(self.key_norm, key_BLGC)
        query_BLAC = rotate(query_BLAC, *attention_inputs.rotary_BL1H)
        key_BLGC = rotate(key_BLGC, *attention_inputs.rotary_BL1H)
        if cache is None:
            out_BLAC = self._attend_packed(
                query_BLAC, key_BLGC, value_BLGC, attention_inputs.segments_BL
            )
        else:
            cache = _write_cache(cache, key_BLGC, value_BLGC, attention_inputs.positions_BL)
            key_BSGC, value_BSGC = cache
            out_BLAC = attend(query_BLAC, key_BSGC, value_BSGC, attention_inputs.mask_BLS)
        w_out = self.w_out[...].astype(self.dtype)
        out_BLD = out_BLAC.reshape(*x_BLD.shape[:2], -1)
        y_BLD = matmul(out_BLD, w_out.reshape(-1, w_out.shape[-1]), self._chip())
        return y_BLD, cache

    def _project(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (query_BLAC, key_BLGC, value_BLGC), without rotation.

        The three weights are concatenated, so that one matmul computes all of them.
        """
        weights = (self.w_query, self.w_key, self.w_value)
        w_DXC = jnp.concatenate([w[...].astype(self.dtype) for w in weights], axis=1)
        D, X, C = w_DXC.shape
        y = matmul(x_BLD, w_DXC.reshape(D, X * C), self._chip())
        y_BLXC = y.reshape(*x_BLD.shape[:2], X, C)
        A, G = self.w_query.shape[1], self.w_key.shape[1]
        query_BLAC, key_BLGC, value_BLGC = jnp.split(y_BLXC, (A, A + G), axis=2)
        return query_BLAC, key_BLGC, value_BLGC

    def _attend_packed(
        self,
        query_BLAC: jax.Array,
        key_BLGC: jax.Array,
        value_BLGC: jax.Array,
        segments_BL: jax.Array,
    ) -> jax.Array:
        """Attends within the documents of packed rows, by the implementation for this chip."""
        chip = self._chip()
        kind = select_attention(self.kind, query_BLAC.shape, chip, str(self.dtype))
        arrays = (query_BLAC, key_BLGC, value_BLGC, segments_BL)
        if kind == "blocks":
            save_weights = chip == "cpu" and query_BLAC.shape[1] <= MAX_SAVED_LENGTH
            return attend_packed(*arrays, save_weights)
        attend_kernel = {"splash": attend_splash, "cudnn": attend_cudnn}[kind]
        if self.mesh is None or self.mesh.size == 1:
            return attend_kernel(*arrays)
        # XLA cannot partition a kernel, so each device runs it for its own rows of the batch.
        batch = sharding.partition_spec(("batch",))
        return jax.shard_map(
            attend_kernel,
            mesh=self.mesh,
            in_specs=(batch, batch, batch, batch),
            out_specs=batch,
            check_vma=False,
        )(*arrays)

    def _chip(self) -> str:
        return sharding.chip_name(self.mesh)


def _normalize_all_heads(norm: RMSNorm, x_BLAC: jax.Array) -> jax.Array:
    """Normalizes the heads of every token together, not each on its own (OLMo 2, OLMoE)."""
    x_BLD = x_BLAC.reshape(*x_BLAC.shape[:2], -1)
    return norm(x_BLD).reshape(x_BLAC.shape)


def _write_cache(
    cache: Cache, key_BLGC: jax.Array, value_BLGC: jax.Array, positions_BL: jax.Array
) -> Cache:
    """Returns the cache with new keys and values written at the given positions.

    Those at positions past the end of the cache (>= S) are not written.
    """
    cached_key_BSGC, cached_value_BSGC = cache
    row_B1 = jnp.arange(key_BLGC.shape[0])[:, None]
    return (
        cached_key_BSGC.at[row_B1, positions_BL].set(key_BLGC, mode="drop"),
        cached_value_BSGC.at[row_B1, positions_BL].set(value_BLGC, mode="drop"),
    )
