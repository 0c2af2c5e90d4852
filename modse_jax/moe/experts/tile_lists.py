"""What kernels over sorted rows share: visits of experts to tiles of rows, lists of tasks, and SwiGLU.

A tile of rows may hold rows of several experts; each of them *visits* it. A task is one visit and one tile of the
expert's own hidden columns. Lists are made on the device from the routing, and have a static bound. `tiles` has `rows`
and `hidden`, the sizes of tiles of rows and of the flat hidden axis.

Legend: N routed rows, E experts, H flat hidden axis; tiles: V visits, C of the flat axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement, expert_widths


class Work(NamedTuple):
    """The tasks of one kernel. Entries past `live` are in range and never run."""

    live: jax.Array  # int32 []
    expert: jax.Array  # int32 [tasks]
    row_tile: jax.Array
    column: jax.Array  # tile of the expert's own columns
    flat: jax.Array  # tile of the flat axis
    flags: (
        jax.Array | None
    )  # 1: first task of its output block; 2: last one; None if the order has no such blocks


def visits(rows_E, tiles, num_tiles, empty_too=False):
    """(visits of each expert [E], row tile of its first visit [E])."""
    end_E = jnp.cumsum(rows_E)
    first_E = (end_E - rows_E) // tiles.rows
    count_E = jnp.where(rows_E > 0, -(-end_E // tiles.rows) - first_E, int(empty_too))
    return count_E, jnp.minimum(first_E, num_tiles - 1)


def visit_list(rows_E, tiles, num_tiles):
    """(expert, row tile, whether it is live) of every visit [V], by expert."""
    E = rows_E.shape[0]
    count_E, first_E = visits(rows_E, tiles, num_tiles)
    V = num_tiles + E - 1
    expert_V, index_V = repeat(count_E, V)
    row_tile_V = jnp.clip(first_E[expert_V] + index_V, 0, num_tiles - 1)
    return expert_V, row_tile_V, jnp.arange(V) < jnp.sum(count_E)


def repeat(count_X, length):
    """(which X, index within it) of `length` entries, entry x repeated count_X[x] times."""
    which = jnp.repeat(
        jnp.arange(count_X.shape[0], dtype=jnp.int32), count_X, total_repeat_length=length
    )
    start_X = jnp.cumsum(count_X) - count_X
    return which, jnp.arange(length, dtype=jnp.int32) - start_X[which]


class Columns(NamedTuple):
    """A shard's experts in column tiles."""

    count_E: jax.Array  # int32: column tiles of every expert
    first_E: jax.Array  # int32: its first tile of the flat axis
    expert_C: jax.Array  # int32: whose every tile of the flat axis is
    most: int  # tiles of the widest expert of any shard
    bound: int  # task_bound


def columns_of(placement: expert_placement.Placement, shard, num_rows: int, tiles) -> Columns:
    """The tables of one shard. What differs from shard to shard is data: all of them run one program."""

    def filled(lists):
        return jnp.asarray(
            [[*row, *[0] * (placement.slots - len(row))] for row in lists], jnp.int32
        )[shard]

    counts = [[w // tiles.hidden for w in widths] for widths in placement.widths]
    return Columns(
        filled(counts),
        filled([expert_widths.offsets(c) for c in counts]),
        jnp.asarray([np.repeat(np.arange(len(c)), c) for c in counts], jnp.int32)[shard],
        max(map(max, counts)),
        task_bound(num_rows, placement, tiles),
    )


def hidden_in_work(rows_E, columns, tiles, num_tiles) -> Work:
    """By visit, then column tile of the visit's expert."""
    expert_V, row_tile_V, live_V = visit_list(rows_E, tiles, num_tiles)
    count_V = jnp.where(live_V, columns.count_E[expert_V], 0)
    visit, column = repeat(count_V, columns.bound)
    column = jnp.clip(column, 0, columns.most - 1)
    expert = expert_V[visit]
    last = column == columns.count_E[expert] - 1
    return Work(
        jnp.sum(count_V, dtype=jnp.int32),
        expert,
        row_tile_V[visit],
        column,
        columns.first_E[expert] + column,
        (column == 0) + 2 * last.astype(jnp.int32),
    )


def hidden_out_groups(rows_E, columns, tiles, num_tiles, visits_per_group: int) -> Work:
    """Returns the tasks of a hidden-out kernel in an order that reuses the weights in cache.

    The visits of an expert are divided into groups of nearly equal size, at most
    `visits_per_group`. A group runs column by column, and every column over all visits of
    the group, so that the tasks that run at the same time read few columns of the weights.
    Every second group runs its columns backward (a snake), so that it starts with the
    columns that the group before it read last.
    """
    visits_E, first_row_tile_E = visits(rows_E, tiles, num_tiles)
    groups_E = jnp.maximum(1, -(-visits_E // visits_per_group))
    expert, index = repeat(visits_E * columns.count_E, columns.bound)
    # Entries past the last task repeat an index that is in range; they never run.
    num_visits = jnp.maximum(1, visits_E[expert])
    num_groups, num_columns = groups_E[expert], columns.count_E[expert]
    index = jnp.minimum(index, num_visits * num_columns - 1)
    # Group g holds the visits g * num_visits // num_groups up to that of g + 1.
    group = ((index // num_columns + 1) * num_groups - 1) // num_visits
    first_visit = group * num_visits // num_groups
    group_size = (group + 1) * num_visits // num_groups - first_visit
    index_in_group = index - first_visit * num_columns
    column = index_in_group // group_size
    column = jnp.where(group % 2 == 1, num_columns - 1 - column, column)
    row_tile = first_row_tile_E[expert] + first_visit + index_in_group % group_size
    row_tile = jnp.minimum(row_tile, num_tiles - 1)
    live = jnp.sum(visits_E * columns.count_E, dtype=jnp.int32)
    flat = columns.first_E[expert] + column
    return Work(live, expert, row_tile.astype(jnp.int32), column, flat, None)


def task_bound(num_rows: int, placement: expert_placement.Placement, tiles) -> int:
    """The longest list of tasks of any shard: R + E - 1 visits, at least one per expert, the others charged to the
    widest."""
    return max(
        max(widths) // tiles.hidden * (-(-num_rows // tiles.rows) - 1) + sum(widths) // tiles.hidden
        for widths in placement.widths
    )


def swiglu(gate, up):
    """(silu(gate) * up,), the hidden activations, float32."""
    return (gate * jax.nn.sigmoid(gate) * up,)


def swiglu_backward(gate, up, dhidden):
    """(hidden, dgate, dup) of hidden = silu(gate) * up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dhidden * up * (sigmoid + silu * (1 - sigmoid)), dhidden * silu
