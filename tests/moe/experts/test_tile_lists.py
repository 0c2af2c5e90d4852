"""The order of the tasks of to-hidden kernels, in groups of visits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_widths
from modse_jax.moe.experts import pallas_gpu, tile_lists
from tests.helpers.expert_kernels import place_on_one_shard

TILES = pallas_gpu.Tiles()


def make_tasks(widths, rows, num_row_tiles, visits_per_group=None):
    """Returns the tasks in groups of visits, or ordered by visit if there is no group size."""
    num_rows = num_row_tiles * TILES.rows
    columns = tile_lists.list_column_tiles(place_on_one_shard(widths), 0, num_rows, TILES)
    arguments = (jnp.asarray(rows, jnp.int32), columns, TILES, num_row_tiles)
    if visits_per_group is None:
        return tile_lists.list_from_hidden_tasks(*arguments)
    return tile_lists.list_grouped_to_hidden_tasks(*arguments, visits_per_group)


def to_tuples(tasks):
    """Returns [(expert, row tile, column tile, flat tile)] of all tasks."""
    num_tasks = int(tasks.num_tasks)
    fields = (tasks.expert_T, tasks.row_tile_T, tasks.column_tile_T, tasks.flat_tile_T)
    return list(zip(*(np.asarray(field)[:num_tasks].tolist() for field in fields)))


def count_concurrent_weight_tiles(tasks, num_concurrent):
    """Returns the most distinct flat tiles in any run of so many consecutive tasks."""
    flat_tiles = [flat_tile for *_, flat_tile in to_tuples(tasks)]
    starts = range(max(1, len(flat_tiles) - num_concurrent + 1))
    return max(len(set(flat_tiles[i : i + num_concurrent])) for i in starts)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
)
def test_groups_contain_every_task_once(seed):
    """Random routings, widths and sizes of the groups."""
    rng = np.random.default_rng(seed)
    widths = tuple(int(w) for w in 64 * rng.integers(1, 9, 5))
    rows = rng.multinomial(rng.integers(0, 3000), rng.dirichlet(np.full(5, 0.5)))
    num_row_tiles = -(-3000 // TILES.rows)
    grouped = make_tasks(widths, rows, num_row_tiles, int(rng.integers(1, 12)))
    tasks = to_tuples(grouped)
    assert sorted(tasks) == sorted(to_tuples(make_tasks(widths, rows, num_row_tiles)))
    assert len(set(tasks)) == len(tasks)
    # Entries past the last task are in range too.
    assert int(grouped.row_tile_T.max()) < num_row_tiles
    assert int(grouped.flat_tile_T.min()) >= 0
    assert int(grouped.flat_tile_T.max()) < sum(widths) // TILES.hidden


def test_groups_read_few_weights_at_a_time():
    """Balanced routing over the widths of 300Mx8, on 132 multiprocessors.

    Concurrent tasks read at most a fifth of the widest expert's weights. Ordered by visit, they
    would read all of them.
    """
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)
    num_row_tiles = 256
    rows = [num_row_tiles * TILES.rows // 8 - 3] * 8
    widest = max(widths) // TILES.hidden
    grouped = make_tasks(widths, rows, num_row_tiles, pallas_gpu.VISITS_PER_GROUP)
    assert count_concurrent_weight_tiles(grouped, 132) <= widest // 5
    # A snake: within an expert, the next task has the same tile of the weights or its neighbor.
    for (expert, *_, flat_tile), (next_expert, *_, next_flat_tile) in itertools.pairwise(
        to_tuples(grouped)
    ):
        assert expert != next_expert or abs(flat_tile - next_flat_tile) <= 1
    by_visit = make_tasks(widths, rows, num_row_tiles)
    assert count_concurrent_weight_tiles(by_visit, 132) >= widest
