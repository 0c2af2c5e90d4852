"""Runs the GPU expert kernels as one differentiable function, in chunks of rows to bound memory.

Rows are routed tokens sorted by expert. With expert parallelism the rows [N, D] of a shard have
room for every token of every shard, although balanced routing fills only N / shards of them. Hidden
activations [N, M] for all rows would be several times larger than needed. The rows are therefore
processed in chunks of C rows, where C is a quarter more than balanced routing fills. Usually all
routed tokens are in the first chunk, and the kernels find nothing to do in the other chunks. Memory
is bounded for every routing, and no routed token is dropped.

A kernel module (pallas_gpu or pallas_triton) has two functions:

    forward(x_ND, rows_E, weights, shard, placement, tiles, interpret, save) -> (y_ND, saved)
    backward(x_ND, rows_E, weights, shard, saved, dy_ND, placement, tiles, interpret)
        -> (dx_ND, dw_gate, dw_up, dw_down)

    x_ND     rows sorted by expert
    rows_E   int32, the number of rows of every expert of the shard
    weights  w_gate [D, H], w_up [D, H] and w_down [H, D], in the dtype of x_ND
    shard    int32 [], the shard of the placement
    tiles    static tile sizes; tiles.rows is the number of rows of a row tile
    saved    a pytree of the arrays that `backward` reuses (activations, lists of tiles); None
             unless `save` is set

Padding rows after those of the last expert may hold anything, NaN included, in x_ND and dy_ND. They
are 0 in y_ND and dx_ND.

Legend: N rows, C rows of a chunk, D model, E experts of a shard, H flat hidden axis, M widest
expert.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from modse_jax.moe import expert_placement

# A chunk has room for this many times the rows that a shard receives with balanced routing. More
# would waste memory. With less, mild load imbalance would fill part of the second chunk, which is
# slower, because only the activations of the first chunk are saved for the backward pass.
ROOM = 1.25

# (w_gate, w_up, w_down) of a shard, or their gradients.
Weights = tuple[jax.Array, jax.Array, jax.Array]


def chunk_rows(num_rows: int, placement: expert_placement.Placement, tile_rows: int) -> int:
    """Returns how many routed tokens (rows) are processed as one chunk of a sharded buffer.

    It is ROOM times an even share of the shard, rounded up to a multiple of the row tile size
    `tile_rows`, but not more than all rows, num_rows.
    """
    even_share = num_rows * placement.slots / placement.num_experts
    rows = max(1, -int(-ROOM * even_share // tile_rows)) * tile_rows
    return min(rows, num_rows)


def rows_in_chunk(rows_E: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
    """Returns how many rows each expert has in the chunk that begins at row `first`.

    Args:
      rows_E: the number of rows of each expert, which follow one another.
      first: the first row of the chunk.
      rows: the number of rows of the chunk.
    """
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
    """Computes the expert FFN of every row with the kernels of a module.

    `kernels` is the kernel module, and `interpret` runs its kernels in Pallas's interpreter. See
    the description of this module for the other arguments.

    Returns:
      y_ND, 0 in padding rows.
    """
    weights = (w_gate, w_up, w_down)
    static = (kernels, placement, tiles, interpret)
    return _forward_chunks(x_ND, rows_E, weights, shard, *static, save=False)[0]


def _forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array,
    kernels: types.ModuleType,
    placement: expert_placement.Placement,
    tiles: Any,
    interpret: Any,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns y_ND, and the arrays that `_backward` needs."""
    weights = (w_gate, w_up, w_down)
    static = (kernels, placement, tiles, interpret)
    y_ND, saved = _forward_chunks(x_ND, rows_E, weights, shard, *static, save=True)
    return y_ND, (x_ND, rows_E, weights, shard, saved)


def _backward(
    kernels: types.ModuleType,
    placement: expert_placement.Placement,
    tiles: Any,
    interpret: Any,
    residuals: tuple[Any, ...],
    dy_ND: jax.Array,
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of the six array arguments of `run_in_chunks`."""
    x_ND, rows_E, weights, shard, saved = residuals
    static = (kernels, placement, tiles, interpret)
    dx_ND, *dw = _backward_chunks(x_ND, rows_E, weights, shard, saved, dy_ND, *static)
    return dx_ND, None, *dw, None


run_in_chunks.defvjp(_forward, _backward)


def _forward_chunks(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: Weights,
    shard: jax.Array,
    kernels: types.ModuleType,
    placement: expert_placement.Placement,
    tiles: Any,
    interpret: Any,
    save: bool,
) -> tuple[jax.Array, Any]:
    """Runs the forward pass chunk by chunk.

    Returns:
      y_ND, and the arrays that the backward pass reuses. Only the first chunk saves any; later
      chunks are recomputed in the backward pass.
    """
    N = x_ND.shape[0]
    C = chunk_rows(N, placement, tiles.rows)

    def run_chunk(first: jax.Array | int, size: int, save: bool) -> tuple[jax.Array, Any]:
        rows = rows_in_chunk(rows_E, first, size)
        x_CD = _slice_rows(x_ND, first, size, C)
        return kernels.forward(x_CD, rows, weights, shard, placement, tiles, interpret, save)

    y_CD, saved = run_chunk(0, C, save)
    if C == N:
        return y_CD, saved

    def run_later_chunk(first: jax.Array | int, size: int, y_ND: jax.Array) -> jax.Array:
        y_CD, _ = run_chunk(first, size, False)
        return _update_rows(y_ND, y_CD[:size], first)

    y_ND = _update_rows(jnp.zeros_like(x_ND), y_CD, 0)
    return _loop_over_later_chunks(run_later_chunk, y_ND, N, C), saved


def _backward_chunks(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: Weights,
    shard: jax.Array,
    saved: Any,
    dy_ND: jax.Array,
    kernels: types.ModuleType,
    placement: expert_placement.Placement,
    tiles: Any,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Returns (dx_ND, dw_gate, dw_up, dw_down).

    Activations of all chunks but the first are recomputed. The weight gradients of the chunks are
    summed in float32.
    """
    N = x_ND.shape[0]
    C = chunk_rows(N, placement, tiles.rows)
    static = (placement, tiles, interpret)

    def run_chunk(first: jax.Array | int, size: int, saved: Any) -> tuple[jax.Array, ...]:
        rows = rows_in_chunk(rows_E, first, size)
        x_CD = _slice_rows(x_ND, first, size, C)
        dy_CD = _slice_rows(dy_ND, first, size, C)
        if saved is None:
            _, saved = kernels.forward(x_CD, rows, weights, shard, *static, True)
        return kernels.backward(x_CD, rows, weights, shard, saved, dy_CD, *static)

    dx_CD, *dw = run_chunk(0, C, saved)
    if C == N:
        return dx_CD, *dw

    def run_later_chunk(
        first: jax.Array | int, size: int, gradients: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        dx_ND, *sums = gradients
        dx_CD, *dw = run_chunk(first, size, None)
        sums = [total + new.astype(jnp.float32) for total, new in zip(sums, dw)]
        return _update_rows(dx_ND, dx_CD[:size], first), *sums

    dx_ND = _update_rows(jnp.zeros_like(x_ND), dx_CD, 0)
    gradients = (dx_ND, *(new.astype(jnp.float32) for new in dw))
    dx_ND, *sums = _loop_over_later_chunks(run_later_chunk, gradients, N, C)
    return dx_ND, *(total.astype(w.dtype) for total, w in zip(sums, weights))


def _loop_over_later_chunks(run: Callable, carry: Any, num_rows: int, chunk: int) -> Any:
    """Calls carry = run(first row, size, carry) for every chunk but the first; returns the carry.

    The loop has a static number of iterations, so that a GPU runs it without waiting for the host.
    If the last chunk is shorter than the others, it is processed after the loop.

    Args:
      run: processes one chunk.
      carry: the initial value of the loop carry.
      num_rows: the number of rows of all chunks.
      chunk: the number of rows of one chunk.
    """
    num_full_chunks, num_remaining_rows = divmod(num_rows, chunk)

    def run_full_chunk(i: jax.Array, carry: Any) -> Any:
        return run(i * chunk, chunk, carry)

    if num_full_chunks > 1:
        carry = lax.fori_loop(1, num_full_chunks, run_full_chunk, carry)
    if num_remaining_rows:
        carry = run(num_full_chunks * chunk, num_remaining_rows, carry)
    return carry


def _slice_rows(x_ND: jax.Array, first: jax.Array | int, size: int, chunk: int) -> jax.Array:
    """Returns `size` rows from row `first` on, padded with zeros to the `chunk` rows of a chunk.

    All chunks thus have one shape, for which the kernels are compiled once.
    """
    x_CD = lax.dynamic_slice_in_dim(x_ND, first, size)
    return jnp.pad(x_CD, ((0, chunk - size), (0, 0)))


def _update_rows(y_ND: jax.Array, y_CD: jax.Array, first: jax.Array | int) -> jax.Array:
    """Returns y_ND with the rows from row `first` on replaced by y_CD."""
    return lax.dynamic_update_slice_in_dim(y_ND, y_CD, first, axis=0)
