"""Routed rows to the shards that own their experts, and back: an all-to-all of unequal parts over the expert axis.

A row is sent once for every expert it chose: 2 K (n - 1) / n token vectors a token and layer, there and back, on n
shards, where gathering all tokens and scattering sums takes 2 (n - 1). A part is the rows of one device for one expert,
and is written where that expert's rows from that device belong, so rows arrive sorted by expert. The receiving buffer
has room for every row of every device: nothing can overflow.

Legend: T tokens, R = T * K routed rows of a device, n shards, S slots of a shard (sizing.Placement), D model.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class SendPlan(NamedTuple):
    """Parts to send, by destination and slot there: int32 [n * S], as jax.lax.ragged_all_to_all takes them."""

    input_offsets: jax.Array  # first row of a part, here
    send_sizes: jax.Array
    output_offsets: jax.Array  # its first row, there
    recv_sizes: jax.Array  # rows of the parts that come here, by where they come from


def plan_sends(rows_nS: jax.Array, axis: str) -> tuple[SendPlan, SendPlan, jax.Array]:
    """(there, back, rows of this shard's slots) from this device's routed rows for every slot of every shard [n, S]."""
    rows_nnS = jax.lax.all_gather(rows_nS, axis)  # source, destination, slot
    me, n = jax.lax.axis_index(axis), rows_nS.shape[0]
    first_nnS = _before(rows_nnS.reshape(n, -1), 1).reshape(
        rows_nnS.shape
    )  # of a part, at its source
    total_nS = jnp.sum(rows_nnS, axis=0)
    place_nnS = _before(total_nS, 1)[None] + _before(rows_nnS, 0)  # and at its destination

    def flat(*arrays):
        return (a.reshape(-1).astype(jnp.int32) for a in arrays)

    there = SendPlan(*flat(first_nnS[me], rows_nnS[me], place_nnS[me], rows_nnS[:, me]))
    back = SendPlan(*flat(place_nnS[:, me], rows_nnS[:, me], first_nnS[:, me], rows_nnS[me]))
    return there, back, total_nS[me]


def _before(counts, axis):
    return jnp.cumsum(counts, axis=axis) - counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send(
    x_RD: jax.Array, there: SendPlan, back: SendPlan, rows: int, axis: str, native: bool
) -> jax.Array:
    """Rows as they arrive: [rows, D], 0 where none does. Its gradient goes back the same way.

    Args: there, back: of `moves`, or the other way round. native: use the collective of TPU and GPU; else the slow
    reference, which runs anywhere.
    """
    return (_native if native else _reference)(x_RD, rows, there, axis)


def _forward(x_RD, there, back, rows, axis, native):
    return send(x_RD, there, back, rows, axis, native), (x_RD.shape[0], there, back)


def _backward(rows, axis, native, saved, g):
    sent, there, back = saved
    return send(g, back, there, sent, axis, native), None, None


send.defvjp(_forward, _backward)


def _native(x_RD, rows, moves, axis):
    out = jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype)
    return jax.lax.ragged_all_to_all(x_RD, out, *moves, axis_name=axis)


def _reference(x_RD, rows, moves, axis):
    """Everything to everyone, and every row looked up."""
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    x = jax.lax.all_gather(x_RD, axis, tiled=True)
    to_me = [jax.lax.all_gather(a, axis).reshape(n, n, -1)[:, me] for a in moves[:3]]
    source = jnp.broadcast_to(jnp.arange(n)[:, None], to_me[0].shape) * x_RD.shape[0]
    first, size, place, source = (a.reshape(-1) for a in (*to_me, source))
    row = jnp.arange(rows)[:, None]
    mine = (row >= place[None]) & (row < (place + size)[None])
    part = jnp.argmax(mine, axis=1)
    return jnp.where(mine.any(axis=1)[:, None], x[(source + first - place)[part] + row[:, 0]], 0)
