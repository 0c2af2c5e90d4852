"""The grouped expert FFN as Pallas Mosaic GPU kernels for Hopper (sm90), in tiles of routed tokens.

Rows are routed tokens, sorted by expert and divided into row tiles of equal size. A *visit* is one
(expert, row tile) pair in which the expert has rows; a row tile that several experts share is
visited by each of them. Three kernels do all matmuls of the forward and backward passes. The tiles
marked # are those of one task, which a kernel computes at a time.

    A  to-hidden: one visit x 64 hidden units of its expert      [rows, D] x [D, 64]
       forward: gate and up, followed by SwiGLU; backward: the gradient of the hidden
       activations, followed by the gradient of SwiGLU

              D                   flat hidden axis H
          +---------+       +------+--------+---------+          +--+
     rows |####|    |   x   |      |  ##    |         |  ->      |##| rows of one expert
          +----+----+     D | e=0  |  ##e=1 |   e=2   |          +--+
                            +------+--------+---------+           64 of its hidden units

    B  from-hidden: one visit x 128 of the model axis, summed over the expert's hidden units
       forward: down; backward: dx, the sum of two matmuls

         widest expert          D
          +-------+          +--+----+
     rows |#####  |   x  e=1 |##|    |  ->  [rows, 128]
          +-------+          +--+----+

    C  weights: 128 of the model axis x `wide` of the flat hidden axis, summed over the rows
       of the expert that owns these hidden units: the three weight gradients

             128                   wide
          +--+----+              +--+----+
     rows |##|    |^T  x    rows |##|    |  ->  [128, wide] or [wide, 128]
          +--+----+              +--+----+

The kernels are persistent: there is one thread block on each of the n multiprocessors, and it takes
every n-th task of a list. The list is built on the device from the routing (tile_lists.py), once
per layer. Weights are read through one descriptor of the flat hidden axis. Operands that a matmul
needs transposed are transposed as they are read from shared memory, so no transposed copy is made
of any array.

A row tile may hold rows of other experts than the one that a task is for. Kernels A and B store
only the rows of that expert. Kernel C sets the others to 0 by a select before they are summed.
Rows after those of the last expert, and hidden units after those of a narrow expert, may therefore
hold NaN.

The kernels are tested in interpret mode, which does not model asynchronous copies, and are
compiled to machine code for an H100. They have not run on hardware (LOG.md).

Legend: N routed tokens (rows), D model, E experts, H flat hidden axis, M widest expert; V visits,
T tasks of kernel A, C tiles of the flat hidden axis; X any.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import hidden_unit_padding, swiglu, tile_lists

# Number of multiprocessors of each chip.
CHIPS = {"h100": 132, "h200": 132}

DTYPES = ("bfloat16", "float16")

# The length of one pipeline step of a contraction. It is also the number of hidden units in a tile
# of the to-hidden kernel (A), which is small because that kernel has two sums in registers.
UNIT = 64

# The model dimensions in a tile of the from-hidden (B) and weights (C) kernels.
MODEL = 128

MAX_TASKS = 2**24

# Tasks of the to-hidden kernel (A) are ordered in groups of visits, so that those that run at the
# same time read the same data from the 50 MB L2 cache. With 10 visits in a group, 132 tasks read 10
# tiles of rows (3.9 MB at D=1536) and about 14 tiles of both weights (5.5 MB). If each tile of rows
# went through all hidden units first, they would read 42 MB of weights at 300Mx8.
VISITS_PER_GROUP = 10

# A Pallas reference to an array in global or shared memory, or to an accumulator in registers.
# Pallas has no public type for it.
Ref = Any


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of the three kernels.

    Attributes:
      rows: routed tokens in a row tile.
      hidden: hidden units in a tile of the to-hidden kernel (A).
      wide: hidden units in a tile of the weights kernel (C).
      stages: pipeline steps whose loads are in flight.
      blocks: thread blocks of a kernel, one per multiprocessor.
    """

    rows: int = 128
    hidden: int = UNIT
    wide: int = 128
    stages: int = 4
    blocks: int = 132


class ToHiddenTasks(NamedTuple):
    """The tasks of the to-hidden kernel (A): one visit and one tile of hidden units each.

    A visit is an expert and a row tile in which it has rows. Entries from `num_tasks` on are filler
    that never runs. All arrays are int32.
    """

    num_tasks: jax.Array  # [1]
    start_T: jax.Array  # first row of the expert, counted within the row tile
    end_T: jax.Array  # the row after its last one, within the row tile
    row_tile_T: jax.Array
    column_tile_T: jax.Array  # tile of the expert's own hidden units
    flat_tile_T: jax.Array  # the same tile on the flat hidden axis


class FromHiddenTasks(NamedTuple):
    """The tasks of the from-hidden kernel (B): the visits, those of the widest expert first.

    A visit is an expert and a row tile in which it has rows. Entries from `num_visits` on are
    filler that never runs. All arrays are int32.
    """

    num_visits: jax.Array  # [1]
    start_V: jax.Array  # first row of the expert, counted within the row tile
    end_V: jax.Array  # the row after its last one, within the row tile
    row_tile_V: jax.Array
    steps_V: jax.Array  # number of tiles of hidden units of the expert
    first_flat_tile_V: jax.Array  # its first tile on the flat hidden axis


class WeightTasks(NamedTuple):
    """The tasks of the weights kernel (C): one tile of the flat hidden axis each.

    Tiles of the expert with the most rows come first. All arrays are int32.
    """

    start_C: jax.Array  # first row of the expert
    end_C: jax.Array  # the row after its last one
    column_tile_C: jax.Array  # tile of the expert's own hidden units
    flat_tile_C: jax.Array  # the same tile on the flat hidden axis


class Lists(NamedTuple):
    """The task lists of the three kernels for one routing of tokens to experts."""

    to_hidden: ToHiddenTasks
    from_hidden: FromHiddenTasks
    weights: WeightTasks
    num_rows: jax.Array  # int32 []: routed tokens of all experts, without padding rows


class Saved(NamedTuple):
    """The arrays that the forward pass saves for the backward pass."""

    gate_NM: jax.Array
    up_NM: jax.Array
    lists: Lists


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """Returns the tile sizes for experts of these widths on a chip.

    Raises:
      ValueError: the chip, the dtype or the model dimension is not supported. The message names
        backends that would run.
    """
    if chip not in CHIPS:
        raise ValueError(
            f"moe.backend=pallas_gpu needs one of {', '.join(CHIPS)}, this is {chip}; backends "
            "that run anywhere: auto, blocked, reference"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"pallas_gpu multiplies {' and '.join(DTYPES)}, not {dtype}; set model.dtype=bfloat16, "
            "or use a backend that takes any: blocked, reference"
        )
    if dim % MODEL:
        raise ValueError(
            f"pallas_gpu on {chip}: model.dim={dim} is not divisible by {MODEL}; backends that "
            "take any: blocked, reference"
        )
    padded_widths = [hidden_unit_padding.pad_width(w, UNIT) for w in widths]
    wide = 128 if all(w % 128 == 0 for w in padded_widths) else UNIT
    return Tiles(wide=wide, blocks=_count_multiprocessors(chip))


def unit_for(widths: Sequence[int], chip: str, dtype: str) -> int:
    """Returns the number of hidden units of which every expert's width must be a multiple.

    Other widths are padded; see hidden_unit_padding.py.
    """
    return UNIT


def _count_multiprocessors(chip: str) -> int:
    """Returns the number of multiprocessors of this machine's GPU.

    It is read from the device, because GPUs of one name may differ in it. Without a GPU it is the
    usual number of the chip that is compiled for.
    """
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else CHIPS[chip]


def check_rows(tiles: Tiles) -> int:
    """Returns how many rows an expert needs in a self-test to exercise every path of the kernels.

    They fill more than one row tile and part of another one, and need more pipeline steps than are
    in flight at a time.
    """
    return 2 * tiles.rows + (tiles.stages + 2) * UNIT + 5


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError if the task list for so many rows would be too long."""
    num_tasks = tile_lists.max_num_tasks(num_rows, placement, tiles)
    if num_tasks > MAX_TASKS:
        raise ValueError(
            f"pallas_gpu: {num_rows} rows over widths {placement.widths} make {num_tasks} tasks of "
            f"tiles {tiles.rows} x {tiles.hidden}, more than {MAX_TASKS}; lower "
            "training.batch_size, or use a backend without a list: blocked, reference"
        )


# ---- forward and backward passes ----


def forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: Any,
    save: bool,
) -> tuple[jax.Array, Saved | None]:
    """Computes the expert FFN of every row. See chunks.py for the arguments and results.

    Every width must be divisible by 64 and D by 128, the dtype must be bfloat16 or float16, and the
    number of rows must pass check_tasks.
    """
    w_gate, w_up, w_down = weights
    x = _pad_rows(x_ND, tiles)
    lists = build_lists(rows_E, shard, x.shape[0], placement, tiles)
    hidden_NM, *saved = run_to_hidden(
        x,
        (w_gate, w_up),
        transposed=False,
        epilogue=_swiglu_and_inputs if save else _swiglu,
        num_outputs=3 if save else 1,
        saved=(),
        tasks=lists.to_hidden,
        widest=_widest(placement),
        tiles=tiles,
        interpret=interpret,
    )
    y = run_from_hidden([(hidden_NM, w_down)], False, lists.from_hidden, tiles, interpret)
    y_ND = _clear_padding(y, x_ND.shape[0], lists)
    return y_ND, Saved(*saved, lists) if save else None


def backward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    saved: Saved,
    dy_ND: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (dx_ND, dw_gate, dw_up, dw_down). See chunks.py for the arguments."""
    w_gate, w_up, w_down = weights
    x = _pad_rows(x_ND, tiles)
    dy = _pad_rows(dy_ND, tiles)
    lists = saved.lists
    hidden_NM, dgate_NM, dup_NM = run_to_hidden(
        dy,
        (w_down,),
        transposed=True,
        epilogue=_swiglu_backward,
        num_outputs=3,
        saved=(saved.gate_NM, saved.up_NM),
        tasks=lists.to_hidden,
        widest=_widest(placement),
        tiles=tiles,
        interpret=interpret,
    )
    dx = run_from_hidden(
        [(dgate_NM, w_gate), (dup_NM, w_up)], True, lists.from_hidden, tiles, interpret
    )
    run_weights_kernel = functools.partial(
        run_weights,
        num_hidden=w_gate.shape[1],
        tasks=lists.weights,
        tiles=tiles,
        interpret=interpret,
    )
    dw_gate = run_weights_kernel(x, dgate_NM, hidden_first=False)
    dw_up = run_weights_kernel(x, dup_NM, hidden_first=False)
    dw_down = run_weights_kernel(dy, hidden_NM, hidden_first=True)
    return _clear_padding(dx, x_ND.shape[0], lists), dw_gate, dw_up, dw_down


def _swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    """Epilogue of the to-hidden kernel (A) in a forward pass that saves nothing: SwiGLU."""
    return (swiglu.swiglu(gate, up),)


def _swiglu_and_inputs(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    """Epilogue of the to-hidden kernel (A) in training: SwiGLU, and gate and up to be saved."""
    return swiglu.swiglu(gate, up), gate, up


def _swiglu_backward(dhidden: jax.Array, gate: jax.Array, up: jax.Array) -> swiglu.SwigluBackward:
    """Epilogue of the to-hidden kernel (A) in the backward pass: the gradient of SwiGLU."""
    return swiglu.swiglu_backward(gate, up, dhidden)


def _widest(placement: expert_placement.Placement) -> int:
    return max(max(widths) for widths in placement.widths)


def _pad_rows(x_ND: jax.Array, tiles: Tiles) -> jax.Array:
    """Appends zero rows, so that the number of rows is a multiple of the row tile size, not 0."""
    num_row_tiles = max(1, -(-x_ND.shape[0] // tiles.rows))
    num_rows = num_row_tiles * tiles.rows
    return jnp.pad(x_ND, ((0, num_rows - x_ND.shape[0]), (0, 0)))


def _clear_padding(y_ND: jax.Array, num_rows: int, lists: Lists) -> jax.Array:
    """Returns the first num_rows rows, with 0 in those that belong to no expert.

    The kernels leave arbitrary values there.
    """
    routed_N1 = (jnp.arange(num_rows) < lists.num_rows)[:, None]
    return jnp.where(routed_N1, y_ND[:num_rows], 0)


# ---- task lists ----


def build_lists(
    rows_E: jax.Array,
    shard: jax.Array,
    num_rows: int,
    placement: expert_placement.Placement,
    tiles: Tiles,
) -> Lists:
    """Builds the task lists of all kernels for one routing of tokens to experts.

    Args:
      rows_E: the number of rows of every expert of the shard.
      shard: the shard that this device holds.
      num_rows: routed tokens and padding rows, a multiple of tiles.rows.
      placement: the experts of all shards.
      tiles: the tile sizes.
    """
    columns = tile_lists.list_column_tiles(placement, shard, num_rows, tiles)
    end_E = jnp.cumsum(rows_E).astype(jnp.int32)
    start_E = end_E - rows_E
    return Lists(
        _list_to_hidden_tasks(rows_E, start_E, end_E, columns, tiles, num_rows),
        _list_from_hidden_tasks(rows_E, start_E, end_E, columns, tiles, num_rows),
        _list_weight_tasks(rows_E, start_E, end_E, columns, tiles),
        end_E[-1],
    )


def _find_own_rows(
    start_E: jax.Array, end_E: jax.Array, expert_X: jax.Array, row_tile_X: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Returns which rows of each row tile belong to the expert that visits it.

    Args:
      start_E, end_E: the first row of every expert, and the row after its last one.
      expert_X, row_tile_X: the visits.
      tiles: the tile sizes.

    Returns:
      (start_X, end_X), counted from the first row of the row tile.
    """
    first_row_X = row_tile_X * tiles.rows
    start_X = jnp.maximum(start_E[expert_X] - first_row_X, 0)
    end_X = jnp.minimum(end_E[expert_X] - first_row_X, tiles.rows)
    return start_X, end_X


def _list_to_hidden_tasks(
    rows_E: jax.Array,
    start_E: jax.Array,
    end_E: jax.Array,
    columns: tile_lists.ColumnTiles,
    tiles: Tiles,
    num_rows: int,
) -> ToHiddenTasks:
    tasks = tile_lists.list_grouped_to_hidden_tasks(
        rows_E, columns, tiles, num_rows // tiles.rows, VISITS_PER_GROUP
    )
    num_tasks = tasks.num_tasks[None]
    start_T, end_T = _find_own_rows(start_E, end_E, tasks.expert_T, tasks.row_tile_T, tiles)
    return ToHiddenTasks(
        num_tasks, start_T, end_T, tasks.row_tile_T, tasks.column_tile_T, tasks.flat_tile_T
    )


def _list_from_hidden_tasks(
    rows_E: jax.Array,
    start_E: jax.Array,
    end_E: jax.Array,
    columns: tile_lists.ColumnTiles,
    tiles: Tiles,
    num_rows: int,
) -> FromHiddenTasks:
    """Lists the visits (an expert and a row tile each), those of the widest expert first.

    A task takes longer for a wider expert. The longest tasks start first, so that no multiprocessor
    is left with one at the end.
    """
    visits = tile_lists.list_visits(rows_E, tiles, num_rows // tiles.rows)
    steps_V = jnp.where(visits.is_visit_V, columns.count_E[visits.expert_V], 0)
    order_V = jnp.argsort(-steps_V, stable=True)
    expert_V = visits.expert_V[order_V]
    row_tile_V = visits.row_tile_V[order_V]
    steps_V = steps_V[order_V]
    num_visits = jnp.sum(visits.is_visit_V, dtype=jnp.int32)[None]
    start_V, end_V = _find_own_rows(start_E, end_E, expert_V, row_tile_V, tiles)
    first_flat_tile_V = columns.first_flat_tile_E[expert_V]
    return FromHiddenTasks(num_visits, start_V, end_V, row_tile_V, steps_V, first_flat_tile_V)


def _list_weight_tasks(
    rows_E: jax.Array,
    start_E: jax.Array,
    end_E: jax.Array,
    columns: tile_lists.ColumnTiles,
    tiles: Tiles,
) -> WeightTasks:
    # The weights kernel (C) may have wider tiles than those of `columns`.
    scale = tiles.wide // tiles.hidden
    expert_C = columns.expert_C[::scale]
    flat_tile_C = jnp.arange(expert_C.shape[0], dtype=jnp.int32)
    column_tile_C = flat_tile_C - columns.first_flat_tile_E[expert_C] // scale
    order_C = jnp.argsort(-rows_E[expert_C], stable=True).astype(jnp.int32)
    expert_C = expert_C[order_C]
    return WeightTasks(start_E[expert_C], end_E[expert_C], column_tile_C[order_C], order_C)


# ---- kernel A: to-hidden ----


def run_to_hidden(
    rows_ND: jax.Array,
    weights: Sequence[jax.Array],
    transposed: bool,
    epilogue: Callable[..., tuple[jax.Array, ...]],
    num_outputs: int,
    saved: Sequence[jax.Array],
    tasks: ToHiddenTasks,
    widest: int,
    tiles: Tiles,
    interpret: Any,
) -> Sequence[jax.Array]:
    """Launches the to-hidden kernel (A): rows times their expert's weights, then an epilogue.

    Args:
      rows_ND: rows sorted by expert.
      weights: [D, H] each, or [H, D] if transposed.
      transposed: whether the weights are transposed.
      epilogue: takes the matmul with each of the weights, and each of the `saved` arrays, all in
        float32, and returns the outputs, which are then rounded to the dtype of rows_ND.
      num_outputs: the number of outputs.
      saved: [N, M] arrays of the forward pass; may be empty.
      tasks: the task list.
      widest: M, the number of hidden units of the widest expert.
      tiles: the tile sizes.
      interpret: runs the kernel in Pallas's interpreter.

    Returns:
      num_outputs arrays [N, M]. Only an expert's own hidden units in its own rows are written; the
      other elements are undefined.
    """
    dtype = rows_ND.dtype
    first_saved = len(weights)
    first_output = first_saved + len(saved)

    def to_hidden_kernel(*refs: Ref) -> None:
        num_lists = len(ToHiddenTasks._fields)
        lists = ToHiddenTasks(*refs[:num_lists])
        x_gmem, *refs = refs[num_lists:]
        w_gmem = refs[:first_saved]
        saved_gmem = refs[first_saved:first_output]
        out_gmem = refs[first_output:]

        @plgpu.nd_loop((lists.num_tasks[0],), collective_axes="sm")
        def run_task(loop: plgpu.NDLoopInfo) -> None:
            task = loop.index[0]
            row_tile = lists.row_tile_T[task]
            column_tile = lists.column_tile_T[task]
            flat_tile = lists.flat_tile_T[task]
            sums = _multiply_to_hidden(
                x_gmem, w_gmem, row_tile, flat_tile, transposed, tiles, interpret
            )
            first_row = row_tile * tiles.rows
            units = pl.ds(column_tile * tiles.hidden, tiles.hidden)

            def finish(saved_tiles: Sequence[jax.Array]) -> None:
                outputs = [value.astype(dtype) for value in epilogue(*sums, *saved_tiles)]
                start, end = lists.start_T[task], lists.end_T[task]
                _store_rows(outputs, out_gmem, first_row, start, end, units)

            rows = pl.ds(first_row, tiles.rows)
            saved_tiles_gmem = [gmem.at[rows, units] for gmem in saved_gmem]
            _load_tiles(saved_tiles_gmem, (tiles.rows, tiles.hidden), dtype, finish)

    widest_type = jax.ShapeDtypeStruct((rows_ND.shape[0], widest), dtype)
    kernel = _make_kernel(to_hidden_kernel, [widest_type] * num_outputs, tiles, interpret)
    return kernel(*tasks, rows_ND, *weights, *saved)


def _multiply_to_hidden(
    x_gmem: Ref,
    w_gmem: Sequence[Ref],
    row_tile: jax.Array,
    flat_tile: jax.Array,
    transposed: bool,
    tiles: Tiles,
    interpret: Any,
) -> Sequence[jax.Array]:
    """Multiplies a row tile by one tile of hidden units of each weight; returns float32 sums."""
    dim = x_gmem.shape[1]
    weights_block = (tiles.hidden, UNIT) if transposed else (UNIT, tiles.hidden)

    def index_weights(k: jax.Array) -> tuple:
        return (flat_tile, k) if transposed else (k, flat_tile)

    x_spec = plgpu.BlockSpec((tiles.rows, UNIT), lambda k: (row_tile, k), delay_release=1)
    w_spec = plgpu.BlockSpec(weights_block, index_weights, delay_release=1)

    def multiply(*accumulators: Ref) -> tuple[jax.Array, ...]:
        def to_hidden_step(_: Any, x_smem: Ref, *w_smem: Ref) -> None:
            for accumulator, tile in zip(accumulators, w_smem):
                _multiply_add(accumulator, x_smem, tile, interpret, right_t=transposed)
            # Waits for the matmuls of the previous step, whose tiles delay_release=1 frees now.
            plgpu.wgmma_wait(len(accumulators))

        plgpu.emit_pipeline(
            to_hidden_step,
            grid=(dim // UNIT,),
            max_concurrent_steps=tiles.stages,
            in_specs=[x_spec] + [w_spec] * len(w_gmem),
        )(x_gmem, *w_gmem)
        return tuple(accumulator[...] for accumulator in accumulators)

    accumulator_type = plgpu.ACC((tiles.rows, tiles.hidden))
    return pl.run_scoped(multiply, *[accumulator_type] * len(w_gmem))


# ---- kernel B: from-hidden ----


def run_from_hidden(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    transposed: bool,
    tasks: FromHiddenTasks,
    tiles: Tiles,
    interpret: Any,
) -> jax.Array:
    """Launches the from-hidden kernel (B): hidden activations times their expert's weights.

    Args:
      pairs: one pair for the down projection, two for the gradient of the input. Each is hidden
        activations [N, M] and weights [H, D], or [D, H] if transposed.
      transposed: whether the weights are transposed.
      tasks: the task list.
      tiles: the tile sizes.
      interpret: runs the kernel in Pallas's interpreter.

    Returns:
      The sum of the matmuls of all pairs, [N, D]. Rows that belong to no expert are undefined.
    """
    hidden_NM, weights = pairs[0]
    num_padded_rows = hidden_NM.shape[0]
    dtype = hidden_NM.dtype
    dim = weights.shape[0 if transposed else 1]
    num_model_tiles = dim // MODEL

    def from_hidden_kernel(*refs: Ref) -> None:
        num_lists = len(FromHiddenTasks._fields)
        lists = FromHiddenTasks(*refs[:num_lists])
        *operands_gmem, out_gmem = refs[num_lists:]

        @plgpu.nd_loop((lists.num_visits[0] * num_model_tiles,), collective_axes="sm")
        def run_task(loop: plgpu.NDLoopInfo) -> None:
            visit = lax.div(loop.index[0], num_model_tiles)
            model_tile = lax.rem(loop.index[0], num_model_tiles)
            row_tile = lists.row_tile_V[visit]
            value = _multiply_from_hidden(
                operands_gmem, lists, visit, row_tile, model_tile, transposed, tiles, interpret
            )
            _store_rows(
                [value.astype(dtype)],
                [out_gmem],
                row_tile * tiles.rows,
                lists.start_V[visit],
                lists.end_V[visit],
                pl.ds(model_tile * MODEL, MODEL),
            )

    out_type = jax.ShapeDtypeStruct((num_padded_rows, dim), dtype)
    operands = [array for pair in pairs for array in pair]
    kernel = _make_kernel(from_hidden_kernel, out_type, tiles, interpret)
    return kernel(*tasks, *operands)


def _multiply_from_hidden(
    operands_gmem: Sequence[Ref],
    lists: FromHiddenTasks,
    visit: jax.Array,
    row_tile: jax.Array,
    model_tile: jax.Array,
    transposed: bool,
    tiles: Tiles,
    interpret: Any,
) -> jax.Array:
    """Returns the float32 output tile of one visit (an expert and a row tile).

    It is the sum, over all pairs of hidden activations and weights, of their matmul over the
    expert's hidden units.
    """
    first_flat_tile = lists.first_flat_tile_V[visit]
    weights_block = (MODEL, UNIT) if transposed else (UNIT, MODEL)

    def index_weights(k: jax.Array) -> tuple:
        flat_tile = first_flat_tile + k
        return (model_tile, flat_tile) if transposed else (flat_tile, model_tile)

    hidden_spec = plgpu.BlockSpec((tiles.rows, UNIT), lambda k: (row_tile, k), delay_release=1)
    w_spec = plgpu.BlockSpec(weights_block, index_weights, delay_release=1)

    def multiply(accumulator: Ref) -> jax.Array:
        def from_hidden_step(_: Any, hidden_smem: Ref, w_smem: Ref) -> None:
            _multiply_add(accumulator, hidden_smem, w_smem, interpret, right_t=transposed)
            plgpu.wgmma_wait(1)

        for hidden_gmem, w_gmem in zip(operands_gmem[::2], operands_gmem[1::2]):
            plgpu.emit_pipeline(
                from_hidden_step,
                grid=(lists.steps_V[visit],),
                max_concurrent_steps=tiles.stages,
                in_specs=[hidden_spec, w_spec],
            )(hidden_gmem, w_gmem)
            # The next pipeline overwrites the tiles of this one, so all matmuls must have ended.
            plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((tiles.rows, MODEL)))


# ---- kernel C: weights ----


def run_weights(
    rows_ND: jax.Array,
    hidden_NM: jax.Array,
    hidden_first: bool,
    num_hidden: int,
    tasks: WeightTasks,
    tiles: Tiles,
    interpret: Any,
) -> jax.Array:
    """Launches the weights kernel (C), which computes a weight gradient.

    For every expert it multiplies rows by hidden activations, summed over the expert's rows.

    Args:
      rows_ND: the inputs of the experts, or the gradients of their outputs.
      hidden_NM: hidden activations or their gradients.
      hidden_first: True for w_down [H, D], False for w_gate and w_up [D, H].
      num_hidden: H, the hidden units of all experts of the shard.
      tasks: the task list.
      tiles: the tile sizes.
      interpret: runs the kernel in Pallas's interpreter.

    Returns:
      The weight gradient: [H, D] if hidden_first, else [D, H].
    """
    dim = rows_ND.shape[1]
    dtype = rows_ND.dtype
    num_model_tiles = dim // MODEL
    num_flat_tiles = num_hidden // tiles.wide
    block = (tiles.wide, MODEL) if hidden_first else (MODEL, tiles.wide)
    shape = (num_hidden, dim) if hidden_first else (dim, num_hidden)

    def weights_kernel(*refs: Ref) -> None:
        num_lists = len(WeightTasks._fields)
        lists = WeightTasks(*refs[:num_lists])
        x_gmem, hidden_gmem, out_gmem = refs[num_lists:]

        @plgpu.nd_loop((num_flat_tiles * num_model_tiles,), collective_axes="sm")
        def run_task(loop: plgpu.NDLoopInfo) -> None:
            task = lax.div(loop.index[0], num_model_tiles)
            model_tile = lax.rem(loop.index[0], num_model_tiles)
            expert_tasks = WeightTasks(*(array[task] for array in lists))
            value = _multiply_weights(
                x_gmem, hidden_gmem, expert_tasks, model_tile, hidden_first, tiles, interpret
            )

            def store(out_smem: Ref) -> None:
                out_smem[...] = value.astype(dtype)
                plgpu.commit_smem()
                model_dims = pl.ds(model_tile * MODEL, MODEL)
                units = pl.ds(expert_tasks.flat_tile_C * tiles.wide, tiles.wide)
                place = (units, model_dims) if hidden_first else (model_dims, units)
                plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[place])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            pl.run_scoped(store, plgpu.SMEM(block, dtype, transforms=_swizzled(dtype)))

    out_type = jax.ShapeDtypeStruct(shape, dtype)
    kernel = _make_kernel(weights_kernel, out_type, tiles, interpret)
    return kernel(*tasks, rows_ND, hidden_NM)


def _multiply_weights(
    x_gmem: Ref,
    hidden_gmem: Ref,
    task: WeightTasks,
    model_tile: jax.Array,
    hidden_first: bool,
    tiles: Tiles,
    interpret: Any,
) -> jax.Array:
    """Returns the float32 gradient tile of one task: the sum over the rows of its expert.

    Args:
      task: the entries of one task, all scalars.
    """
    start, end = task.start_C, task.end_C
    first_step = lax.div(start, UNIT)
    num_steps = lax.div(end + UNIT - 1, UNIT) - first_step
    transforms = _swizzled(x_gmem.dtype)
    x_spec = plgpu.BlockSpec(
        (UNIT, MODEL),
        lambda k: (first_step + k, model_tile),
        delay_release=1,
        transforms=transforms,
    )
    hidden_spec = plgpu.BlockSpec(
        (UNIT, tiles.wide),
        lambda k: (first_step + k, task.column_tile_C),
        delay_release=1,
        transforms=transforms,
    )

    def multiply(accumulator: Ref) -> jax.Array:
        def weights_step(indices: tuple, x_smem: Ref, hidden_smem: Ref) -> None:
            @pl.when((indices[0] == 0) | (indices[0] == num_steps - 1))
            def clear_rows_of_neighbors() -> None:
                first_row = (first_step + indices[0]) * UNIT
                for tile in (x_smem, hidden_smem):
                    _clear_rows_outside(tile, start - first_row, end - first_row)
                plgpu.commit_smem()

            left, right = (hidden_smem, x_smem) if hidden_first else (x_smem, hidden_smem)
            _multiply_add(accumulator, left, right, interpret, left_t=True)
            plgpu.wgmma_wait(1)

        @pl.when(end > start)
        def run_pipeline() -> None:
            plgpu.emit_pipeline(
                weights_step,
                grid=(num_steps,),
                max_concurrent_steps=tiles.stages,
                in_specs=[x_spec, hidden_spec],
            )(x_gmem, hidden_gmem)

        return accumulator[...]

    block = (tiles.wide, MODEL) if hidden_first else (MODEL, tiles.wide)
    return pl.run_scoped(multiply, plgpu.ACC(block))


# ---- shared by the kernels ----


def _make_kernel(kernel: Callable, out_type: Any, tiles: Tiles, interpret: Any) -> Callable:
    """Returns a function that launches a kernel with one thread block per multiprocessor."""
    options = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(tiles.blocks,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )


def _load_tiles(
    tiles_gmem: Sequence[Ref],
    block: tuple[int, int],
    dtype: jnp.dtype,
    use: Callable[[Sequence[jax.Array]], None],
) -> None:
    """Loads tiles through shared memory and calls `use` with their values in float32.

    It is a callback because the shared memory is released when it returns.
    """
    if not tiles_gmem:
        use([])
        return

    def load(barrier: Ref, *tiles_smem: Ref) -> None:
        for gmem, smem in zip(tiles_gmem, tiles_smem):
            plgpu.copy_gmem_to_smem(gmem, smem, barrier)
        plgpu.barrier_wait(barrier)
        use([smem[...].astype(jnp.float32) for smem in tiles_smem])

    scratch = [plgpu.SMEM(block, dtype, transforms=_swizzled(dtype))] * len(tiles_gmem)
    pl.run_scoped(load, plgpu.Barrier(num_arrivals=len(tiles_gmem)), *scratch)


def _multiply_add(
    accumulator: Ref,
    left_smem: Ref,
    right_smem: Ref,
    interpret: Any,
    left_t: bool = False,
    right_t: bool = False,
) -> None:
    """Adds left x right to the accumulator.

    Args:
      left_t, right_t: use the transpose of the left or of the right tile; at most one may be set.

    wgmma can read a 16-bit operand transposed from shared memory. Pallas's interpreter of jax
    before 0.11 cannot, so a transposed copy of the tile is made for it.
    """
    if not (left_t or right_t):
        plgpu.wgmma(accumulator, left_smem, right_smem)
        return
    tile = left_smem if left_t else right_smem

    def multiply(tile_t: Ref) -> None:
        operands = (tile_t, right_smem) if left_t else (left_smem, tile_t)
        plgpu.wgmma(accumulator, *operands)

    def multiply_copy(copy_smem: Ref) -> None:
        copy_smem[...] = tile[...].T
        multiply(copy_smem)

    if interpret and jax.__version_info__ < (0, 11):
        pl.run_scoped(multiply_copy, plgpu.SMEM(tile.shape[::-1], tile.dtype))
    else:
        multiply(tile.transpose((1, 0)))


def _clear_rows_outside(tile_smem: Ref, start: jax.Array, end: jax.Array) -> None:
    """Sets all rows of a tile in shared memory to 0, except for rows start to end - 1."""
    row = lax.broadcasted_iota(jnp.int32, tile_smem.shape, 0)
    value = tile_smem[...]
    tile_smem[...] = jnp.where((row >= start) & (row < end), value, jnp.zeros_like(value))


def _swizzled(dtype: jnp.dtype) -> tuple:
    """Returns a layout of tiles in shared memory that has no bank conflicts.

    A tile is stored in strips of 128 bytes per row, and the order of the bytes in a strip changes
    from row to row. Registers and asynchronous copies can both access it.
    """
    swizzle = plgpu.find_swizzle(UNIT * dtype.itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)


def _store_rows(
    values: Sequence[jax.Array],
    outputs_gmem: Sequence[Ref],
    first_row: jax.Array,
    start: jax.Array,
    end: jax.Array,
    columns: pl.Slice,
) -> None:
    """Stores rows start to end - 1 of tiles in registers to arrays in global memory.

    In nearly all row tiles all rows belong to one expert. They are stored through a tile in shared
    memory with a swizzled layout (`_swizzled`). If only some rows belong to the expert, they may
    begin at any row, where a swizzled tile cannot be divided. They are stored through a tile with a
    plain layout. Its bank conflicts would take about a quarter of the to-hidden kernel's time (an
    estimate) if all tiles were stored so.

    Args:
      values: the tiles, one for each output.
      outputs_gmem: the arrays.
      first_row: the row of the arrays at which the tiles begin.
      start, end: the rows to store, counted within the tiles.
      columns: the columns of the arrays that the tiles cover.
    """
    shape = values[0].shape
    dtype = values[0].dtype

    def store_tile(*tiles_smem: Ref) -> None:
        for smem, value in zip(tiles_smem, values):
            smem[...] = value
        plgpu.commit_smem()
        for smem, gmem in zip(tiles_smem, outputs_gmem):
            plgpu.copy_smem_to_gmem(smem, gmem.at[pl.ds(first_row, shape[0]), columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store_part(*tiles_smem: Ref) -> None:
        for smem, value in zip(tiles_smem, values):
            smem[...] = value
        plgpu.commit_smem()
        # A copy has a static number of rows, but end - start is dynamic. It is copied as a sum of
        # powers of two: for each power below a full tile there is one conditional copy.
        done, size = start, shape[0] // 2
        while size:

            @pl.when(((end - start) & size) != 0)
            def store_piece(done: jax.Array = done, size: int = size) -> None:
                for smem, gmem in zip(tiles_smem, outputs_gmem):
                    rows = pl.ds(first_row + done, size)
                    plgpu.copy_smem_to_gmem(smem.at[pl.ds(done, size)], gmem.at[rows, columns])

            done = done + ((end - start) & size)
            size //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(end - start == shape[0])
    def store_whole_tile() -> None:
        scratch = plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))
        pl.run_scoped(store_tile, *[scratch] * len(values))

    @pl.when(end - start != shape[0])
    def store_part_of_tile() -> None:
        pl.run_scoped(store_part, *[plgpu.SMEM(shape, dtype)] * len(values))
