"""Sends routed tokens to the shards that have their experts, and back, by an all-to-all.

A token is sent once for every expert that it chose, so n shards send 2 K (n - 1) / n token vectors
per token and layer, there and back. The alternative, an all-gather of all tokens and a
reduce-scatter of the sums, sends 2 (n - 1).

A *part* of the all-to-all is the tokens of one device for one expert; parts have unequal sizes. A
part is written to the rows of the receiving buffer where the tokens of that device for that expert
belong, so tokens arrive sorted by expert. The receiving buffer has room for every routed token of
every device, so nothing can overflow.

A *slot* is the position of an expert among the experts of its shard.

Legend: T tokens, N rows of the receiving buffer, R = T * K routed tokens of a device, n shards,
S slots of a shard (expert_placement.Placement), D model.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class SendPlan(NamedTuple):
    """The rows that one device sends and receives in one all-to-all.

    The fields are arguments of jax.lax.ragged_all_to_all.

    Each field is int32 [n * S], with one entry for each of n devices and each slot (position of an
    expert among those of its shard). An entry is about one part: the rows of one device for one
    expert.
    """

    input_offsets: jax.Array  # first row of the part in this device's array
    send_sizes: jax.Array  # number of rows of the part that this device sends
    output_offsets: jax.Array  # first row of the part in the receiving device's array
    recv_sizes: jax.Array  # number of rows of the part that this device receives


def plan_sends(rows_nS: jax.Array, axis: str) -> tuple[SendPlan, SendPlan, jax.Array]:
    """Plans the all-to-all in both directions.

    Args:
        rows_nS: the number of routed tokens of this device for every slot (expert) of every shard.
        axis: the mesh axis of the shards.

    Returns:
        The outbound plan, which sends routed tokens to the shards of their experts; the inbound
        plan, which sends the results back; and the number of rows that arrive for every slot of
        this shard, [S].
    """
    rows_nnS = jax.lax.all_gather(rows_nS, axis)  # source, destination, slot
    me = jax.lax.axis_index(axis)
    n = rows_nS.shape[0]
    source_first_nnS = _exclusive_cumsum(rows_nnS.reshape(n, -1), axis=1).reshape(rows_nnS.shape)
    total_nS = jnp.sum(rows_nnS, axis=0)
    slot_first_nS = _exclusive_cumsum(total_nS, axis=1)
    destination_first_nnS = slot_first_nS[None] + _exclusive_cumsum(rows_nnS, axis=0)
    outbound = _flat_plan(
        source_first_nnS[me], rows_nnS[me], destination_first_nnS[me], rows_nnS[:, me]
    )
    inbound = _flat_plan(
        destination_first_nnS[:, me], rows_nnS[:, me], source_first_nnS[:, me], rows_nnS[me]
    )
    return outbound, inbound, total_nS[me]


def _flat_plan(*arrays_nS: jax.Array) -> SendPlan:
    return SendPlan(*(array.reshape(-1).astype(jnp.int32) for array in arrays_nS))


def _exclusive_cumsum(counts: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(counts, axis=axis) - counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send(
    x_RD: jax.Array, plan: SendPlan, reverse_plan: SendPlan, rows: int, axis: str, is_native: bool
) -> jax.Array:
    """Sends rows between devices by a plan, and returns the rows that arrive on this device.

    The gradient is sent by the reverse plan.

    Args:
        x_RD: the rows of this device.
        plan, reverse_plan: the outbound and the inbound plan of `plan_sends` to send tokens to
            their experts, or the other way around to send them back.
        rows: the number of rows of the result.
        axis: the mesh axis of the shards.
        is_native: uses the collective of TPU and GPU; otherwise the slow reference, which runs on
            every platform.

    Returns:
        The received rows, [rows, D]. Rows to which no device sends anything are 0.
    """
    exchange = _send_natively if is_native else send_by_all_gather
    return exchange(x_RD, rows, plan, axis)


def _send_forward(
    x_RD: jax.Array, plan: SendPlan, reverse_plan: SendPlan, rows: int, axis: str, is_native: bool
) -> tuple[jax.Array, tuple[int, SendPlan, SendPlan]]:
    y_ND = send(x_RD, plan, reverse_plan, rows, axis, is_native)
    return y_ND, (x_RD.shape[0], plan, reverse_plan)


def _send_backward(
    rows: int, axis: str, is_native: bool, saved: tuple[int, SendPlan, SendPlan], dy_ND: jax.Array
) -> tuple[jax.Array, None, None]:
    sent_rows, plan, reverse_plan = saved
    return send(dy_ND, reverse_plan, plan, sent_rows, axis, is_native), None, None


send.defvjp(_send_forward, _send_backward)


def _send_natively(x_RD: jax.Array, rows: int, plan: SendPlan, axis: str) -> jax.Array:
    y_ND = jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype)
    return jax.lax.ragged_all_to_all(x_RD, y_ND, *plan, axis_name=axis)


def send_by_all_gather(x_RD: jax.Array, rows: int, plan: SendPlan, axis: str) -> jax.Array:
    """The reference of `send`: all-gathers all rows, and picks those that are sent to this device.

    See `send` for the arguments and the result.
    """
    n = jax.lax.axis_size(axis)
    me = jax.lax.axis_index(axis)
    x_gathered = jax.lax.all_gather(x_RD, axis, tiled=True)

    def parts_for_me(values: jax.Array) -> jax.Array:
        return jax.lax.all_gather(values, axis).reshape(n, n, -1)[:, me]

    first_nS = parts_for_me(plan.input_offsets)
    size_nS = parts_for_me(plan.send_sizes)
    destination_nS = parts_for_me(plan.output_offsets)
    device_first_nS = jnp.broadcast_to(jnp.arange(n)[:, None], first_nS.shape) * x_RD.shape[0]
    first = first_nS.reshape(-1)
    size = size_nS.reshape(-1)
    destination = destination_nS.reshape(-1)
    device_first = device_first_nS.reshape(-1)

    row_N1 = jnp.arange(rows)[:, None]
    is_in_part = (row_N1 >= destination[None]) & (row_N1 < (destination + size)[None])
    part_N = jnp.argmax(is_in_part, axis=1)
    source_N = (device_first + first - destination)[part_N] + row_N1[:, 0]
    return jnp.where(is_in_part.any(axis=1)[:, None], x_gathered[source_N], 0)
