"""The grouped feed-forward product in plain XLA, for any device: loops over blocks of an expert's rows.

One loop per size class (experts of one width), so that 1,024 experts compile like 8; inside it a loop over the class's
experts that have rows, and inside that a loop over row blocks with a dynamic trip count: large blocks for the body of
an expert's rows, small ones for the remainder, because a gradient accumulator is read and written once per block while
a block's unused rows are wasted work. A block may reach past its expert's rows into the next expert's: what it reads
there is masked, what it would write there is left as it was. The backward pass recomputes the hidden activations.

Legend: N routed rows, D model, E experts, H flat hidden axis, W width of one expert, B rows of one block.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from modse_jax.moe import sizing


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blocked(x_ND, rows_E, w_gate, w_up, w_down, widths, blocks):
    """See expert_ffn.expert_ffn. widths: E ints; blocks: (body, tail) rows per block."""
    blocks = _shrink(blocks, x_ND.shape[0], len(widths))

    def expert(y_ND, first, rows, offset, width):
        w_in, w_out = _slice_weights(w_gate, w_up, w_down, offset, width)

        def block(y_ND, start, count):
            x_BD = lax.dynamic_slice_in_dim(x_ND, start, count)
            gate_BW, up_BW = jnp.split(_dot(x_BD, w_in, 1, 0), 2, axis=1)
            hidden_BW = (jax.nn.silu(gate_BW) * up_BW).astype(x_BD.dtype)
            return _store(y_ND, _dot(hidden_BW, w_out, 1, 0), start, first, rows)

        return _over_blocks(block, y_ND, first, rows, blocks)

    x_ND, N = _pad_rows(x_ND, blocks)
    return _over_experts(expert, jnp.zeros_like(x_ND), rows_E, widths)[:N]


def _forward(x_ND, rows_E, w_gate, w_up, w_down, widths, blocks):
    return blocked(x_ND, rows_E, w_gate, w_up, w_down, widths, blocks), (x_ND, rows_E, w_gate, w_up, w_down)


def _backward(widths, blocks, saved, dy_ND):
    x_ND, rows_E, w_gate, w_up, w_down = saved
    blocks = _shrink(blocks, x_ND.shape[0], len(widths))

    def expert(carry, first, rows, offset, width):
        dx_ND, flat = carry[0], carry[1:]
        w_in, w_out = _slice_weights(w_gate, w_up, w_down, offset, width)

        def block(carry, start, count):
            dx_ND, dw_in, dw_out = carry
            mine_B1 = _mine(start, count, first, rows)
            x_BD = jnp.where(mine_B1, lax.dynamic_slice_in_dim(x_ND, start, count), 0)
            dy_BD = jnp.where(mine_B1, lax.dynamic_slice_in_dim(dy_ND, start, count), 0)
            gate_BW, up_BW = jnp.split(_dot(x_BD, w_in, 1, 0), 2, axis=1)
            sigmoid_BW = jax.nn.sigmoid(gate_BW)
            silu_BW = gate_BW * sigmoid_BW
            dh_BW = _dot(dy_BD, w_out, 1, 1)
            hidden_BW = (silu_BW * up_BW).astype(x_BD.dtype)
            dgate_BW = dh_BW * up_BW * (sigmoid_BW + silu_BW * (1 - sigmoid_BW))
            din_B2W = jnp.concatenate((dgate_BW, dh_BW * silu_BW), axis=1).astype(x_BD.dtype)
            return (_store(dx_ND, _dot(din_B2W, w_in, 1, 1), start, first, rows),
                    dw_in + _dot(x_BD, din_B2W, 0, 0), dw_out + _dot(hidden_BW, dy_BD, 0, 0))

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (w_in, w_out))
        dx_ND, dw_in, dw_out = _over_blocks(block, (dx_ND, *zeros), first, rows, blocks)
        dw = (*jnp.split(dw_in, 2, axis=1), dw_out)
        return (dx_ND, *(lax.dynamic_update_slice_in_dim(f, d.astype(f.dtype), offset, axis)
                         for f, d, axis in zip(flat, dw, (1, 1, 0))))

    (x_ND, N), (dy_ND, _) = _pad_rows(x_ND, blocks), _pad_rows(dy_ND, blocks)
    carry = (jnp.zeros_like(x_ND), jnp.zeros_like(w_gate), jnp.zeros_like(w_up), jnp.zeros_like(w_down))
    dx_ND, *dw = _over_experts(expert, carry, rows_E, widths)
    return (dx_ND[:N], None, *dw)


blocked.defvjp(_forward, _backward)


def _over_experts(expert, carry, rows_E, widths):
    """carry through expert(carry, first row, rows, offset, width) for every expert that has rows."""
    first_E = jnp.cumsum(rows_E) - rows_E
    for group in sizing.size_classes(widths):
        ids = jnp.asarray(group.experts, jnp.int32)
        columns = jnp.asarray(group.offsets, jnp.int32)
        busy = jnp.argsort(rows_E[ids] == 0, stable=True)

        def one(i, carry, ids=ids, columns=columns, busy=busy, width=group.width):
            e = ids[busy[i]]
            return expert(carry, first_E[e], rows_E[e], columns[busy[i]], width)

        carry = lax.fori_loop(0, jnp.sum(rows_E[ids] > 0, dtype=jnp.int32), one, carry)
    return carry


def _over_blocks(block, carry, first, rows, blocks):
    """carry through block(carry, start row, static row count) until an expert's rows are used up."""
    body, tail = blocks
    if body == tail:    # one loop: half the program to compile
        return lax.fori_loop(0, -(-rows // body), lambda i, c: block(c, first + i * body, body), carry)
    full = rows // body
    carry = lax.fori_loop(0, full, lambda i, c: block(c, first + i * body, body), carry)
    rest = first + full * body
    return lax.fori_loop(0, -(-(rows - full * body) // tail), lambda i, c: block(c, rest + i * tail, tail), carry)


def _shrink(blocks, num_rows, num_experts):
    """Blocks no larger than an expert's even share of the rows: decoding has few rows for many experts."""
    share = max(8, 1 << max(0, (num_rows // num_experts - 1)).bit_length())
    return min(blocks[0], share), min(blocks[1], blocks[0], share)


def _pad_rows(x_ND, blocks):
    """Room for the last block, whose dynamic slice would otherwise be moved back to fit."""
    return jnp.pad(x_ND, ((0, max(blocks)), (0, 0))), x_ND.shape[0]


def _slice_weights(w_gate, w_up, w_down, offset, width):
    """(gate and up side by side [D, 2W], down [W, D]) of one expert: one wide product instead of two."""
    gate, up = (lax.dynamic_slice_in_dim(w, offset, width, axis=1) for w in (w_gate, w_up))
    return jnp.concatenate((gate, up), axis=1), lax.dynamic_slice_in_dim(w_down, offset, width, axis=0)


def _mine(start, count, first, rows):
    return (start + jnp.arange(count) < first + rows)[:, None]


def _store(out_ND, new_BD, start, first, rows):
    """out with a block's own rows replaced, the rest of the block left as it was."""
    count = new_BD.shape[0]
    old_BD = lax.dynamic_slice_in_dim(out_ND, start, count)
    mixed_BD = jnp.where(_mine(start, count, first, rows), new_BD.astype(out_ND.dtype), old_BD)
    return lax.dynamic_update_slice_in_dim(out_ND, mixed_BD, start, 0)


def _dot(a, b, axis_a, axis_b):
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
