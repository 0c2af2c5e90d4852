"""The expert FFN in plain XLA, for every device: loops over blocks of an expert's routed tokens.

A row is one routed token, and a block is a range of consecutive rows that one matmul processes.

    rows of x_ND, sorted by expert   | expert 0    |1| expert 2                   | padding  |
    expert 0: a single block         [single_block---]
    expert 1: no rows, no block
    expert 2: several blocks                         [full-----][full-----][tail-----]
                                                                                   ^^^ masked

Shapes are static inside a loop, so experts of one width (a size class) share one compiled loop. It
runs over those experts of the class that have routed tokens. 1,024 experts compile as fast as 8.

*   An expert with about an even share of the rows is a single block, of the smallest of a few
    static sizes that holds its rows. Its weight gradients are written once, in place.
*   Any other expert is a sequence of blocks, with a dynamic trip count: as many full blocks of each
    size as fit, then one block that may be partly filled (the tail). Its weight gradients are
    summed in a float32 accumulator, which is read and written once per block.

A block may extend past its expert's rows into the next expert's. Those rows are masked on input and
left unchanged on output. The backward pass recomputes the gate and up activations, except for those
that fit in a buffer of a given size.

XLA updates the carry of a loop in place, but copies the operands of a conditional. Therefore a
`fori_loop` of at most one iteration replaces a `cond` everywhere in this file, and weights are
sliced inside the loops.

Legend: N routed tokens (rows), D model dimension, E experts, W width of one expert, B rows of one
block, S elements of the buffer of saved activations, X any dimension.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modse_jax.moe import expert_placement
from modse_jax.moe.experts.block_sizes import Blocks
from modse_jax.moe.experts.swiglu import swiglu_backward
from modse_jax.runtime import chips

# Sizes of a single block, in sixteenths of an even share. With these, 3% of the rows of a block are
# masked if the experts' row counts vary by 5%, and 6% if they vary by 20%. Every size is compiled
# for every width.
SIXTEENTHS = (8, 12, 14, 15, 16, 17, 18, 20, 24)

# The hidden dimension of w_gate [D, H], w_up [D, H] and w_down [H, D].
HIDDEN_AXES = (1, 1, 0)

MAX_INT32 = 2**31 - 1

Arrays = tuple[jax.Array, ...]


class BlockSizes(NamedTuple):
    """Static block sizes, in rows.

    Attributes:
        single_block: sizes for experts whose rows are processed as one block, in rising order.
            Empty if no expert is.
        multi_block: sizes for experts whose rows are processed as several blocks, in falling order.
    """

    single_block: tuple[int, ...]
    multi_block: tuple[int, ...]


class Static(NamedTuple):
    """Values that are constants of the compiled code, the same for all experts."""

    num_rows: int
    placement: expert_placement.Placement
    sizes: BlockSizes
    chip: str


class Expert(NamedTuple):
    """The expert that one iteration of the loop over experts processes."""

    first_row: jax.Array
    num_rows: jax.Array
    first_hidden: jax.Array  # its first hidden unit on the flat hidden axis of the shard
    width: int  # its number of hidden units


class SavedRange(NamedTuple):
    """The range of the buffer of saved gate and up activations that belongs to one expert.

    Activations that do not fit are recomputed in the backward pass, into scratch space at the end
    of the buffer that all such experts share.
    """

    is_saved: jax.Array  # False if the expert's activations do not fit
    offset: jax.Array  # the first element of the range, or of the scratch space if not saved
    next_offset: jax.Array  # the first element of the next expert's range


class ForwardCarry(NamedTuple):
    """The arrays that the forward pass's loops over blocks update."""

    y_ND: jax.Array
    saved_S: jax.Array  # buffer of gate and up activations for the backward pass


class BackwardCarry(NamedTuple):
    """The arrays that the backward pass's loops over blocks update."""

    dx_ND: jax.Array
    dweights: Arrays  # of all experts; within one expert's loop over blocks, its float32 sums
    saved_S: jax.Array  # buffer of saved activations, whose scratch space is overwritten


class ExpertCarry(NamedTuple):
    """The loop carry of the loops over experts."""

    arrays: Any  # a ForwardCarry or a BackwardCarry
    offset: jax.Array  # the first free element of the buffer of saved activations


class BlockRows:
    """Reads, masks and writes the rows of one block, a range of rows that one matmul processes.

    A block has a static size and may therefore hold rows that it must not process:
    *   rows of the next expert at its end;
    *   rows of earlier blocks at its beginning, if it begins before `start` because it would
        otherwise extend past the last row of the array.
    These rows are masked on input and left unchanged on output.

    Args:
        num_rows: the number of rows of the array.
        start: the first row that the block has to process.
        size: the number of rows of the block.
        is_full: True if the block has no such rows, so that no mask is needed.
        expert: the expert.
    """

    def __init__(
        self, num_rows: int, start: jax.Array, size: int, is_full: bool, expert: Expert
    ) -> None:
        self.first_row = jnp.minimum(start, num_rows - size)
        self.size = size
        self.is_full = is_full
        row_B1 = (self.first_row + jnp.arange(size))[:, None]
        end = expert.first_row + expert.num_rows
        self.is_own_B1 = (row_B1 >= start) & (row_B1 < end)

    def read(self, a_ND: jax.Array) -> jax.Array:
        """Returns all rows of the block, also those that it must not process."""
        return lax.dynamic_slice_in_dim(a_ND, self.first_row, self.size)

    def masked(self, a_BX: jax.Array) -> jax.Array:
        """Returns the rows of a block with 0 in those that it must not process."""
        return a_BX if self.is_full else jnp.where(self.is_own_B1, a_BX, 0)

    def write(self, out_ND: jax.Array, new_BD: jax.Array) -> jax.Array:
        """Returns out_ND with the rows replaced that the block has to process, and no others."""
        new_BD = new_BD.astype(out_ND.dtype)
        if not self.is_full:
            new_BD = jnp.where(self.is_own_B1, new_BD, self.read(out_ND))
        return lax.dynamic_update_slice_in_dim(out_ND, new_BD, self.first_row, 0)


# RunBlock(carry, first row, number of rows, is_full) -> carry: processes one block of an expert.
RunBlock = Callable[[Any, jax.Array, int, bool], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def blocked(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
    blocks: Blocks,
    chip: str,
) -> jax.Array:
    """Returns y_ND, the output of every row's own expert. See select.expert_ffn.

    Args:
        shard: int32 scalar, the shard of the placement that rows_E and the weights belong to.
    """
    weights = (w_gate, w_up, w_down)
    blocks = blocks._replace(saved=0)
    return _run_forward(x_ND, rows_E, weights, shard, placement, blocks, chip).y_ND


def _forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
    blocks: Blocks,
    chip: str,
) -> tuple[jax.Array, tuple]:
    weights = (w_gate, w_up, w_down)
    y_ND, saved_S = _run_forward(x_ND, rows_E, weights, shard, placement, blocks, chip)
    # jaxlib 0.11.2 crashes if an empty array leaves a shard_map.
    saved_S = saved_S if saved_S.size else None
    return y_ND, (x_ND, rows_E, weights, shard, saved_S)


def _backward(
    placement: expert_placement.Placement,
    blocks: Blocks,
    chip: str,
    residuals: tuple,
    dy_ND: jax.Array,
) -> tuple[jax.Array | None, ...]:
    x_ND, rows_E, weights, shard, saved_S = residuals
    if saved_S is None:
        saved_S = jnp.zeros((0,), x_ND.dtype)
    num_rows = x_ND.shape[0]
    sizes = choose_block_sizes(blocks, num_rows, placement.num_experts, chip)
    static = Static(num_rows, placement, sizes, chip)
    dx_ND = _zeros(x_ND.shape, x_ND.dtype, rows_E)
    dweights = tuple(_zeros(w.shape, w.dtype, rows_E) for w in weights)
    carry = ExpertCarry(BackwardCarry(dx_ND, dweights, saved_S), jnp.zeros((), jnp.int32))
    run_expert = functools.partial(_backward_expert, x_ND, dy_ND, weights, static)
    dx_ND, dweights, _ = _loop_over_experts(run_expert, carry, rows_E, shard, placement).arrays
    return dx_ND, None, *dweights, None


blocked.defvjp(_forward, _backward)


def _run_forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: Arrays,
    shard: jax.Array,
    placement: expert_placement.Placement,
    blocks: Blocks,
    chip: str,
) -> ForwardCarry:
    """Runs the forward pass; returns y_ND and the gate and up activations for the backward pass.

    The buffer of activations is empty if blocks.saved is 0.
    """
    num_rows = x_ND.shape[0]
    sizes = choose_block_sizes(blocks, num_rows, placement.num_experts, chip)
    static = Static(num_rows, placement, sizes, chip)
    num_saved = saved_buffer_size(blocks, num_rows, placement, sizes)
    saved_S = _unwritten((num_saved,), x_ND.dtype, rows_E, chip)
    y_ND = _zeros(x_ND.shape, x_ND.dtype, rows_E)
    carry = ExpertCarry(ForwardCarry(y_ND, saved_S), jnp.zeros((), jnp.int32))
    run_expert = functools.partial(_forward_expert, x_ND, weights, static)
    return _loop_over_experts(run_expert, carry, rows_E, shard, placement).arrays


def _forward_expert(
    x_ND: jax.Array, weights: Arrays, static: Static, carry: ExpertCarry, expert: Expert
) -> ExpertCarry:
    """Computes the output of one expert, in one block or several."""
    expert_weights = _slice_weights(weights, expert)
    saved_range = find_saved_range(
        carry.arrays.saved_S.size, static.placement, static.sizes, expert, carry.offset
    )
    run_block = functools.partial(_forward_block, x_ND, expert_weights, static, expert, saved_range)
    arrays = _run_single_block(run_block, carry.arrays, expert, static.sizes)
    run_blocks = functools.partial(_loop_over_blocks, run_block, expert, static.sizes)
    arrays = _if_multi_block(run_blocks, arrays, expert, static.sizes)
    return ExpertCarry(arrays, saved_range.next_offset)


def _forward_block(
    x_ND: jax.Array,
    expert_weights: Arrays,
    static: Static,
    expert: Expert,
    saved_range: SavedRange,
    carry: ForwardCarry,
    start: jax.Array,
    size: int,
    is_full: bool,
) -> ForwardCarry:
    """Computes the output of one block, writes it to y_ND, and saves gate and up activations."""
    w_gate, w_up, w_down = expert_weights
    rows = BlockRows(static.num_rows, start, size, is_full, expert)
    x_BD = rows.read(x_ND)
    gate_BW, up_BW = _gate_and_up(x_BD, w_gate, w_up)
    offset = _block_offset(saved_range, expert, start)
    saved_S = _save(carry.saved_S, (gate_BW, up_BW), offset)
    hidden_BW = (jax.nn.silu(gate_BW) * up_BW).astype(x_BD.dtype)
    y_BD = _dot(hidden_BW, w_down, 1, 0)
    return ForwardCarry(rows.write(carry.y_ND, y_BD), saved_S)


def _backward_expert(
    x_ND: jax.Array,
    dy_ND: jax.Array,
    weights: Arrays,
    static: Static,
    carry: ExpertCarry,
    expert: Expert,
) -> ExpertCarry:
    """Computes the gradients of one expert's input and weights, in one block or several."""
    expert_weights = _slice_weights(weights, expert)
    saved_range = find_saved_range(
        carry.arrays.saved_S.size, static.placement, static.sizes, expert, carry.offset
    )
    run_block = functools.partial(
        _backward_block, x_ND, dy_ND, expert_weights, static, expert, saved_range
    )
    run_single = functools.partial(_backward_single_block, run_block, expert)
    arrays = _run_single_block(run_single, carry.arrays, expert, static.sizes)
    run_multi = functools.partial(
        _backward_multi_block, run_block, expert_weights, expert, static.sizes
    )
    arrays = _if_multi_block(run_multi, arrays, expert, static.sizes)
    return ExpertCarry(arrays, saved_range.next_offset)


def _backward_single_block(
    run_block: RunBlock,
    expert: Expert,
    carry: BackwardCarry,
    start: jax.Array,
    size: int,
    is_full: bool,
) -> BackwardCarry:
    """Processes an expert that is one block, and writes its weight gradients in place."""
    block = run_block(carry, start, size, is_full)
    return block._replace(dweights=_write_weights(carry.dweights, block.dweights, expert))


def _backward_multi_block(
    run_block: RunBlock,
    expert_weights: Arrays,
    expert: Expert,
    sizes: BlockSizes,
    carry: BackwardCarry,
) -> BackwardCarry:
    """Processes an expert's blocks, sums their weight gradients in float32, and writes the sums."""

    def add_block(sums: BackwardCarry, start: jax.Array, size: int, is_full: bool) -> BackwardCarry:
        block = run_block(sums, start, size, is_full)
        return block._replace(dweights=jax.tree.map(jnp.add, sums.dweights, block.dweights))

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in expert_weights)
    sums = _loop_over_blocks(add_block, expert, sizes, carry._replace(dweights=zeros))
    return sums._replace(dweights=_write_weights(carry.dweights, sums.dweights, expert))


def _backward_block(
    x_ND: jax.Array,
    dy_ND: jax.Array,
    expert_weights: Arrays,
    static: Static,
    expert: Expert,
    saved_range: SavedRange,
    carry: BackwardCarry,
    start: jax.Array,
    size: int,
    is_full: bool,
) -> BackwardCarry:
    """Computes the gradients of one block.

    Returns:
        dx_ND with the block's rows written; the weight gradients of this block alone, which the
        caller writes or sums; and the buffer of saved activations.
    """
    w_gate, w_up, w_down = expert_weights
    rows = BlockRows(static.num_rows, start, size, is_full, expert)
    x_BD = rows.masked(rows.read(x_ND))
    dy_BD = rows.masked(rows.read(dy_ND))
    saved_S = carry.saved_S
    if saved_S.size:
        offset = _block_offset(saved_range, expert, start)
        saved_S = _recompute_missing(
            saved_S, x_ND, expert_weights, expert, saved_range, offset, start, size, is_full
        )
        gate_BW, up_BW = _load(saved_S, size, expert.width, offset)
        # Activations are saved for all rows of a block. Those of rows that do not belong to this
        # expert may be NaN, and would spoil the weight gradients, which sum over rows.
        gate_BW, up_BW = rows.masked(gate_BW), rows.masked(up_BW)
    else:
        gate_BW, up_BW = _gate_and_up(x_BD, w_gate, w_up)
    gradients = swiglu_backward(gate_BW, up_BW, _dot(dy_BD, w_down, 1, 1))
    hidden_BW, dgate_BW, dup_BW = (a.astype(x_BD.dtype) for a in gradients)
    dx_BD = _dot(dgate_BW, w_gate, 1, 1) + _dot(dup_BW, w_up, 1, 1)
    # A matmul that contracts the leading axis of both operands is slower on CPU than an explicit
    # transpose and a plain matmul. The barrier keeps XLA from fusing the two. Other devices need no
    # transposed copy.
    x_DB = lax.optimization_barrier(x_BD.T) if static.chip == "cpu" else x_BD.T
    dw_gate = _dot(x_DB, dgate_BW, 1, 0)
    dw_up = _dot(x_DB, dup_BW, 1, 0)
    dw_down = _dot(hidden_BW, dy_BD, 0, 0)
    dx_ND = rows.write(carry.dx_ND, dx_BD)
    return BackwardCarry(dx_ND, (dw_gate, dw_up, dw_down), saved_S)


def _recompute_missing(
    saved_S: jax.Array,
    x_ND: jax.Array,
    expert_weights: Arrays,
    expert: Expert,
    saved_range: SavedRange,
    offset: jax.Array,
    start: jax.Array,
    size: int,
    is_full: bool,
) -> jax.Array:
    """Recomputes the gate and up activations of a block unless the forward pass saved them.

    They are written to the scratch space at the end of the buffer, which is returned. This is a
    loop of at most one iteration, because `lax.cond` would copy the entire buffer. The first row
    depends on the loop index; otherwise XLA would hoist the matmuls out of the loop and always run
    them.
    """
    w_gate, w_up, _ = expert_weights

    def recompute(iteration: jax.Array, saved_S: jax.Array) -> jax.Array:
        rows = BlockRows(x_ND.shape[0], start + iteration * size, size, is_full, expert)
        return _save(saved_S, _gate_and_up(rows.read(x_ND), w_gate, w_up), offset)

    iterations = (~saved_range.is_saved).astype(jnp.int32)
    return lax.fori_loop(0, iterations, recompute, saved_S)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, rows_E: jax.Array) -> jax.Array:
    """Returns zeros that XLA cannot treat as a constant, because they depend on rows_E.

    XLA would create constant zeros once for several layers and copy them in each layer, which
    doubles the memory traffic.
    """
    return jnp.broadcast_to(jnp.minimum(rows_E[0], 0).astype(dtype), shape)


def _unwritten(shape: tuple[int, ...], dtype: jnp.dtype, rows_E: jax.Array, chip: str) -> jax.Array:
    """Returns an array for data that is written before it is read, so its content does not matter.

    On GPU the array is not initialized, because zeros for the saved activations of 300Mx8 would be
    2.6 GB of writes per layer and pass. Elsewhere it holds zeros: on CPU, XLA writes zeros for
    jax.lax.empty as well, and TPUs have not been measured.
    """
    if not chips.is_gpu(chip):
        return _zeros(shape, dtype, rows_E)
    # JAX would create the array once, outside the loop over layers, since it depends on nothing
    # there, and XLA would copy it in every layer. The condition depends on the layer. It is always
    # true, and XLA removes it.
    return lax.cond(
        rows_E[0] == rows_E[0], lambda: lax.empty(shape, dtype), lambda: lax.empty(shape, dtype)
    )


def _loop_over_experts(
    run_expert: Callable[[ExpertCarry, Expert], ExpertCarry],
    carry: ExpertCarry,
    rows_E: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
) -> ExpertCarry:
    """Calls carry = run_expert(carry, expert) for every expert of the shard that has routed tokens.

    All devices run the same compiled code, so whatever differs between shards is looked up in
    arrays by `shard`. A slot is the position of an expert among the experts of its shard.
    """
    # Shards with fewer experts of a width have slot `placement.slots` in their lists instead. This
    # entry gives it no rows, so that it is skipped.
    rows_E = jnp.append(rows_E, 0)
    first_row_E = jnp.cumsum(rows_E) - rows_E
    classes = expert_placement.size_classes(placement)
    slots = np.concatenate([c.slots for c in classes], axis=1, dtype=np.int32)
    offsets = np.concatenate([c.offsets for c in classes], axis=1, dtype=np.int32)
    slots_E = jnp.asarray(slots)[shard]
    first_hidden_E = jnp.asarray(offsets)[shard]
    class_E = np.repeat(np.arange(len(classes)), [len(c.slots[0]) for c in classes])
    is_busy_E = rows_E[slots_E] > 0
    # Experts are ordered by size class, and within a class those with rows come first, so that the
    # loop over a class can stop after them.
    order_E = jnp.argsort(2 * class_E + ~is_busy_E, stable=True)
    slots_E = slots_E[order_E]
    first_hidden_E = first_hidden_E[order_E]
    for index, size_class in enumerate(classes):
        start, stop = np.searchsorted(class_E, (index, index + 1))

        # The expert is looked up in the list of all experts, not in that of this size class. With a
        # list of one expert the index would be loop-invariant, and XLA would hoist the slices of
        # the weights out of the loop even if the expert has no rows.
        def run(i: jax.Array, carry: ExpertCarry, width: int = size_class.width) -> ExpertCarry:
            slot = slots_E[i]
            expert = Expert(first_row_E[slot], rows_E[slot], first_hidden_E[i], width)
            return run_expert(carry, expert)

        num_busy = jnp.sum(is_busy_E[start:stop], dtype=jnp.int32)
        carry = lax.fori_loop(int(start), start + num_busy, run, carry)
    return carry


def _is_single_block(num_rows: jax.Array, sizes: BlockSizes) -> jax.Array:
    return (num_rows > sizes.single_block[0] // 2) & (num_rows <= sizes.single_block[-1])


def _run_single_block(
    run_block: RunBlock, carry: NamedTuple, expert: Expert, sizes: BlockSizes
) -> NamedTuple:
    """Processes the expert as one block, of the smallest single-block size that holds its rows.

    Returns the carry unchanged if the expert is too large for every size, or so small that the
    smallest size would be mostly masked; `_if_multi_block` then processes it.

    Each size is a `fori_loop` of at most one iteration instead of a `cond`, because XLA updates
    loop carries in place but copies the operands of a conditional. The start row depends on the
    loop index; otherwise XLA hoists the matmuls of every size out of the loops.
    """
    below = sizes.single_block[0] // 2 if sizes.single_block else 0
    for size in sizes.single_block:
        has_this_size = (below < expert.num_rows) & (expert.num_rows <= size)

        def run(i: jax.Array, carry: NamedTuple, size: int = size) -> NamedTuple:
            return run_block(carry, expert.first_row + i * size, size, False)

        carry = lax.fori_loop(0, has_this_size.astype(jnp.int32), run, carry)
        below = size
    return carry


def _if_multi_block(
    function: Callable[[NamedTuple], NamedTuple],
    carry: NamedTuple,
    expert: Expert,
    sizes: BlockSizes,
) -> NamedTuple:
    """Returns function(carry) if the expert is processed as several blocks, else the carry."""
    if not sizes.single_block:
        return function(carry)
    iterations = (~_is_single_block(expert.num_rows, sizes)).astype(jnp.int32)
    return lax.fori_loop(0, iterations, lambda _, carry: function(carry), carry)


def _loop_over_blocks(
    run_block: RunBlock, expert: Expert, sizes: BlockSizes, carry: NamedTuple
) -> NamedTuple:
    """Runs as many full blocks of each size as the expert's rows fill, the largest size first.

    The rows that are left fill blocks of the smallest size, of which the last may be partly filled.
    """

    def run(
        carry: NamedTuple, start: jax.Array, count: jax.Array, size: int, is_full: bool
    ) -> NamedTuple:
        def run_one(i: jax.Array, carry: NamedTuple) -> NamedTuple:
            return run_block(carry, start + i * size, size, is_full)

        return lax.fori_loop(0, count, run_one, carry)

    start = expert.first_row
    remaining = expert.num_rows
    *full_sizes, tail_size = sizes.multi_block
    for size in full_sizes:
        count = remaining // size
        carry = run(carry, start, count, size, True)
        remaining = remaining - count * size
        start = start + count * size
    return run(carry, start, -(-remaining // tail_size), tail_size, False)


def choose_block_sizes(blocks: Blocks, num_rows: int, num_experts: int, chip: str) -> BlockSizes:
    """Returns the block sizes to compile for this many rows (routed tokens of all experts).

    The largest block is about an even share of the rows (num_rows / num_experts), but at most
    blocks.body rows. The smaller ones are a half and an eighth of it, if that is at least
    blocks.tail.

    Sizes for experts that are a single block exist only on CPU, because elsewhere each size is one
    more loop whose trip count the host has to read back. There are none either if an even share is
    too large for one block: they would be compiled but hardly ever used.
    """
    even_share = max(8, -(-num_rows // num_experts))
    body = min(blocks.body, -(-even_share // 16) * 16, num_rows)
    single_block: set[int] = set()
    if chip == "cpu" and body >= 64 and even_share <= 1.5 * body:
        single_block = {body * n // 16 for n in SIXTEENTHS}
    single_block = {s for s in single_block if blocks.tail <= s <= num_rows}
    smaller = [s for s in (body // 2, body // 8) if s >= blocks.tail]
    return BlockSizes(tuple(sorted(single_block)), (body, *smaller))


def saved_buffer_size(
    blocks: Blocks, num_rows: int, placement: expert_placement.Placement, sizes: BlockSizes
) -> int:
    """Returns the number of elements of the buffer of saved activations; 0 if none are saved.

    The buffer has room for blocks.saved times what balanced routing needs, and scratch space for
    one block whose activations do not fit there. Its size is limited to what int32 can index. If
    the scratch space alone exceeds that, none are saved, so all are recomputed.
    """
    scratch = _scratch_size(placement, sizes)
    if not blocks.saved or scratch > MAX_INT32:
        return 0
    num_hidden = max(map(sum, placement.widths))
    budget = int(blocks.saved * num_rows * 2 * num_hidden / placement.num_experts)
    return min(budget + scratch, MAX_INT32)


def _scratch_size(placement: expert_placement.Placement, sizes: BlockSizes) -> int:
    """Returns the number of gate and up activations of the largest block of the widest expert."""
    largest = max(sizes.single_block + sizes.multi_block)
    return 2 * largest * max(map(max, placement.widths))


def _rows_of_blocks(num_rows: jax.Array, sizes: BlockSizes) -> jax.Array:
    """Returns the total size of the blocks of an expert with num_rows rows, masked rows included.

    It is larger than num_rows if the last block is only partly filled.
    """
    total = 0
    remaining = num_rows
    *full_sizes, tail_size = sizes.multi_block
    for size in full_sizes:
        total = total + remaining // size * size
        remaining = remaining % size
    total = total + -(-remaining // tail_size) * tail_size
    if not sizes.single_block:
        return total
    index = jnp.searchsorted(jnp.asarray(sizes.single_block), num_rows)
    index = jnp.minimum(index, len(sizes.single_block) - 1)
    single = jnp.asarray(sizes.single_block)[index]
    return jnp.where(_is_single_block(num_rows, sizes), single, total)


def find_saved_range(
    buffer_size: int,
    placement: expert_placement.Placement,
    sizes: BlockSizes,
    expert: Expert,
    offset: jax.Array,
) -> SavedRange:
    """Returns the range of the buffer of saved activations that an expert uses.

    Args:
        buffer_size: elements of the buffer, with the scratch space at its end.
        placement, sizes: determine the size of the scratch space.
        expert: the expert.
        offset: the first free element of the buffer.
    """
    scratch = buffer_size - _scratch_size(placement, sizes)
    num_rows = _rows_of_blocks(expert.num_rows, sizes)
    # num_rows * 2 * width may exceed 32 bits, so the comparison divides instead.
    is_saved = num_rows <= (scratch - offset) // (2 * expert.width)
    next_offset = jnp.where(is_saved, offset + 2 * expert.width * num_rows, offset)
    return SavedRange(is_saved, jnp.where(is_saved, offset, scratch), next_offset)


def _block_offset(saved_range: SavedRange, expert: Expert, start: jax.Array) -> jax.Array:
    """Returns where the saved activations of the block that begins at row `start` begin.

    It is an index into the buffer of saved activations. Blocks that are not saved all use the
    scratch space.
    """
    within = 2 * expert.width * (start - expert.first_row)
    return saved_range.offset + jnp.where(saved_range.is_saved, within, 0)


def _save(saved_S: jax.Array, parts: Arrays, offset: jax.Array) -> jax.Array:
    """Returns the buffer with arrays written into it, one after another, from `offset` on.

    An empty buffer is returned unchanged; then no activations are saved.
    """
    if not saved_S.size:
        return saved_S
    for part_BW in parts:
        part_S = part_BW.astype(saved_S.dtype).reshape(-1)
        saved_S = lax.dynamic_update_slice_in_dim(saved_S, part_S, offset, 0)
        offset = offset + part_BW.size
    return saved_S


def _load(saved_S: jax.Array, size: int, width: int, offset: jax.Array) -> Arrays:
    """Returns the gate and up activations of a block that `_save` wrote, as float32.

    Args:
        saved_S: the buffer.
        size: rows of the block.
        width: hidden units of the expert.
        offset: the first element of the block's activations.
    """
    parts = []
    for i in range(2):
        part_S = lax.dynamic_slice_in_dim(saved_S, offset + i * size * width, size * width)
        parts.append(part_S.reshape(size, width).astype(jnp.float32))
    return tuple(parts)


def _gate_and_up(x_BD: jax.Array, w_gate: jax.Array, w_up: jax.Array) -> Arrays:
    return _dot(x_BD, w_gate, 1, 0), _dot(x_BD, w_up, 1, 0)


def _slice_weights(weights: Arrays, expert: Expert) -> Arrays:
    """Returns w_gate [D, W], w_up [D, W] and w_down [W, D] of one expert."""
    return tuple(
        lax.dynamic_slice_in_dim(w, expert.first_hidden, expert.width, axis)
        for w, axis in zip(weights, HIDDEN_AXES)
    )


def _write_weights(weights: Arrays, new: Arrays, expert: Expert) -> Arrays:
    """Returns weights of all experts (or their gradients) with those of one expert replaced."""
    return tuple(
        lax.dynamic_update_slice_in_dim(w, n.astype(w.dtype), expert.first_hidden, axis)
        for w, n, axis in zip(weights, new, HIDDEN_AXES)
    )


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiplies two matrices, contracting one axis of each, and accumulates in float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
