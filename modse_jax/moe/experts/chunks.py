"""Runs a module of expert FFN kernels as one differentiable function, in chunks of rows.

With expert parallelism the sorted rows [N, D] of a shard have room for every token of every
shard, although an even routing fills only N / shards of them. Buffers of hidden activations
[N, M] would be several times too large. The rows are therefore processed in chunks of C rows,
where C is a quarter more than an even routing fills: usually all routed tokens are in the
first chunk, and the kernels of the other chunks have no tasks. Memory is bounded for every
routing, and no routed token is dropped.

A kernel module has two functions:

    forward(x_ND, rows_E, weights, shard, placement, tiles, interpret, keep) -> (y_ND, kept)
    backward(x_ND, rows_E, weights, shard, kept, dy_ND, placement, tiles, interpret)
        -> (dx_ND, dw_gate, dw_up, dw_down)

x_ND: rows sorted by expert. rows_E: int32, rows of every expert of the shard. weights: (w_gate
[D, H], w_up [D, H], w_down [H, D]) in the type of x_ND. shard: int32 [], the shard of the
placement. tiles: static; tiles.rows is the number of rows in a tile. kept: a pytree of what
backward reuses (gate and up activations, routing lists), None unless keep is set. Padding rows
after the last expert's may hold anything, NaN included, on input (x_ND and dy_ND); on output
they are 0.

Legend: N rows, C rows of a chunk, D model, E experts, H flat hidden axis, M widest expert.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from modse_jax.moe import expert_placement

# A chunk has room for this many times the rows that an even routing gives to a shard. More
# wastes memory, less sends mild imbalance into the second chunk, which recomputes activations.
ROOM = 1.25


def chunk_rows(num_rows: int, placement: expert_placement.Placement, tile_rows: int) -> int:
    """Returns the rows of a chunk, whole tiles; num_rows if one chunk holds them all."""
    even_share = num_rows * placement.slots / placement.num_experts
    rows = max(1, -int(-ROOM * even_share // tile_rows)) * tile_rows
    return min(rows, num_rows)


def rows_in_chunk(rows_E: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
    """Returns how many of every expert's rows are among first : first + rows."""
    end_E = jnp.cumsum(rows_E).astype(rows_E.dtype)
    start_E = end_E - rows_E
    return jnp.maximum(0, jnp.minimum(end_E, first + rows) - jnp.maximum(start_E, first))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def run_in_chunks(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array,
    kernels: types.ModuleType,
    placement: expert_placement.Placement,
    tiles: Any,
    interpret: Any = False,
) -> jax.Array:
    """Returns y_ND, every row through its own expert, by the kernels of a module."""
    weights = (w_gate, w_up, w_down)
    static = (kernels, placement, tiles, interpret)
    return _forward_chunks(x_ND, rows_E, weights, shard, *static, keep=False)[0]


def _forward(x_ND, rows_E, w_gate, w_up, w_down, shard, kernels, placement, tiles, interpret):
    weights = (w_gate, w_up, w_down)
    static = (kernels, placement, tiles, interpret)
    y_ND, kept = _forward_chunks(x_ND, rows_E, weights, shard, *static, keep=True)
    return y_ND, (x_ND, rows_E, weights, shard, kept)


def _backward(kernels, placement, tiles, interpret, saved, dy_ND):
    x_ND, rows_E, weights, shard, kept = saved
    static = (kernels, placement, tiles, interpret)
    dx_ND, *dw = _backward_chunks(x_ND, rows_E, weights, shard, kept, dy_ND, *static)
    return dx_ND, None, *dw, None


run_in_chunks.defvjp(_forward, _backward)


def _forward_chunks(
    x_ND, rows_E, weights, shard, kernels, placement, tiles, interpret, keep
) -> tuple[jax.Array, Any]:
    """Returns y_ND and what the backward pass reuses of the first chunk."""
    N = x_ND.shape[0]
    C = chunk_rows(N, placement, tiles.rows)

    def run_chunk(first, size, keep):
        rows = rows_in_chunk(rows_E, first, size)
        x_CD = _slice_rows(x_ND, first, size, C)
        return kernels.forward(x_CD, rows, weights, shard, placement, tiles, interpret, keep)

    y_CD, kept = run_chunk(0, C, keep)
    if C == N:
        return y_CD, kept

    def run_later_chunk(first, size, y_ND):
        return _update_rows(y_ND, run_chunk(first, size, False)[0][:size], first)

    y_ND = _update_rows(jnp.zeros_like(x_ND), y_CD, 0)
    return _loop_over_later_chunks(run_later_chunk, y_ND, N, C), kept


def _backward_chunks(
    x_ND, rows_E, weights, shard, kept, dy_ND, kernels, placement, tiles, interpret
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x_ND and of the weights. Activations of all chunks but the first
    are recomputed; the weight gradients of the chunks are summed in float32."""
    N = x_ND.shape[0]
    C = chunk_rows(N, placement, tiles.rows)
    static = (placement, tiles, interpret)

    def run_chunk(first, size, kept):
        rows = rows_in_chunk(rows_E, first, size)
        x_CD, dy_CD = (_slice_rows(a, first, size, C) for a in (x_ND, dy_ND))
        if kept is None:
            _, kept = kernels.forward(x_CD, rows, weights, shard, *static, True)
        return kernels.backward(x_CD, rows, weights, shard, kept, dy_CD, *static)

    dx_CD, *dw = run_chunk(0, C, kept)
    if C == N:
        return dx_CD, *dw

    def run_later_chunk(first, size, gradients):
        dx_ND, *sums = gradients
        dx_CD, *dw = run_chunk(first, size, None)
        sums = [total + new.astype(jnp.float32) for total, new in zip(sums, dw)]
        return _update_rows(dx_ND, dx_CD[:size], first), *sums

    dx_ND = _update_rows(jnp.zeros_like(x_ND), dx_CD, 0)
    gradients = (dx_ND, *(new.astype(jnp.float32) for new in dw))
    dx_ND, *sums = _loop_over_later_chunks(run_later_chunk, gradients, N, C)
    return dx_ND, *(total.astype(w.dtype) for total, w in zip(sums, weights))


def _loop_over_later_chunks(run: Callable, carry: Any, num_rows: int, chunk: int) -> Any:
    """Returns carry after carry = run(first row, size, carry) for every chunk but the first.

    The loop has a static number of iterations: a GPU runs it without asking the host. The last
    chunk, if it is shorter, comes after the loop.
    """
    whole, rest = divmod(num_rows, chunk)
    if whole > 1:
        carry = lax.fori_loop(1, whole, lambda i, carry: run(i * chunk, chunk, carry), carry)
    return run(whole * chunk, rest, carry) if rest else carry


def _slice_rows(x_ND: jax.Array, first: jax.Array | int, size: int, chunk: int) -> jax.Array:
    """Returns `size` rows, padded to a whole chunk so that the kernels compile for one shape."""
    x_CD = lax.dynamic_slice_in_dim(x_ND, first, size)
    return jnp.pad(x_CD, ((0, chunk - size), (0, 0)))


def _update_rows(y_ND: jax.Array, y_CD: jax.Array, first: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(y_ND, y_CD, first, axis=0)
