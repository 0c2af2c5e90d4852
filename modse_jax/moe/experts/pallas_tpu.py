"""The grouped expert FFN as Pallas TPU kernels, over tiles of routed tokens sorted by expert.

Three kernels do all matmuls of the forward and backward passes. Rows are routed tokens, divided
into row tiles of equal size. A *visit* is one (expert, row tile) pair in which the expert has rows;
a row tile that several experts share is visited by each of them (tile_lists.py). A *task* is what a
kernel computes at a time. One task reads and writes the tiles marked #.

    A  to-hidden: one visit x one tile of its expert's hidden units, summed over the model axis
       in steps of `inner`; gate and up, followed by SwiGLU, or its gradient

              D                   flat hidden axis H             widest expert M
          +---------+       +------+--------+---------+          +--+----+
     rows |####|    |   x   |      |  ##    |         |  ->      |##|    | rows of one expert
          +----+----+     D | e=0  |  ##e=1 |   e=2   |          +--+----+
          inner             +------+--------+---------+          hidden

    B  from-hidden: one visit x `outer` of the model axis, summed over the expert's hidden units,
       one tile per task; down, or dx, the sum of two matmuls

         widest expert M        D
          +--+----+          +--+----+          +--+----+
     rows |##|    |   x  e=1 |##|    |  ->      |##|    | rows of one expert
          +--+----+          +--+----+          +--+----+
          hidden             outer

    C  weights: `outer` of the model axis x one tile of the flat hidden axis, summed over the rows
       of the expert that owns these hidden units, one row tile per task; the weight gradients

              D             widest expert M
          +--+----+              +--+----+        +------+--+------+
     rows |##|    |^T  x    rows |##|    |  ->  D |######|##|######|  or its transpose
          +--+----+              +--+----+        +------+--+------+
          outer                  hidden                   H

The lists of tasks are built on the device from the routing and are read from scalar memory. Their
length is a dynamic bound of the grid.

A row tile may hold rows of other experts than the one that a task is for. Kernels A and B store
only the rows of that expert and leave the others unchanged. Kernel C replaces the others by 0 with
a select, before they are summed. No value is masked by a multiplication by 0, which would keep a
NaN. Padding rows, and hidden activations past an expert's width, may therefore hold NaN.

The kernels are tested in interpret mode, and are compiled for v4, v5e, v5p and v6e. They have never
run on hardware (LOG.md).

Legend: N routed tokens (rows), D model, E experts of a shard, H flat hidden axis, M widest expert;
B = E + 1 bounds; P TensorCores; V visits, T tasks, C flat tiles, K column tiles of the widest
expert, R rows of a row tile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import hidden_unit_padding, swiglu, tile_lists

# The lists of tasks must fit in scalar memory, which is 1 MiB. The longest list, that of the
# from-hidden kernel (B), has five int32 per task. Some memory is left for the compiler.
MAX_TASKS = 1_000_000 // (5 * 4)

# On v4 the limit is 16 MiB, whatever is requested; this is why its tiles are smaller.
VMEM_LIMIT = 48 * 2**20

# A Pallas reference to an array in scalar or vector memory. Pallas has no public type for it.
Ref = Any


class Tiles(NamedTuple):
    """Tile sizes of the three kernels.

    Attributes:
      rows: routed tokens in a row tile.
      hidden: hidden units in a tile; divides every expert's width.
      inner: model dimensions in one step of the sum over the model axis (kernel A).
      outer: model dimensions in a tile of the output (kernels B and C).
      cores: TensorCores that share a kernel: 2 if the chip runs as a megacore, else 1.
    """

    rows: int
    hidden: int
    inner: int
    outer: int
    cores: int = 1


class Tiling(NamedTuple):
    """The limits from which `tiles_for` derives the tile sizes for one kind of chip.

    Attributes:
      rows: routed tokens in a row tile.
      hidden: most hidden units in a tile in bfloat16; half as many in float32.
      model: most model dimensions in a tile in bfloat16; half as many in float32.
      unit: the hidden units in a tile must be a multiple of it.
      cores: TensorCores that share a kernel: 2 if the chip runs as a megacore, else 1.
    """

    rows: int
    hidden: int
    model: int
    unit: int
    cores: int


# 512 rows: with 8 experts and 131,072 rows, the row tiles that two experts share cost 2.7% more
# FLOPs; 1,024 rows would cost 5.5%. With the entire model axis in one tile, a tile of the weights
# stays in place from one row tile to the next. Two cores divide the work of the from-hidden (B) and
# weights (C) kernels along the model axis, so it has at least two tiles there; they divide the
# tasks of the to-hidden kernel (A) with `split_tasks`. With tiles of 256 hidden units, the kernels
# are bound by arithmetic, not by memory traffic, on v5e and v5p
# (benchmarks/tpu_report.py) and compile in half the time of 768. The matrix units of v6e are
# 256 x 256; it needs 768, otherwise rows are loaded too often.
TILINGS = {
    "v4": Tiling(rows=512, hidden=128, model=2048, unit=128, cores=2),
    "v5e": Tiling(rows=512, hidden=256, model=2048, unit=128, cores=1),
    "v5p": Tiling(rows=512, hidden=256, model=2048, unit=128, cores=2),
    "v6e": Tiling(rows=512, hidden=768, model=2048, unit=256, cores=1),
}


class Job(NamedTuple):
    """The arguments that the kernels of one forward or backward pass share."""

    rows_E: jax.Array  # int32: number of rows of every expert
    bounds_B: jax.Array  # int32: first row of every expert, then the end of the last one's rows
    shard: jax.Array  # int32 []: the shard of the placement that this device holds
    num_rows: int  # rows of the caller's arrays, before _pad_rows pads them to full row tiles
    placement: expert_placement.Placement
    tiles: Tiles
    interpret: bool

    @property
    def num_row_tiles(self) -> int:
        return max(1, -(-self.num_rows // self.tiles.rows))


class ToHiddenMatmul(NamedTuple):
    """One matmul of the to-hidden kernel (A): rows [N, D] x weights -> hidden units [N, M]."""

    rows_index: int  # index of the left operand in the kernel's list of arrays of rows
    weights: jax.Array  # [D, H], or [H, D] if transposed
    transposed: bool


class FromHiddenMatmul(NamedTuple):
    """One matmul of the from-hidden kernel (B): hidden activations x weights -> rows [N, D]."""

    hidden_NM: jax.Array
    weights: jax.Array  # [H, D], or [D, H] if transposed
    transposed: bool


class CoreTasks(NamedTuple):
    """The range of each TensorCore in the list of tasks of the to-hidden kernel (A)."""

    first_P: jax.Array  # int32: index of the core's first task
    end_P: jax.Array  # int32: index after its last task


class ToHiddenScalars(NamedTuple):
    """The arrays that the to-hidden kernel (A) reads from scalar memory."""

    bounds: Ref  # Job.bounds_B
    first: Ref  # CoreTasks.first_P
    end: Ref  # CoreTasks.end_P
    expert: Ref  # this and the rest: the tasks, see tile_lists.TaskList
    row_tile: Ref
    column_tile: Ref
    flat_tile: Ref


class TaskScalars(NamedTuple):
    """The arrays that the from-hidden (B) and weights (C) kernels read from scalar memory."""

    bounds: Ref  # Job.bounds_B
    expert: Ref  # this and the rest: the tasks, see tile_lists.TaskList
    row_tile: Ref
    column_tile: Ref
    flat_tile: Ref
    flags: Ref


# ---- tiles for a chip ----


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """Returns the tile sizes for experts of these widths, on a chip and in a dtype.

    Raises:
      ValueError: there are no tiles for the chip, or the model dimension cannot be divided into
        tiles. The message names alternatives.
    """
    if chip not in TILINGS:
        raise ValueError(
            f"moe.backend=pallas_tpu needs one of {', '.join(TILINGS)}, this is {chip}; backends "
            "that run anywhere: auto, blocked, reference"
        )
    if dim % 128:
        raise ValueError(
            f"pallas_tpu on {chip}: model.dim={dim} is not divisible by 128; backends that take "
            "any: blocked, reference"
        )
    tiling = TILINGS[chip]
    itemsize = jnp.dtype(dtype).itemsize
    max_hidden = tiling.hidden * 2 // itemsize
    max_model = tiling.model * 2 // itemsize
    padded_widths = [hidden_unit_padding.pad_width(w, tiling.unit) for w in widths]
    return Tiles(
        rows=tiling.rows,
        hidden=_largest_divisor(
            math.gcd(*padded_widths), tiling.unit, max(tiling.unit, max_hidden)
        ),
        inner=_largest_divisor(dim, 128, max_model),
        outer=_largest_divisor(dim, 128, max(128, min(max_model, dim // tiling.cores))),
        cores=tiling.cores,
    )


def unit_for(widths: Sequence[int], chip: str, dtype: str) -> int:
    """Returns the number of hidden units of which every expert's width must be a multiple.

    Other widths are padded; see hidden_unit_padding.py.
    """
    return TILINGS[chip].unit


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError if the task list for so many rows does not fit in scalar memory."""
    num_tasks = tile_lists.max_num_tasks(num_rows, placement, tiles)
    if num_tasks > MAX_TASKS:
        raise ValueError(
            f"pallas_tpu: {num_rows} rows over widths {placement.widths} make {num_tasks} tasks of "
            f"tiles {tiles.rows} x {tiles.hidden}, more than the {MAX_TASKS} that fit in scalar "
            "memory; lower training.batch_size, or use a backend without a list: blocked, reference"
        )


def check_rows(tiles: Tiles) -> int:
    """Returns how many rows an expert needs in a self-test to exercise every path of the kernels.

    They fill more than one row tile, and part of another one.
    """
    return 2 * tiles.rows + 5


def _largest_divisor(number: int, unit: int, largest: int) -> int:
    """Returns the largest divisor of a number that is a multiple of `unit` and <= `largest`."""
    candidates = range(unit, min(number, largest) + 1, unit)
    return max(d for d in candidates if number % d == 0)


# ---- forward and backward passes ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def pallas_tpu(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array | int,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Computes the expert FFN of every row, differentiably.

    Args:
      x_ND: routed tokens sorted by expert. Padding rows after those of the last expert may hold
        anything.
      rows_E: int32, the number of rows of every expert of the shard.
      w_gate: [D, H], in the dtype of x_ND, as are the other weights.
      w_up: [D, H].
      w_down: [H, D].
      shard: int32 scalar, the shard of the placement that this device holds.
      placement: the experts of all shards. Every width is divisible by tiles.hidden, D by
        tiles.inner and tiles.outer, and the number of rows passes check_tasks.
      tiles: tile sizes.
      interpret: whether to run the kernels in Pallas's interpreter, on any device.

    Returns:
      y_ND, 0 in padding rows.
    """
    weights = (w_gate, w_up, w_down)
    return _forward(x_ND, rows_E, *weights, shard, placement, tiles, interpret)[0]


def _forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    shard: jax.Array | int,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns y_ND, and the arguments for `_backward`, which recomputes the activations."""
    job = make_job(x_ND, rows_E, shard, placement, tiles, interpret)
    x = _pad_rows(x_ND, job)
    matmuls = [ToHiddenMatmul(0, w_gate, False), ToHiddenMatmul(0, w_up, False)]
    (hidden_NM,) = run_to_hidden(job, [x], matmuls, _swiglu, num_outputs=1)
    y_ND = run_from_hidden(job, [FromHiddenMatmul(hidden_NM, w_down, False)])
    return _clear_padding(y_ND, job), (x_ND, rows_E, w_gate, w_up, w_down, shard)


def _backward(
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool,
    saved: tuple[Any, ...],
    dy_ND: jax.Array,
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of the six array arguments of `pallas_tpu`."""
    x_ND, rows_E, w_gate, w_up, w_down, shard = saved
    job = make_job(x_ND, rows_E, shard, placement, tiles, interpret)
    x = _pad_rows(x_ND, job)
    dy = _pad_rows(dy_ND, job)
    matmuls = [
        ToHiddenMatmul(0, w_gate, False),
        ToHiddenMatmul(0, w_up, False),
        ToHiddenMatmul(1, w_down, True),
    ]
    hidden_NM, dgate_NM, dup_NM = run_to_hidden(
        job, [x, dy], matmuls, swiglu.swiglu_backward, num_outputs=3
    )
    dx_ND = run_from_hidden(
        job, [FromHiddenMatmul(dgate_NM, w_gate, True), FromHiddenMatmul(dup_NM, w_up, True)]
    )
    dw_gate, dw_up = run_weights(job, x, [dgate_NM, dup_NM], hidden_first=False)
    (dw_down,) = run_weights(job, dy, [hidden_NM], hidden_first=True)
    return _clear_padding(dx_ND, job), None, dw_gate, dw_up, dw_down, None


pallas_tpu.defvjp(_forward, _backward)


def _swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    """Epilogue of the to-hidden kernel (A) in the forward pass: SwiGLU of its two matmuls."""
    return (swiglu.swiglu(gate, up),)


def make_job(
    x_ND: jax.Array,
    rows_E: jax.Array,
    shard: jax.Array | int,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool,
) -> Job:
    """Returns the arguments that the kernels share. Of x_ND only the number of rows is used."""
    end_E = jnp.cumsum(rows_E).astype(jnp.int32)
    bounds_B = jnp.concatenate((jnp.zeros(1, jnp.int32), end_E))
    return Job(rows_E, bounds_B, shard, x_ND.shape[0], placement, tiles, interpret)


def _pad_rows(x_ND: jax.Array, job: Job) -> jax.Array:
    """Appends zero rows, so that the number of rows is a multiple of the row tile size, not 0."""
    missing = job.num_row_tiles * job.tiles.rows - job.num_rows
    return jnp.pad(x_ND, ((0, missing), (0, 0)))


def _clear_padding(y_ND: jax.Array, job: Job) -> jax.Array:
    """Removes the rows that _pad_rows added, and sets the padding rows of the caller to 0.

    The kernels leave arbitrary values in rows that belong to no expert.
    """
    y_ND = y_ND[: job.num_rows]
    is_routed_N = jnp.arange(job.num_rows) < job.bounds_B[-1]
    return jnp.where(is_routed_N[:, None], y_ND, 0)


# ---- task lists ----


def list_column_tiles(job: Job) -> tile_lists.ColumnTiles:
    """Returns the tiles of the hidden units of the job's experts."""
    padded_rows = job.num_row_tiles * job.tiles.rows
    return tile_lists.list_column_tiles(job.placement, job.shard, padded_rows, job.tiles)


def list_to_hidden_tasks(
    rows_E: jax.Array, columns: tile_lists.ColumnTiles, tiles: Tiles, num_row_tiles: int
) -> tile_lists.TaskList:
    """Returns the tasks of the to-hidden kernel (A).

    A task is one visit (an expert and a row tile) and one tile of the expert's hidden units, the
    column tile. Tasks are ordered by column tile, then visit. Experts that share a row tile write
    the same output block; in this order these visits are consecutive. The block then stays in
    vector memory, where each visit replaces the rows of its expert.
    """
    visits = tile_lists.list_visits(rows_E, tiles, num_row_tiles)
    max_num_visits = visits.expert_V.shape[0]
    # A table of all column tiles x all visits, True if the visiting expert has that column tile.
    column_tile_K1 = jnp.arange(columns.max_count)[:, None]
    count_1V = columns.count_E[visits.expert_V][None, :]
    is_task_KV = visits.is_visit_V[None, :] & (column_tile_K1 < count_1V)
    index_T = jnp.nonzero(is_task_KV.reshape(-1), size=columns.max_num_tasks, fill_value=0)[0]
    column_tile_T = (index_T // max_num_visits).astype(jnp.int32)
    visit_T = (index_T % max_num_visits).astype(jnp.int32)
    expert_T = visits.expert_V[visit_T]
    return tile_lists.TaskList(
        num_tasks=jnp.sum(is_task_KV, dtype=jnp.int32),
        expert_T=expert_T,
        row_tile_T=visits.row_tile_V[visit_T],
        column_tile_T=column_tile_T,
        flat_tile_T=columns.first_flat_tile_E[expert_T] + column_tile_T,
        flags_T=None,
    )


def list_weight_tasks(
    rows_E: jax.Array, columns: tile_lists.ColumnTiles, tiles: Tiles, num_row_tiles: int
) -> tile_lists.TaskList:
    """Returns the tasks of the weights kernel (C), which computes the weight gradients.

    A task is one tile of hidden units and one row tile in which the expert that owns them has rows.
    Tasks are ordered by tile of hidden units, then row tile, so that the row tiles that are summed
    into one gradient tile are consecutive. For an expert without rows there is one task per tile of
    hidden units, which writes gradients of 0.
    """
    count_E, first_row_tile_E = tile_lists.count_visits(
        rows_E, tiles, num_row_tiles, count_empty=True
    )
    count_C = count_E[columns.expert_C]
    flat_tile_T, index_T = tile_lists.repeat_indices(count_C, columns.max_num_tasks)
    expert_T = columns.expert_C[flat_tile_T]
    row_tile_T = jnp.clip(first_row_tile_E[expert_T] + index_T, 0, num_row_tiles - 1)
    is_last_T = index_T == count_C[flat_tile_T] - 1
    return tile_lists.TaskList(
        num_tasks=jnp.sum(count_C, dtype=jnp.int32),
        expert_T=expert_T,
        row_tile_T=row_tile_T,
        column_tile_T=flat_tile_T - columns.first_flat_tile_E[expert_T],
        flat_tile_T=flat_tile_T,
        flags_T=(index_T == 0) + tile_lists.LAST * is_last_T.astype(jnp.int32),
    )


def split_tasks(tasks: tile_lists.TaskList, cores: int) -> CoreTasks:
    """Divides the tasks of the to-hidden kernel (A) among TensorCores, in nearly equal shares.

    Consecutive tasks may write rows of the same output block. They must run on one core, so each
    core begins with the first task of a block.
    """
    position_T = jnp.arange(tasks.expert_T.shape[0])
    block_2T = jnp.stack((tasks.column_tile_T, tasks.row_tile_T))
    differs_T = jnp.any(block_2T[:, 1:] != block_2T[:, :-1], axis=0)
    starts_block_T = jnp.concatenate((jnp.ones(1, bool), differs_T))
    num_tasks = tasks.num_tasks
    starts = [jnp.zeros((), jnp.int32)]
    for core in range(1, cores):
        is_start_T = starts_block_T & (position_T >= num_tasks * core // cores)
        starts.append(jnp.min(jnp.where(is_start_T, position_T, num_tasks)))
    bounds = jnp.minimum(jnp.stack([*starts, num_tasks]), num_tasks).astype(jnp.int32)
    first_P = bounds[:-1]
    end_P = bounds[1:]
    # A core without tasks still writes some output block at the end of its grid. To keep that write
    # correct, it is given the tasks of the last block, which both cores then compute.
    starts_real_block_T = starts_block_T & (position_T < num_tasks)
    last_block = jnp.max(jnp.where(starts_real_block_T, position_T, 0)).astype(jnp.int32)
    is_idle_P = first_P == end_P
    return CoreTasks(
        jnp.where(is_idle_P, last_block, first_P), jnp.where(is_idle_P, num_tasks, end_P)
    )


# ---- kernel A: to-hidden ----


def run_to_hidden(
    job: Job,
    row_arrays: Sequence[jax.Array],
    matmuls: Sequence[ToHiddenMatmul],
    epilogue: Callable[..., tuple[jax.Array, ...]],
    num_outputs: int,
) -> Sequence[jax.Array]:
    """Launches the to-hidden kernel (A): rows times their expert's weights, then an epilogue.

    Args:
      job: the arguments that all kernels share.
      row_arrays: the arrays of rows, [N, D] each, that the matmuls refer to by index.
      matmuls: the matmuls to compute.
      epilogue: takes the results of the matmuls in float32 and returns the outputs.
      num_outputs: the number of arrays that the epilogue returns.

    Returns:
      num_outputs arrays [N, M]. Only an expert's own hidden units in its own rows are written; the
      other elements are undefined.
    """
    tiles = job.tiles
    num_padded_rows, dim = row_arrays[0].shape
    dtype = row_arrays[0].dtype
    num_steps = dim // tiles.inner
    columns = list_column_tiles(job)
    tasks = list_to_hidden_tasks(job.rows_E, columns, tiles, job.num_row_tiles)
    core_tasks = split_tasks(tasks, tiles.cores)

    rows_spec = pl.BlockSpec((tiles.rows, tiles.inner), _index_to_hidden_rows)
    weights_specs = [_to_hidden_weights_spec(matmul.transposed, tiles) for matmul in matmuls]
    widest = max(map(max, job.placement.widths))
    out_shape = jax.ShapeDtypeStruct((num_padded_rows, widest), dtype)
    out_block = (tiles.rows, tiles.hidden)
    max_tasks_of_core = jnp.max(core_tasks.end_P - core_tasks.first_P)
    kernel = functools.partial(
        _to_hidden_kernel,
        num_row_arrays=len(row_arrays),
        matmuls=[(matmul.rows_index, matmul.transposed) for matmul in matmuls],
        epilogue=epilogue,
        tiles=tiles,
        num_steps=num_steps,
    )
    scalars = ToHiddenScalars(
        job.bounds_B,
        core_tasks.first_P,
        core_tasks.end_P,
        tasks.expert_T,
        tasks.row_tile_T,
        tasks.column_tile_T,
        tasks.flat_tile_T,
    )
    return pl.pallas_call(
        kernel,
        out_shape=[out_shape] * num_outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[rows_spec] * len(row_arrays) + weights_specs,
            out_specs=[pl.BlockSpec(out_block, _index_to_hidden_outputs)] * num_outputs,
            grid=(tiles.cores, max_tasks_of_core, num_steps),
            scratch_shapes=[pltpu.VMEM(out_block, jnp.float32)] * len(matmuls),
        ),
        compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=job.interpret,
    )(*scalars, *row_arrays, *[matmul.weights for matmul in matmuls])


def _find_task(core: jax.Array, step: jax.Array, scalars: ToHiddenScalars) -> jax.Array:
    """Returns the index of the task of a core in a grid step.

    All cores have equally many grid steps. A core with fewer tasks stays at its last one, which the
    kernel does not run again.
    """
    task = scalars.first[core] + step
    last_task = jnp.maximum(scalars.end[core] - 1, 0)
    return jnp.minimum(task, last_task)


def _index_to_hidden_rows(core: jax.Array, step: jax.Array, q: jax.Array, *refs: Ref) -> tuple:
    scalars = ToHiddenScalars(*refs)
    return scalars.row_tile[_find_task(core, step, scalars)], q


def _index_to_hidden_weights(
    core: jax.Array, step: jax.Array, q: jax.Array, *refs: Ref, transposed: bool
) -> tuple:
    scalars = ToHiddenScalars(*refs)
    flat_tile = scalars.flat_tile[_find_task(core, step, scalars)]
    return (flat_tile, q) if transposed else (q, flat_tile)


def _to_hidden_weights_spec(transposed: bool, tiles: Tiles) -> pl.BlockSpec:
    block = (tiles.inner, tiles.hidden)
    if transposed:
        block = block[::-1]
    index_map = functools.partial(_index_to_hidden_weights, transposed=transposed)
    return pl.BlockSpec(block, index_map)


def _index_to_hidden_outputs(core: jax.Array, step: jax.Array, q: jax.Array, *refs: Ref) -> tuple:
    scalars = ToHiddenScalars(*refs)
    task = _find_task(core, step, scalars)
    return scalars.row_tile[task], scalars.column_tile[task]


def _to_hidden_kernel(
    *refs: Ref,
    num_row_arrays: int,
    matmuls: Sequence[tuple[int, bool]],
    epilogue: Callable[..., tuple[jax.Array, ...]],
    tiles: Tiles,
    num_steps: int,
) -> None:
    """Computes one grid step: adds one step along the model axis to the sums of one task.

    The last step of a task applies the epilogue and stores the rows of the task's expert.

    Args:
      refs: scalars, rows, weights, outputs, and one float32 sum in scratch memory per matmul.
      num_row_arrays: the number of arrays of rows among the refs.
      matmuls: for each matmul the index of its array of rows, and True for transposed weights.
      epilogue: see run_to_hidden.
      tiles: the tile sizes.
      num_steps: steps along the model axis.
    """
    num_scalars = len(ToHiddenScalars._fields)
    scalars = ToHiddenScalars(*refs[:num_scalars])
    rows_refs, refs = _split_refs(refs[num_scalars:], num_row_arrays)
    weights_refs, refs = _split_refs(refs, len(matmuls))
    out_refs, sum_refs = _split_refs(refs, len(refs) - len(matmuls))
    core = pl.program_id(0)
    q = pl.program_id(2)
    task = scalars.first[core] + pl.program_id(1)

    @pl.when(task < scalars.end[core])
    def run_step() -> None:
        for matmul, weights_ref, sum_ref in zip(matmuls, weights_refs, sum_refs):
            rows_index, transposed = matmul
            rows = rows_refs[rows_index][...]
            new = _dot(rows, weights_ref[...], 1, 1 if transposed else 0)
            sum_ref[...] = jnp.where(q == 0, new, sum_ref[...] + new)

        @pl.when(q == num_steps - 1)
        def store_own_rows() -> None:
            own_R1 = _own_rows(scalars, task, tiles)
            outputs = epilogue(*(sum_ref[...] for sum_ref in sum_refs))
            for out_ref, value in zip(out_refs, outputs):
                _store_rows(out_ref, value, own_R1)


# ---- kernel B: from-hidden ----


def run_from_hidden(job: Job, matmuls: Sequence[FromHiddenMatmul]) -> jax.Array:
    """Launches the from-hidden kernel (B): hidden activations times their expert's weights.

    Args:
      job: the arguments that all kernels share.
      matmuls: one matmul for the down projection, two for the gradient of the input.

    Returns:
      The sum of the matmuls, [N, D]. Rows that belong to no expert are undefined.
    """
    tiles = job.tiles
    first = matmuls[0]
    num_padded_rows = first.hidden_NM.shape[0]
    dim = first.weights.shape[0 if first.transposed else 1]
    columns = list_column_tiles(job)
    tasks = tile_lists.list_from_hidden_tasks(job.rows_E, columns, tiles, job.num_row_tiles)

    def index_weights(q: jax.Array, task: jax.Array, *refs: Ref, transposed: bool) -> tuple:
        flat_tile = TaskScalars(*refs).flat_tile[task]
        return (q, flat_tile) if transposed else (flat_tile, q)

    in_specs = []
    for matmul in matmuls:
        in_specs.append(pl.BlockSpec((tiles.rows, tiles.hidden), _index_hidden))
        block = (tiles.hidden, tiles.outer)
        if matmul.transposed:
            block = block[::-1]
        index_map = functools.partial(index_weights, transposed=matmul.transposed)
        in_specs.append(pl.BlockSpec(block, index_map))
    out_block = (tiles.rows, tiles.outer)
    return pl.pallas_call(
        functools.partial(
            _from_hidden_kernel, transposed=[matmul.transposed for matmul in matmuls], tiles=tiles
        ),
        out_shape=jax.ShapeDtypeStruct((num_padded_rows, dim), first.hidden_NM.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(TaskScalars._fields),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(out_block, _index_rows),
            grid=(dim // tiles.outer, tasks.num_tasks),
            scratch_shapes=[pltpu.VMEM(out_block, jnp.float32)],
        ),
        compiler_params=_compiler_params("parallel", "arbitrary"),
        interpret=job.interpret,
    )(
        *_task_scalars(job, tasks),
        *[operand for matmul in matmuls for operand in (matmul.hidden_NM, matmul.weights)],
    )


def _from_hidden_kernel(*refs: Ref, transposed: Sequence[bool], tiles: Tiles) -> None:
    """Computes one task: adds one tile of the expert's hidden units to the sum of a visit.

    The last task of a visit (an expert and a row tile) stores the rows of the expert.

    Args:
      refs: scalars, hidden activations and weights of each matmul, the output, and the float32 sum
        in scratch memory.
      transposed: for each matmul True if its weights are transposed.
      tiles: the tile sizes.
    """
    num_scalars = len(TaskScalars._fields)
    scalars = TaskScalars(*refs[:num_scalars])
    *operand_refs, out_ref, sum_ref = refs[num_scalars:]
    task = pl.program_id(1)
    new = sum(
        _dot(hidden_ref[...], weights_ref[...], 1, 1 if is_transposed else 0)
        for hidden_ref, weights_ref, is_transposed in zip(
            operand_refs[::2], operand_refs[1::2], transposed
        )
    )
    sum_ref[...] = jnp.where(_is_first(scalars, task), new, sum_ref[...] + new)

    @pl.when(_is_last(scalars, task))
    def store_own_rows() -> None:
        _store_rows(out_ref, sum_ref[...], _own_rows(scalars, task, tiles))


# ---- kernel C: weights ----


def run_weights(
    job: Job, rows_ND: jax.Array, hiddens: Sequence[jax.Array], hidden_first: bool
) -> Sequence[jax.Array]:
    """Launches the weights kernel (C), which computes weight gradients.

    For every expert it multiplies rows by hidden activations, summed over the expert's rows.

    Args:
      job: the arguments that all kernels share.
      rows_ND: the inputs of the experts, or the gradients of their outputs.
      hiddens: hidden activations or their gradients, [N, M] each.
      hidden_first: True for w_down [H, D], False for w_gate and w_up [D, H].

    Returns:
      One weight gradient for each of `hiddens`.
    """
    tiles = job.tiles
    dim = rows_ND.shape[1]
    num_hidden = sum(job.placement.widths[0])
    columns = list_column_tiles(job)
    tasks = list_weight_tasks(job.rows_E, columns, tiles, job.num_row_tiles)
    block = (tiles.outer, tiles.hidden)
    shape = (dim, num_hidden)
    if hidden_first:
        block = block[::-1]
        shape = shape[::-1]

    def index_outputs(q: jax.Array, task: jax.Array, *refs: Ref) -> tuple:
        flat_tile = TaskScalars(*refs).flat_tile[task]
        return (flat_tile, q) if hidden_first else (q, flat_tile)

    rows_spec = pl.BlockSpec((tiles.rows, tiles.outer), _index_rows)
    hidden_spec = pl.BlockSpec((tiles.rows, tiles.hidden), _index_hidden)
    num_outputs = len(hiddens)
    return pl.pallas_call(
        functools.partial(
            _weights_kernel, hidden_first=hidden_first, tiles=tiles, num_outputs=num_outputs
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, rows_ND.dtype)] * num_outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(TaskScalars._fields),
            in_specs=[rows_spec] + [hidden_spec] * num_outputs,
            out_specs=[pl.BlockSpec(block, index_outputs)] * num_outputs,
            grid=(dim // tiles.outer, tasks.num_tasks),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)] * num_outputs,
        ),
        compiler_params=_compiler_params("parallel", "arbitrary"),
        interpret=job.interpret,
    )(*_task_scalars(job, tasks), rows_ND, *hiddens)


def _weights_kernel(*refs: Ref, hidden_first: bool, tiles: Tiles, num_outputs: int) -> None:
    """Computes one task: adds one row tile to the sum over an expert's rows.

    The last row tile of an expert stores the sums.

    Args:
      refs: scalars, rows, hidden activations, outputs, and one float32 sum in scratch memory per
        output.
      hidden_first: see run_weights.
      tiles: the tile sizes.
      num_outputs: the number of outputs, and of arrays of hidden activations.
    """
    num_scalars = len(TaskScalars._fields)
    scalars = TaskScalars(*refs[:num_scalars])
    rows_ref, *refs = refs[num_scalars:]
    hidden_refs, refs = _split_refs(refs, num_outputs)
    out_refs, sum_refs = _split_refs(refs, num_outputs)
    task = pl.program_id(1)
    own_R1 = _own_rows(scalars, task, tiles)
    rows = _load_own_rows(rows_ref, own_R1)
    for hidden_ref, sum_ref in zip(hidden_refs, sum_refs):
        hidden = _load_own_rows(hidden_ref, own_R1)
        new = _dot(hidden, rows, 0, 0) if hidden_first else _dot(rows, hidden, 0, 0)
        sum_ref[...] = jnp.where(_is_first(scalars, task), new, sum_ref[...] + new)

    @pl.when(_is_last(scalars, task))
    def store() -> None:
        for out_ref, sum_ref in zip(out_refs, sum_refs):
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)


# ---- shared by the kernels ----


def _task_scalars(job: Job, tasks: tile_lists.TaskList) -> TaskScalars:
    return TaskScalars(
        job.bounds_B,
        tasks.expert_T,
        tasks.row_tile_T,
        tasks.column_tile_T,
        tasks.flat_tile_T,
        tasks.flags_T,
    )


def _index_rows(q: jax.Array, task: jax.Array, *refs: Ref) -> tuple:
    """Index map of an array [N, D] in the from-hidden (B) and weights (C) kernels."""
    return TaskScalars(*refs).row_tile[task], q


def _index_hidden(q: jax.Array, task: jax.Array, *refs: Ref) -> tuple:
    """Index map of hidden activations [N, M] in the from-hidden (B) and weights (C) kernels."""
    scalars = TaskScalars(*refs)
    return scalars.row_tile[task], scalars.column_tile[task]


def _split_refs(refs: Sequence[Ref], count: int) -> tuple[Sequence[Ref], Sequence[Ref]]:
    return refs[:count], refs[count:]


def _is_first(scalars: TaskScalars, task: jax.Array) -> jax.Array:
    """Returns whether the task is the first one of its output block."""
    return scalars.flags[task] % tile_lists.LAST == tile_lists.FIRST


def _is_last(scalars: TaskScalars, task: jax.Array) -> jax.Array:
    """Returns whether the task is the last one of its output block."""
    return scalars.flags[task] >= tile_lists.LAST


def _own_rows(scalars: ToHiddenScalars | TaskScalars, task: jax.Array, tiles: Tiles) -> jax.Array:
    """Returns a mask [R, 1] of the rows of the task's row tile that belong to its expert."""
    expert = scalars.expert[task]
    first_row = scalars.row_tile[task] * tiles.rows
    row_R1 = first_row + lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
    return (row_R1 >= scalars.bounds[expert]) & (row_R1 < scalars.bounds[expert + 1])


def _load_own_rows(ref: Ref, own_R1: jax.Array) -> jax.Array:
    """Returns a row tile with 0 in the rows that do not belong to the task's expert.

    Those rows may hold NaN, which would spoil a sum over rows.
    """
    tile = ref[...].astype(jnp.float32)
    return jnp.where(own_R1, tile, 0).astype(ref.dtype)


def _store_rows(ref: Ref, value: jax.Array, own_R1: jax.Array) -> None:
    """Stores the rows of a tile that the mask selects, and leaves the others unchanged.

    The others belong to experts that share the row tile, or to none.
    """
    previous = ref[...].astype(jnp.float32)
    ref[...] = jnp.where(own_R1, value, previous).astype(ref.dtype)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contracts axis_a of a with axis_b of b, accumulated in float32."""
    # By default, TPUs multiply float32 in bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _compiler_params(*dimension_semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=dimension_semantics, vmem_limit_bytes=VMEM_LIMIT
    )
