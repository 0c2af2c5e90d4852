"""Work lists of the Pallas expert kernels, built on the device from the routing.

The kernels run tile by tile, and which tiles there are depends on how many tokens each expert
receives. These functions compute the list of tiles as small arrays that the kernels read.

Rows are routed tokens sorted by expert. They are divided into row tiles of `tiles.rows` rows. A
row tile may hold rows of several experts. A *visit* is one (expert, row tile) pair in which the
expert has rows in the tile:

    rows        | 0 0 0 0 | 0 0 1 1 | 1 1 1 3 | 3 3 - - |     the expert of each row
    row tile         0         1         2         3
    visits           e=0       e=0       e=1       e=3        expert 2 has no rows and
                               e=1       e=3                  no visits

The hidden units of a shard's experts follow one another on the flat hidden axis H. Every width is
a multiple of `tiles.hidden`. A tile of `tiles.hidden` hidden units has two numbers:

    flat hidden axis | e=0 | e=1 . e=1 . e=1 | e=2 | e=3 . e=3 |
    flat tile           0     1     2     3     4     5     6
    column tile         0     0     1     2     0     0     1

The flat tile locates it in the weights [D, H]. The column tile locates it in the hidden
activations [N, M], where the hidden units of every expert begin at 0.

A *task* is one visit and one column tile of the visiting expert. The kernels differ in the order of
their tasks. An array needs a static length, so a list has room for the most tasks that any routing
can give (`max_num_tasks`). Only the first `num_tasks` entries run; the rest is filler.

Legend: N rows, D model, E experts of a shard, H flat hidden axis, M widest expert; V visits,
T tasks, C flat tiles; X any.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import expert_placement, expert_widths


class TileSizes(Protocol):
    """The tile sizes that the lists depend on.

    Each kernel module has its own class of tile sizes, which has at least these attributes.
    """

    @property
    def rows(self) -> int:
        """Number of rows (routed tokens) of a row tile."""
        ...

    @property
    def hidden(self) -> int:
        """Number of hidden units of a flat tile or column tile."""
        ...


class VisitCounts(NamedTuple):
    """The row tiles that each expert of a shard visits: consecutive ones, since rows are sorted."""

    count_E: jax.Array  # int32: number of row tiles that the expert visits
    first_row_tile_E: jax.Array  # int32: the first of them


class Visits(NamedTuple):
    """All visits, that is (expert, row tile) pairs, ordered by expert, then filler.

    The arrays have room for the most visits that any routing can give. Filler entries hold valid
    indices, so that looking something up by them is safe, but no kernel runs them.
    """

    expert_V: jax.Array  # int32
    row_tile_V: jax.Array  # int32
    is_visit_V: jax.Array  # bool: False for filler


class ColumnTiles(NamedTuple):
    """The tiles (blocks of equally many hidden units) that the experts of one shard consist of."""

    count_E: jax.Array  # int32: number of tiles of the expert
    first_flat_tile_E: jax.Array  # int32: its first tile on the flat hidden axis
    expert_C: jax.Array  # int32: the expert that owns each tile of the flat hidden axis
    max_count: int  # number of tiles of the widest expert of any shard
    max_num_tasks: int  # static length of the task lists


class TaskList(NamedTuple):
    """The tasks of one kernel in the order in which it runs them.

    A task is one visit (an expert and a row tile) and one tile of the expert's hidden units.
    Entries from `num_tasks` on are filler: they hold valid indices, but never run.

    Some kernels sum the results of several consecutive tasks into one output block. For them,
    flags_T has the bit FIRST in the first task of each sum and the bit LAST in the last one.
    """

    num_tasks: jax.Array  # int32 []
    expert_T: jax.Array  # int32
    row_tile_T: jax.Array  # int32
    column_tile_T: jax.Array  # int32: the tile of hidden units, counted within the expert
    flat_tile_T: jax.Array  # int32: the same tile, counted on the flat hidden axis
    flags_T: jax.Array | None  # int32; None if the kernel sums nothing over tasks


# Bits of TaskList.flags_T: the task begins, or ends, the sum of an output block.
FIRST = 1
LAST = 2


def count_visits(
    rows_E: jax.Array, tiles: TileSizes, num_row_tiles: int, count_empty: bool = False
) -> VisitCounts:
    """Returns how many row tiles each expert has rows in (visits), and the first of them.

    Args:
      rows_E: the number of rows of each expert.
      tiles: the tile sizes.
      num_row_tiles: row tiles of all rows, padding rows included.
      count_empty: counts one visit for an expert without rows, instead of none. The kernel of the
        weight gradients needs it, since it must write zeros for such an expert.
    """
    end_E = jnp.cumsum(rows_E)
    first_row_tile_E = (end_E - rows_E) // tiles.rows
    has_rows_E = rows_E > 0
    end_row_tile_E = -(-end_E // tiles.rows)
    count_E = jnp.where(has_rows_E, end_row_tile_E - first_row_tile_E, int(count_empty))
    return VisitCounts(count_E, jnp.minimum(first_row_tile_E, num_row_tiles - 1))


def list_visits(rows_E: jax.Array, tiles: TileSizes, num_row_tiles: int) -> Visits:
    """Returns all visits, the (expert, row tile) pairs with rows, by expert, then row tile."""
    num_experts = rows_E.shape[0]
    count_E, first_row_tile_E = count_visits(rows_E, tiles, num_row_tiles)
    # Every expert but the first may share its first row tile with the expert before it.
    max_num_visits = num_row_tiles + num_experts - 1
    expert_V, index_V = repeat_indices(count_E, max_num_visits)
    row_tile_V = jnp.clip(first_row_tile_E[expert_V] + index_V, 0, num_row_tiles - 1)
    is_visit_V = jnp.arange(max_num_visits) < jnp.sum(count_E)
    return Visits(expert_V, row_tile_V, is_visit_V)


def repeat_indices(count_X: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Repeats every index x of `count_X` count_X[x] times, in order, like jnp.repeat.

    For counts (2, 0, 3): x = (0, 0, 2, 2, 2), and the position of each entry among those of the
    same x is (0, 1, 0, 1, 2). Entries past the sum of the counts are filler.

    Returns:
      x and the position, int32 [length] each.
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
    """Returns the tiles of hidden units of one shard.

    The devices of an expert axis run the same compiled program. It therefore holds the tables of
    all shards as constants, and `shard`, which may be traced, selects those of this device.

    Args:
      placement: the experts of all shards; every width is a multiple of tiles.hidden.
      shard: the shard.
      num_rows: rows of the arrays that the kernels read, which bounds the length of the task lists.
      tiles: the tile sizes.
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


def list_from_hidden_tasks(
    rows_E: jax.Array, columns: ColumnTiles, tiles: TileSizes, num_row_tiles: int
) -> TaskList:
    """Returns the tasks of a kernel that contracts over hidden units, such as the down projection.

    They are ordered by visit (an expert and a row tile), then by tile of the expert's hidden units.
    The tasks of one visit are thus consecutive, and the kernel sums them into one output block.
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


def list_grouped_to_hidden_tasks(
    rows_E: jax.Array,
    columns: ColumnTiles,
    tiles: TileSizes,
    num_row_tiles: int,
    visits_per_group: int,
) -> TaskList:
    """Returns the tasks of a kernel that outputs hidden units, in an order that suits the L2 cache.

    The visits of an expert (the row tiles in which it has rows) are divided into groups of nearly
    equal size, at most `visits_per_group`. A group runs column tile by column tile, and every
    column tile over all visits of the group, so that the tasks that run at the same time read few
    tiles of the weights. Every second group runs its column tiles backward (a snake), so that it
    starts with the tiles that the group before it read last.
    """
    visits_E, first_row_tile_E = count_visits(rows_E, tiles, num_row_tiles)
    groups_E = jnp.maximum(1, -(-visits_E // visits_per_group))
    expert_T, index_T = repeat_indices(visits_E * columns.count_E, columns.max_num_tasks)
    # Entries past the last task never run. They repeat a valid index, so that every lookup below
    # stays in range.
    num_visits_T = jnp.maximum(1, visits_E[expert_T])
    num_groups_T = groups_E[expert_T]
    num_columns_T = columns.count_E[expert_T]
    index_T = jnp.minimum(index_T, num_visits_T * num_columns_T - 1)
    # Group g begins with visit g * num_visits // num_groups and ends where group g + 1 begins.
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

    A visit is an (expert, row tile) pair in which the expert has rows. R row tiles and E experts
    have at most R + E - 1 visits. The list is longest if every expert has one visit and the widest
    one, whose visits have the most tasks, has the R - 1 others.
    """
    num_row_tiles = -(-num_rows // tiles.rows)
    return max(
        max(widths) // tiles.hidden * (num_row_tiles - 1) + sum(widths) // tiles.hidden
        for widths in placement.widths
    )
