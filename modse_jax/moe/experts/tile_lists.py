"""Lists of the tasks of the Pallas kernels, built on the device from the routing.

Rows are routed tokens sorted by expert. They are divided into row tiles of `tiles.rows` rows. A
row tile may hold rows of several experts, and each of these experts *visits* it:

    rows        | 0 0 0 0 | 0 0 1 1 | 1 1 1 3 | 3 3 - - |     the expert of each row
    row tile         0         1         2         3
    visits           e=0       e=0       e=1       e=3        expert 2 has no rows and
                               e=1       e=3                  no visits

The hidden units of a shard's experts follow one another on the flat hidden axis H. Every width is
a multiple of `tiles.hidden`. A tile of hidden units has two numbers:

    flat hidden axis | e=0 | e=1 . e=1 . e=1 | e=2 | e=3 . e=3 |
    flat tile           0     1     2     3     4     5     6
    column tile         0     0     1     2     0     0     1

The flat tile locates it in the weights [D, H]. The column tile locates it in the hidden
activations [N, M], where the hidden units of every expert begin at 0.

A task is one visit and one column tile of the visiting expert. The kernels differ in the order of
their tasks. Lists have a static length (`max_num_tasks`); only the first `num_tasks` entries run.

Legend: N rows, D model, E experts of a shard, H flat hidden axis, M widest expert; V visits,
T tasks, C flat tiles; X any.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement, expert_widths


class TileSizes(Protocol):
    """The tile sizes that the lists depend on. Every kernel module has its own class of them."""

    @property
    def rows(self) -> int:
        """Rows of a row tile."""
        ...

    @property
    def hidden(self) -> int:
        """Hidden units of a flat tile."""
        ...


class VisitCounts(NamedTuple):
    """The visits of every expert of a shard."""

    count_E: jax.Array  # int32: visits of the expert
    first_row_tile_E: jax.Array  # int32: row tile of its first visit


class Visits(NamedTuple):
    """All visits, ordered by expert. Entries that are no visits are in range, and never run."""

    expert_V: jax.Array  # int32
    row_tile_V: jax.Array  # int32
    is_visit_V: jax.Array  # bool


class ColumnTiles(NamedTuple):
    """The hidden units of a shard's experts in tiles."""

    count_E: jax.Array  # int32: column tiles of the expert
    first_flat_tile_E: jax.Array  # int32: its first flat tile
    expert_C: jax.Array  # int32: the expert that owns the flat tile
    max_count: int  # column tiles of the widest expert of any shard
    max_num_tasks: int  # static length of the task lists


class TaskList(NamedTuple):
    """The tasks of one kernel. Entries from `num_tasks` on are in range, and never run.

    An output block belongs to consecutive tasks. flags_T is FIRST in the first of them, plus LAST
    in the last of them, or None if the order of the tasks has no such blocks.
    """

    num_tasks: jax.Array  # int32 []
    expert_T: jax.Array  # int32
    row_tile_T: jax.Array  # int32
    column_tile_T: jax.Array  # int32
    flat_tile_T: jax.Array  # int32
    flags_T: jax.Array | None  # int32


# Bits of TaskList.flags_T.
FIRST = 1
LAST = 2


def count_visits(
    rows_E: jax.Array, tiles: TileSizes, num_row_tiles: int, count_empty: bool = False
) -> VisitCounts:
    """Returns the number of visits of every expert.

    Args:
      count_empty: whether an expert without rows has one visit, instead of none.
    """
    end_E = jnp.cumsum(rows_E)
    first_row_tile_E = (end_E - rows_E) // tiles.rows
    has_rows_E = rows_E > 0
    end_row_tile_E = -(-end_E // tiles.rows)
    count_E = jnp.where(has_rows_E, end_row_tile_E - first_row_tile_E, int(count_empty))
    return VisitCounts(count_E, jnp.minimum(first_row_tile_E, num_row_tiles - 1))


def list_visits(rows_E: jax.Array, tiles: TileSizes, num_row_tiles: int) -> Visits:
    """Returns all visits, ordered by expert, then row tile."""
    num_experts = rows_E.shape[0]
    count_E, first_row_tile_E = count_visits(rows_E, tiles, num_row_tiles)
    # Every expert but the first may share its first row tile with the expert before it.
    max_num_visits = num_row_tiles + num_experts - 1
    expert_V, index_V = repeat_indices(count_E, max_num_visits)
    row_tile_V = jnp.clip(first_row_tile_E[expert_V] + index_V, 0, num_row_tiles - 1)
    is_visit_V = jnp.arange(max_num_visits) < jnp.sum(count_E)
    return Visits(expert_V, row_tile_V, is_visit_V)


def repeat_indices(count_X: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Repeats every index x of `count_X` count_X[x] times, in order.

    Returns:
      x of each of `length` entries, and the position of the entry among those of its x.
    """
    indices = jnp.arange(count_X.shape[0], dtype=jnp.int32)
    index = jnp.repeat(indices, count_X, total_repeat_length=length)
    start_X = jnp.cumsum(count_X) - count_X
    return index, jnp.arange(length, dtype=jnp.int32) - start_X[index]


def list_column_tiles(
    placement: expert_placement.Placement,
    shard: jax.Array | int,
    num_rows: int,
    tiles: TileSizes,
) -> ColumnTiles:
    """Returns the tables of one shard.

    The tables of all shards are constants, indexed by `shard`, so that all shards run one program.
    """

    def select_shard(lists: list[list[int]]) -> jax.Array:
        padded = [[*row, *[0] * (placement.slots - len(row))] for row in lists]
        return jnp.asarray(padded, jnp.int32)[shard]

    counts = [[w // tiles.hidden for w in widths] for widths in placement.widths]
    experts = [np.repeat(np.arange(len(c)), c) for c in counts]
    return ColumnTiles(
        count_E=select_shard(counts),
        first_flat_tile_E=select_shard([expert_widths.offsets(c) for c in counts]),
        expert_C=jnp.asarray(experts, jnp.int32)[shard],
        max_count=max(map(max, counts)),
        max_num_tasks=max_num_tasks(num_rows, placement, tiles),
    )


def list_hidden_in_tasks(
    rows_E: jax.Array, columns: ColumnTiles, tiles: TileSizes, num_row_tiles: int
) -> TaskList:
    """Returns the tasks ordered by visit, then column tile of the visiting expert.

    The output block of a visit is summed over the column tiles, which are consecutive tasks.
    """
    visits = list_visits(rows_E, tiles, num_row_tiles)
    count_V = jnp.where(visits.is_visit_V, columns.count_E[visits.expert_V], 0)
    visit_T, column_tile_T = repeat_indices(count_V, columns.max_num_tasks)
    column_tile_T = jnp.clip(column_tile_T, 0, columns.max_count - 1)
    expert_T = visits.expert_V[visit_T]
    is_last_T = column_tile_T == columns.count_E[expert_T] - 1
    return TaskList(
        num_tasks=jnp.sum(count_V, dtype=jnp.int32),
        expert_T=expert_T,
        row_tile_T=visits.row_tile_V[visit_T],
        column_tile_T=column_tile_T,
        flat_tile_T=columns.first_flat_tile_E[expert_T] + column_tile_T,
        flags_T=(column_tile_T == 0) + LAST * is_last_T.astype(jnp.int32),
    )


def list_grouped_hidden_out_tasks(
    rows_E: jax.Array,
    columns: ColumnTiles,
    tiles: TileSizes,
    num_row_tiles: int,
    visits_per_group: int,
) -> TaskList:
    """Returns the tasks of a hidden-out kernel in an order that reuses the weights in cache.

    The visits of an expert are divided into groups of nearly equal size, at most
    `visits_per_group`. A group runs column tile by column tile, and every column tile over all
    visits of the group, so that the tasks that run at the same time read few tiles of the weights.
    Every second group runs its column tiles backward (a snake), so that it starts with the tiles
    that the group before it read last.
    """
    visits_E, first_row_tile_E = count_visits(rows_E, tiles, num_row_tiles)
    groups_E = jnp.maximum(1, -(-visits_E // visits_per_group))
    expert_T, index_T = repeat_indices(visits_E * columns.count_E, columns.max_num_tasks)
    # Entries past the last task repeat an index that is in range; they never run.
    num_visits_T = jnp.maximum(1, visits_E[expert_T])
    num_groups_T = groups_E[expert_T]
    num_columns_T = columns.count_E[expert_T]
    index_T = jnp.minimum(index_T, num_visits_T * num_columns_T - 1)
    # Group g holds the visits g * num_visits // num_groups up to that of g + 1.
    group_T = ((index_T // num_columns_T + 1) * num_groups_T - 1) // num_visits_T
    first_visit_T = group_T * num_visits_T // num_groups_T
    group_size_T = (group_T + 1) * num_visits_T // num_groups_T - first_visit_T
    index_in_group_T = index_T - first_visit_T * num_columns_T
    column_tile_T = index_in_group_T // group_size_T
    is_backward_T = group_T % 2 == 1
    column_tile_T = jnp.where(is_backward_T, num_columns_T - 1 - column_tile_T, column_tile_T)
    row_tile_T = first_row_tile_E[expert_T] + first_visit_T + index_in_group_T % group_size_T
    row_tile_T = jnp.minimum(row_tile_T, num_row_tiles - 1)
    return TaskList(
        num_tasks=jnp.sum(visits_E * columns.count_E, dtype=jnp.int32),
        expert_T=expert_T,
        row_tile_T=row_tile_T.astype(jnp.int32),
        column_tile_T=column_tile_T,
        flat_tile_T=columns.first_flat_tile_E[expert_T] + column_tile_T,
        flags_T=None,
    )


def max_num_tasks(num_rows: int, placement: expert_placement.Placement, tiles: TileSizes) -> int:
    """Returns the length of the longest task list that any routing can give any shard.

    R row tiles and E experts have at most R + E - 1 visits. The longest list has one visit of every
    expert, and R - 1 more of the widest one.
    """
    num_row_tiles = -(-num_rows // tiles.rows)
    return max(
        max(widths) // tiles.hidden * (num_row_tiles - 1) + sum(widths) // tiles.hidden
        for widths in placement.widths
    )
