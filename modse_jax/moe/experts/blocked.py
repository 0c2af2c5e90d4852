"""The grouped feed-forward product in plain XLA, for any device: loops over blocks of an expert's rows.

One loop per size class (experts of one width), so that 1,024 experts compile like 8; inside it a loop over the class's
experts that have rows. An expert with about its even share of the rows, where that is no more than a block may have,
is one block, of the smallest of a few static sizes that holds them: its gradient is written once, where it belongs.
Others are a loop over blocks, with a dynamic trip count, and a gradient accumulator that is read and written once per
block. What a block has beyond its expert's rows is a neighbour's: where it is read it is masked, where it would be
written it is left as it was. The backward pass recomputes the hidden activations, but for those that fit in a buffer of
given size.

Legend: N routed rows, D model, E experts, H flat hidden axis, W width of one expert, B rows of one block, S saved
activations of all experts, one after another.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modse_jax.moe import expert_placement
from modse_jax.runtime import chips

# Sizes of an expert's only block, in sixteenths of its even share: 3% of the rows are wasted where the experts' rows
# vary by 5%, 6% where they vary by 20%. Every size is compiled for every width.
SIXTEENTHS = (8, 12, 14, 15, 16, 17, 18, 20, 24)


class _Sizes(NamedTuple):
    """Rows of a block: of an expert's only one, in rising order, or none; and of several, in falling order."""

    only: tuple[int, ...]
    several: tuple[int, ...]


class _Expert(NamedTuple):
    first: jax.Array  # its first row, how many it has, and its first column
    rows: jax.Array
    offset: jax.Array
    width: int


class _Rows:
    """The rows of one block. At the end of all rows it moves back, over rows that are not its own."""

    def __init__(self, num_rows, start, count, whole, e):
        self.at, self.count, self.whole = jnp.minimum(start, num_rows - count), count, whole
        row_B1 = (self.at + jnp.arange(count))[:, None]
        self.mine_B1 = (row_B1 >= start) & (row_B1 < e.first + e.rows)

    def of(self, a_ND):
        return lax.dynamic_slice_in_dim(a_ND, self.at, self.count)

    def mine(self, a_BX):
        return a_BX if self.whole else jnp.where(self.mine_B1, a_BX, 0)

    def store(self, out_ND, new_BD):
        """out with the block's own rows replaced, the rest of the block left as it was."""
        new_BD = new_BD.astype(out_ND.dtype)
        if not self.whole:
            new_BD = jnp.where(self.mine_B1, new_BD, self.of(out_ND))
        return lax.dynamic_update_slice_in_dim(out_ND, new_BD, self.at, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def blocked(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, blocks, chip):
    """See expert_ffn.expert_ffn. shard: which one of the placement this is, int32 []."""
    weights = w_gate, w_up, w_down
    return _forward_pass(x_ND, rows_E, weights, shard, placement, blocks._replace(saved=0), chip)[0]


def _forward_pass(x_ND, rows_E, weights, shard, placement, blocks, chip):
    """(y_ND, saved gate and up activations [S]); S is 0 where none are to be kept."""
    sizes = _sizes(blocks, x_ND.shape[0], placement.num_experts, chip)
    saved_S = _unwritten(
        (_saved_size(blocks, x_ND.shape[0], placement, sizes),), x_ND.dtype, rows_E, chip
    )

    def expert(carry, e):
        y_ND, saved_S, base = carry
        w_gate, w_up, w_down = _slice_weights(weights, e)
        fits, here, base = _saved_place(saved_S.size, placement, sizes, e, base)

        def block(carry, start, count, whole):
            y_ND, saved_S = carry
            rows = _Rows(x_ND.shape[0], start, count, whole, e)
            x_BD = rows.of(x_ND)
            gate_BW, up_BW = _gate_and_up(x_BD, w_gate, w_up)
            at = here + jnp.where(fits, 2 * e.width * (start - e.first), 0)
            saved_S = _save(saved_S, (gate_BW, up_BW), at)
            hidden_BW = (jax.nn.silu(gate_BW) * up_BW).astype(x_BD.dtype)
            return rows.store(y_ND, _dot(hidden_BW, w_down, 1, 0)), saved_S

        carry = _only_block(
            lambda c, start, size: block(c, start, size, False), (y_ND, saved_S), e, sizes
        )
        y_ND, saved_S = _if_several(lambda c: _over_blocks(block, c, e, sizes), carry, e, sizes)
        return y_ND, saved_S, base

    carry = (_zeros(x_ND.shape, x_ND.dtype, rows_E), saved_S, jnp.zeros((), jnp.int32))
    return _over_experts(expert, carry, rows_E, shard, placement)[:2]


def _forward(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, blocks, chip):
    y_ND, saved_S = _forward_pass(
        x_ND, rows_E, (w_gate, w_up, w_down), shard, placement, blocks, chip
    )
    # jaxlib 0.11.2 dies of an empty array that leaves a shard_map.
    return y_ND, (x_ND, rows_E, w_gate, w_up, w_down, shard, saved_S if saved_S.size else None)


def _backward(placement, blocks, chip, saved, dy_ND):
    x_ND, rows_E, *weights, shard, saved_S = saved
    saved_S = jnp.zeros((0,), x_ND.dtype) if saved_S is None else saved_S
    sizes = _sizes(blocks, x_ND.shape[0], placement.num_experts, chip)

    def expert(carry, e):
        dx_ND, flat, saved_S, base = carry
        w_gate, w_up, w_down = _slice_weights(weights, e)
        fits, here, base = _saved_place(saved_S.size, placement, sizes, e, base)

        def block(dx_ND, saved_S, start, count, whole):
            """(dx with the block's rows, saved activations, the block's part of the weights' gradients)."""
            rows = _Rows(x_ND.shape[0], start, count, whole, e)
            x_BD, dy_BD = rows.mine(rows.of(x_ND)), rows.mine(rows.of(dy_ND))

            if saved_S.size:  # what did not fit as well: a conditional would copy what it returns

                def again(turn, saved_S):
                    x_BD = _Rows(x_ND.shape[0], start + turn * count, count, whole, e).of(x_ND)
                    return _save(saved_S, _gate_and_up(x_BD, w_gate, w_up), at)

                at = here + jnp.where(fits, 2 * e.width * (start - e.first), 0)
                saved_S = lax.fori_loop(0, (~fits).astype(jnp.int32), again, saved_S)
                # A neighbour's were computed from rows that may hold anything.
                gate_BW, up_BW = map(rows.mine, _load(saved_S, count, e.width, at))
            else:
                gate_BW, up_BW = _gate_and_up(x_BD, w_gate, w_up)
            hidden_BW, dgate_BW, dup_BW = (
                a.astype(x_BD.dtype)
                for a in _swiglu_backward(gate_BW, up_BW, _dot(dy_BD, w_down, 1, 1))
            )
            dx_BD = _dot(dgate_BW, w_gate, 1, 1) + _dot(dup_BW, w_up, 1, 1)
            # XLA for CPU is slower at products over both leading axes; others need no transposed copy.
            x_DB = lax.optimization_barrier(x_BD.T) if chip == "cpu" else x_BD.T
            new = (
                _dot(x_DB, dgate_BW, 1, 0),
                _dot(x_DB, dup_BW, 1, 0),
                _dot(hidden_BW, dy_BD, 0, 0),
            )
            return rows.store(dx_ND, dx_BD), saved_S, new

        def write(flat, new):
            return tuple(
                lax.dynamic_update_slice_in_dim(f, d.astype(f.dtype), e.offset, axis)
                for f, d, axis in zip(flat, new, (1, 1, 0))
            )

        def only(carry, start, size):
            dx_ND, saved_S, new = block(carry[0], carry[2], start, size, False)
            return dx_ND, write(carry[1], new), saved_S

        def several(carry):
            def add(carry, start, count, whole):
                dx_ND, saved_S, new = block(carry[0], carry[2], start, count, whole)
                return dx_ND, jax.tree.map(jnp.add, carry[1], new), saved_S

            zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down))
            dx_ND, sums, saved_S = _over_blocks(add, (carry[0], zeros, carry[2]), e, sizes)
            return dx_ND, write(carry[1], sums), saved_S

        return *_if_several(
            several, _only_block(only, (dx_ND, flat, saved_S), e, sizes), e, sizes
        ), base

    dx_ND, *dw = (_zeros(a.shape, a.dtype, rows_E) for a in (x_ND, *weights))
    carry = (dx_ND, tuple(dw), saved_S, jnp.zeros((), jnp.int32))
    dx_ND, dw, *_ = _over_experts(expert, carry, rows_E, shard, placement)
    return (dx_ND, None, *dw, None)


blocked.defvjp(_forward, _backward)


def _zeros(shape, dtype, rows_E):
    """Zeros of this layer. XLA would make those of several layers once, and then copy them: twice the bytes."""
    return jnp.broadcast_to(jnp.minimum(rows_E[0], 0).astype(dtype), shape)


def _unwritten(shape, dtype, rows_E, chip):
    """Returns an array whose elements are written before they are read, so that they may hold anything at first.

    On GPU it is not initialized: zeros for the saved activations of 300Mx8 are 2.6 GB of writes per layer and pass. On
    CPU, XLA writes zeros for jax.lax.empty as well, and TPUs have not been measured.
    """
    if not chips.is_gpu(chip):
        return _zeros(shape, dtype, rows_E)
    # JAX would create the array once, outside the loop over layers, since it depends on nothing there, and XLA would
    # copy it in every layer. The condition depends on the layer; it is always true, and XLA removes it.
    return lax.cond(
        rows_E[0] == rows_E[0], lambda: lax.empty(shape, dtype), lambda: lax.empty(shape, dtype)
    )


def _over_experts(expert, carry, rows_E, shard, placement):
    """carry through expert(carry, _Expert) for every expert of the shard that has rows. What differs from shard to
    shard is data: all of them run one program."""
    rows_E = jnp.append(rows_E, 0)  # the place of experts that a shard has fewer of
    first_E = jnp.cumsum(rows_E) - rows_E
    groups = expert_placement.size_classes(placement)
    ids = jnp.asarray(np.concatenate([g.places for g in groups], axis=1, dtype=np.int32))[shard]
    columns = jnp.asarray(np.concatenate([g.offsets for g in groups], axis=1, dtype=np.int32))[
        shard
    ]
    kinds = np.repeat(np.arange(len(groups)), [len(g.places[0]) for g in groups])
    busy = rows_E[ids] > 0
    order = jnp.argsort(2 * kinds + ~busy, stable=True)  # class by class, those with rows first
    ids, columns = ids[order], columns[order]
    for kind, group in enumerate(groups):
        start, stop = np.searchsorted(kinds, (kind, kind + 1))

        # Out of the lists of all: in one of a single expert every turn would find the same, and XLA would slice its
        # weights before the loop, rows or none.
        def one(i, carry, width=group.width):
            return expert(carry, _Expert(first_E[ids[i]], rows_E[ids[i]], columns[i], width))

        carry = lax.fori_loop(
            int(start), start + jnp.sum(busy[start:stop], dtype=jnp.int32), one, carry
        )
    return carry


def _is_one_block(rows, sizes):
    return (rows > sizes.only[0] // 2) & (rows <= sizes.only[-1])


def _only_block(block, carry, e, sizes):
    """carry through block(carry, start row, static size) where the expert's rows make one block. Loops of at most one
    turn: XLA works in place inside a loop, where a conditional copies. The start row depends on the turn, or XLA would
    take all the products of all sizes for invariant, and compute them before any loop."""
    below = sizes.only[0] // 2 if sizes.only else 0
    for size in sizes.only:
        here = ((below < e.rows) & (e.rows <= size)).astype(jnp.int32)
        carry = lax.fori_loop(
            0, here, lambda i, c, size=size: block(c, e.first + i * size, size), carry
        )
        below = size
    return carry


def _if_several(function, carry, e, sizes):
    """function(carry) where the expert's rows do not make one block."""
    if not sizes.only:
        return function(carry)
    return lax.fori_loop(
        0, (~_is_one_block(e.rows, sizes)).astype(jnp.int32), lambda _, c: function(c), carry
    )


def _over_blocks(block, carry, e, sizes):
    """carry through block(carry, start row, static row count, whole) until the expert's rows are used up: as many whole
    blocks of each size as there are, then one that is not."""
    rest, start = e.rows, e.first

    def run(carry, count, size, whole):
        return lax.fori_loop(
            0, count, lambda i, c, s=start: block(c, s + i * size, size, whole), carry
        )

    for size in sizes.several[:-1]:
        count = rest // size
        carry = run(carry, count, size, True)
        rest, start = rest - count * size, start + count * size
    size = sizes.several[-1]
    return run(carry, -(-rest // size), size, False)


def _sizes(blocks, num_rows, num_experts, chip):
    """The blocks for rows spread over experts; none that the rows cannot fill, none smaller than the tail but the
    largest. No sizes for only blocks where an even share is too much for one: they would be compiled for nothing; nor
    off CPU, where each is one more loop whose turns are decided outside the chip."""
    share = max(8, -(-num_rows // num_experts))
    body = min(blocks.body, -(-share // 16) * 16, num_rows)
    only = (
        {body * n // 16 for n in SIXTEENTHS}
        if chip == "cpu" and body >= 64 and share <= 1.5 * body
        else ()
    )
    several = [body] + [s for s in (body // 2, body // 8) if s >= blocks.tail]
    return _Sizes(tuple(sorted(s for s in only if blocks.tail <= s <= num_rows)), tuple(several))


def _saved_size(blocks, num_rows, placement, sizes):
    """Elements of the buffer of saved activations: its budget, and room to write what does not fit."""
    if not blocks.saved:
        return 0
    columns = max(map(sum, placement.widths))
    budget = int(blocks.saved * num_rows * 2 * columns / placement.num_experts)
    return min(budget + _room(placement, sizes), 2**31 - 1)  # as many as 32 bits can index


def _rows_of_blocks(rows, sizes):
    """Rows of all blocks of an expert, those beyond its own included."""
    out, rest = 0, rows
    for size in sizes.several[:-1]:
        out, rest = out + rest // size * size, rest % size
    out = out + -(-rest // sizes.several[-1]) * sizes.several[-1]
    if not sizes.only:
        return out
    one = jnp.asarray(sizes.only)[
        jnp.minimum(jnp.searchsorted(jnp.asarray(sizes.only), rows), len(sizes.only) - 1)
    ]
    return jnp.where(_is_one_block(rows, sizes), one, out)


def _room(placement, sizes):
    """Where the activations of a block that are not kept are written."""
    return 2 * max(sizes.only + sizes.several) * max(map(max, placement.widths))


def _saved_place(size, placement, sizes, e, base):
    """(whether the expert's activations are kept, where they begin, where the next expert's do)."""
    spare = size - _room(placement, sizes)
    rows = _rows_of_blocks(e.rows, sizes)
    fits = rows <= (spare - base) // (
        2 * e.width
    )  # as a quotient: the product may not fit in 32 bits
    return fits, jnp.where(fits, base, spare), jnp.where(fits, base + 2 * e.width * rows, base)


def _save(saved_S, parts, at):
    if not saved_S.size:
        return saved_S
    for part_BW in parts:
        saved_S = lax.dynamic_update_slice_in_dim(
            saved_S, part_BW.astype(saved_S.dtype).reshape(-1), at, 0
        )
        at = at + part_BW.size
    return saved_S


def _load(saved_S, count, width, at):
    flat = (
        lax.dynamic_slice_in_dim(saved_S, at + i * count * width, count * width) for i in range(2)
    )
    return (f.reshape(count, width).astype(jnp.float32) for f in flat)


def _gate_and_up(x_BD, w_gate, w_up):
    return _dot(x_BD, w_gate, 1, 0), _dot(x_BD, w_up, 1, 0)


def _swiglu_backward(gate_BW, up_BW, dhidden_BW):
    """(hidden, dgate, dup), float32."""
    sigmoid_BW = jax.nn.sigmoid(gate_BW)
    silu_BW = gate_BW * sigmoid_BW
    dgate_BW = dhidden_BW * up_BW * (sigmoid_BW + silu_BW * (1 - sigmoid_BW))
    return silu_BW * up_BW, dgate_BW, dhidden_BW * silu_BW


def _slice_weights(weights, e):
    """(gate [D, W], up [D, W], down [W, D]) of one expert."""
    return tuple(
        lax.dynamic_slice_in_dim(w, e.offset, e.width, axis) for w, axis in zip(weights, (1, 1, 0))
    )


def _dot(a, b, axis_a, axis_b):
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
