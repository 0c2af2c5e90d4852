"""The grouped gated feed-forward product over experts of unequal width: signature, slow reference, choice of backend.

Expert e owns columns offset[e] : offset[e] + width[e] of the flat hidden axis H = sum of widths, so parameters are
exact: no padding to the widest. E_e(x) = (silu(x W_gate) * (x W_up)) W_down (SwiGLU, no biases).

Legend: N routed rows, D model, E experts, H flat hidden axis.
"""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.moe import expert_ffn_tpu, sizing
from modse_jax.moe.expert_ffn_blocked import Blocks, blocked


class ExpertWeights(NamedTuple):
    w_gate: jax.Array    # [D, H]
    w_up: jax.Array      # [D, H]
    w_down: jax.Array    # [H, D]


def check_backend(backend: str, placement: sizing.Placement, dim: int, chip: str) -> None:
    """Raises ValueError, naming what would do, where a backend cannot run these widths on this chip (mesh.chip)."""
    if backend == "pallas_tpu":
        expert_ffn_tpu.tiles_for(_all_widths(placement), dim, chip)


def expert_ffn(x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, placement: sizing.Placement, backend: str,
               blocks: Blocks, chip: str, shard: jax.Array | int = 0) -> jax.Array:
    """y_ND: every row through its own expert.

    Args:
      x_ND: rows sorted by expert. rows_E: int32, how many rows each expert has; rows past their sum belong to nobody,
        may hold anything, NaN included, and come back as 0 (their gradient too).
      weights: float32 or x's type; products are taken in x's type and accumulated in float32.
      placement: static, of all shards; sizing.place(widths, 1, "pairs") for one. rows_E and the weights are those
        of `shard`: its experts in the placement's order, rows_E filled up with 0 to placement.slots.
      backend: moe.backend. "auto" is "blocked" on every chip: no other backend has been timed on hardware, and auto
        must not pick a slower one. blocks: how `blocked` cuts the work. chip: mesh.chip.
    Raises: ValueError where the widths do not add up to the flat axis, or the backend cannot run them on the chip.
    """
    if {sum(w) for w in placement.widths} != {weights.w_gate.shape[1]} or placement.slots != rows_E.shape[0]:
        raise ValueError(f"widths {placement.widths} do not fit weights {weights.w_gate.shape} and rows {rows_E.shape}")
    weights = ExpertWeights(*(w.astype(x_ND.dtype) for w in weights))
    shard = jnp.asarray(shard, jnp.int32)
    if backend == "reference":
        ways = [functools.partial(reference, widths=widths) for widths in placement.widths]
        return jax.lax.switch(shard, ways, x_ND, rows_E, weights)
    if backend == "pallas_tpu":
        tiles = expert_ffn_tpu.tiles_for(_all_widths(placement), x_ND.shape[1], chip)
        return expert_ffn_tpu.pallas_tpu(x_ND, rows_E, *weights, shard, placement, tiles)
    return blocked(x_ND, rows_E, *weights, shard, placement, blocks)


def _all_widths(placement):
    return [w for widths in placement.widths for w in widths]


def reference(x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, widths: Sequence[int]) -> jax.Array:
    """Every expert over every row, and a select: E times the work, nothing to get wrong."""
    end_E = jnp.cumsum(rows_E)
    row_N1 = jnp.arange(x_ND.shape[0])[:, None]
    y_ND = jnp.zeros_like(x_ND)
    for expert, (first, width) in enumerate(zip(sizing.offsets(widths), widths)):
        mine_N1 = (row_N1 >= end_E[expert] - rows_E[expert]) & (row_N1 < end_E[expert])
        x_mine_ND = jnp.where(mine_N1, x_ND, 0)    # before the products: NaN times a zero gradient is NaN
        gate_NH = x_mine_ND @ weights.w_gate[:, first:first + width]
        up_NH = x_mine_ND @ weights.w_up[:, first:first + width]
        y_mine_ND = (jax.nn.silu(gate_NH) * up_NH) @ weights.w_down[first:first + width]
        y_ND = jnp.where(mine_N1, y_mine_ND, y_ND)
    return y_ND
