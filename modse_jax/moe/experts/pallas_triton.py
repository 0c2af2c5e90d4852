"""The expert FFN as Pallas Triton kernels, for NVIDIA GPUs since Ampere (A100, H100, H200, B200).

Routed tokens are sorted by expert and divided into row tiles. A row tile may hold tokens of several
experts; every expert that has tokens in it *visits* it. There are three kinds of kernel:

  A  one visit x one tile of the expert's hidden units, contracted over the model dimension: gate
     and up followed by SwiGLU, or the gradients of gate and up
  B  one visit x one tile of the model dimension, contracted over all hidden units of the expert:
     the down projection; or dx, the sum of two such matmuls
  C  one tile of hidden units x one tile of the model dimension, contracted over the tokens of the
     expert: the gradients of the weights

Every kernel is launched with one program per tile and a static number of programs, because the
routing is data; programs without work end at once. Rows that do not belong to the visiting expert
are never stored (A, B) and are replaced by zeros when they are loaded (C), and no contraction runs
past the expert's own hidden units. Padding rows and unused hidden units may therefore hold NaN.

Saved for the backward pass are the hidden activations and their derivatives with respect to gate
and up. With gate and up saved instead, the backward kernel A spilled 560 bytes of registers a
thread on an H100, and had to compute and write the hidden activations again. Triton reads
transposed operands from shared memory, so neither pass transposes an array in global memory.

The kernels are tested in interpret mode and by compiling for four GPUs without having one. They
have never run on hardware. JAX deprecated Pallas Triton in 0.11.0.

Legend: N routed tokens, D model dimension, E experts of a shard, H hidden units of all experts of a
shard, M hidden units of the widest expert, V visits, R rows of a row tile, C tiles of the H axis;
X experts, widest first, then the padding rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import swiglu

DTYPES = ("bfloat16", "float16")

# The model dimension must be a multiple of it.
MODEL_UNIT = 128

# The largest number of blocks of a CUDA grid.
MAX_PROGRAMS = 2**31 - 1

# A Pallas reference to an array in global memory. Pallas has no public type for it.
Ref = Any


class Launch(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
      warps: warps of a program.
      stages: loop iterations whose loads are in flight.
    """

    warps: int = 8
    stages: int = 3


class Tiles(NamedTuple):
    """Tile sizes and launch parameters.

    Attributes:
      rows: routed tokens of a row tile.
      hidden: hidden units of kernel C's tiles. Every expert's width is a multiple of it.
      gate_up: hidden units of kernel A's tiles in the forward pass; divides `hidden`.
      dhidden: the same in the backward pass.
      model: largest tile of the model dimension in kernel B, and in kernel C for the down
        projection.
      gate_up_model: the same in kernel C for gate and up, which it computes side by side.
      step: length of a contraction step; divides `hidden`.
      group: row tiles that kernel A takes through all tiles of hidden units before it takes the
        next ones, so that both operands of the programs that run at once stay in the L2 cache.
    """

    rows: int = 128
    hidden: int = 128
    gate_up: int = 128
    dhidden: int = 128
    model: int = 256
    gate_up_model: int = 128
    step: int = 64
    group: int = 16
    launch_gate_up: Launch = Launch(stages=4)
    launch_dhidden: Launch = Launch(stages=3)
    launch_model: Launch = Launch(stages=4)
    launch_weights: Launch = Launch(stages=3)


# The compiler reports no register spills with these tiles at the widths of the paper's models, and
# the pipelines fit the shared memory of a block: 163 KiB on A100, 227 KiB on the others.
CHIPS = {
    "a100": Tiles(gate_up=64, gate_up_model=64, launch_model=Launch(stages=3)),
    "h100": Tiles(),
    "h200": Tiles(),
    "b200": Tiles(),
}


def unit_for(widths: Sequence[int], chip: str, dtype: str) -> int:
    """Returns the number of hidden units of which every expert's width must be a multiple.

    Tiles of 128 hidden units are the fastest. Tiles of 64 are used if they save more than 10% of
    the FLOPs, as they do for experts narrower than 128.
    """
    small, large = (sum(-(-w // unit) * unit for w in widths) for unit in (64, 128))
    return 64 if large > 1.1 * small else 128


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """Returns the tiles for a chip.

    Raises:
      ValueError: the chip, the dtype or the model dimension is not supported. The message names
        alternatives.
    """
    if chip not in CHIPS:
        raise ValueError(
            f"moe.backend=pallas_triton needs one of {', '.join(CHIPS)}, but this device is "
            f"{chip}; backends that run anywhere: auto, blocked, reference"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"moe.backend=pallas_triton supports {' and '.join(DTYPES)}, not {dtype}; set "
            "model.dtype=bfloat16, or use a backend that takes any dtype: blocked, reference"
        )
    if dim % MODEL_UNIT:
        raise ValueError(
            f"moe.backend=pallas_triton: model.dim={dim} is not divisible by {MODEL_UNIT}; choose "
            "another model.dim, or use a backend that takes any: blocked, reference"
        )
    tiles = CHIPS[chip]
    unit = unit_for(widths, chip, dtype)
    return tiles._replace(
        hidden=unit, gate_up=min(unit, tiles.gate_up), dhidden=min(unit, tiles.dhidden)
    )


def check_rows(tiles: Tiles) -> int:
    """Returns a number of tokens of one expert that takes every path of the kernels.

    These are full row tiles, more contraction steps than are in flight, and a partial tile.
    """
    return 2 * tiles.rows + (tiles.launch_weights.stages + 2) * tiles.step + 5


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError if the kernels would need more programs than a CUDA grid may have."""
    columns = max(map(max, placement.widths)) // min(tiles.gate_up, tiles.dhidden)
    programs = _num_visits(num_rows, placement, tiles) * columns
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"moe.backend=pallas_triton: {num_rows} routed tokens over experts of widths "
            f"{placement.widths} need {programs} programs, more than {MAX_PROGRAMS}; lower "
            "training.batch_size, or use a backend without this limit: blocked, reference"
        )


class Visits(NamedTuple):
    """The visits of a shard's experts to row tiles, widest experts first.

    The padding rows are visited by an expert of width 0, for which kernel B stores zeros. Entries
    that are no visits have no rows and no width.
    """

    row_V: jax.Array  # first row of the row tile
    start_V: jax.Array  # first row of the expert
    end_V: jax.Array  # end of the rows of the expert
    width_V: jax.Array  # hidden units of the expert
    offset_V: jax.Array  # its first hidden unit on the H axis


class WeightTiles(NamedTuple):
    """The tiles of hidden units of a shard, those of experts with the most tokens first."""

    start_C: jax.Array  # first row of the expert
    end_C: jax.Array  # end of the rows of the expert
    column_C: jax.Array  # first hidden unit within the expert
    flat_C: jax.Array  # first hidden unit on the H axis


class Routing(NamedTuple):
    """Everything that the kernels read about the routing. Built once per layer."""

    visits: Visits
    weight_tiles: WeightTiles


class Saved(NamedTuple):
    """The arrays that the forward pass saves for the backward pass."""

    routing: Routing
    hidden_NM: jax.Array
    by_gate_NM: jax.Array  # derivative of the hidden activations with respect to gate
    by_up_NM: jax.Array


def _num_visits(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> int:
    """Returns the largest number of visits, a multiple of `tiles.group`."""
    visits = _num_row_tiles(num_rows, tiles) + placement.slots
    return -(-visits // tiles.group) * tiles.group


def _num_row_tiles(num_rows: int, tiles: Tiles) -> int:
    return max(1, -(-num_rows // tiles.rows))


def route(
    rows_E: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    num_rows: int,
) -> Routing:
    """Builds the tables that the kernels read.

    What differs from shard to shard is looked up in tables indexed by `shard`, so all shards run
    one program.
    """
    end_E = jnp.cumsum(rows_E).astype(jnp.int32)
    start_E = end_E - rows_E
    return Routing(
        _list_visits(start_E, end_E, shard, placement, tiles, num_rows),
        _list_weight_tiles(start_E, end_E, shard, placement, tiles),
    )


def _list_visits(
    start_E: jax.Array,
    end_E: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    num_rows: int,
) -> Visits:
    """Lists the visits by comparing every entry with every expert: a small reduction, no scatter.

    Widest first, because the programs of kernel B take as long as the expert is wide, and the
    longest must not be the last to start.
    """
    num_tiles = _num_row_tiles(num_rows, tiles)
    widths = np.zeros((len(placement.widths), placement.slots), np.int32)
    offsets = np.zeros_like(widths)
    for s, shard_widths in enumerate(placement.widths):
        widths[s, : len(shard_widths)] = shard_widths
        offsets[s, : len(shard_widths)] = expert_widths.offsets(shard_widths)
    order = np.argsort(-widths, axis=1, kind="stable")
    # The last entry stands for the padding rows.
    padding = np.zeros((len(widths), 1), np.int32)
    width_X, offset_X = (
        jnp.asarray(np.concatenate((np.take_along_axis(a, order, 1), padding), axis=1))[shard]
        for a in (widths, offsets)
    )
    order_E = jnp.asarray(order)[shard]
    start_X = jnp.concatenate((start_E[order_E], end_E[-1:]))
    end_X = jnp.concatenate((end_E[order_E], jnp.full((1,), num_tiles * tiles.rows, jnp.int32)))
    first_tile_X = start_X // tiles.rows
    visits_X = jnp.where(end_X > start_X, -(-end_X // tiles.rows) - first_tile_X, 0)
    last_visit_X = jnp.cumsum(visits_X)

    entry_V = jnp.arange(_num_visits(num_rows, placement, tiles), dtype=jnp.int32)
    x_V = jnp.sum(entry_V[:, None] >= last_visit_X[None, :], axis=1, dtype=jnp.int32)
    is_visit_V = x_V < start_X.shape[0]
    x_V = jnp.minimum(x_V, start_X.shape[0] - 1)
    tile_V = first_tile_X[x_V] + entry_V - (last_visit_X - visits_X)[x_V]
    return Visits(
        tiles.rows * jnp.clip(tile_V, 0, num_tiles - 1),
        *(jnp.where(is_visit_V, a[x_V], 0) for a in (start_X, end_X, width_X, offset_X)),
    )


def _list_weight_tiles(
    start_E: jax.Array,
    end_E: jax.Array,
    shard: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
) -> WeightTiles:
    """Lists the tiles of the H axis, longest contraction first."""
    expert, column = [], []
    for widths in placement.widths:
        counts = [w // tiles.hidden for w in widths]
        expert.append(np.repeat(np.arange(len(widths)), counts))
        column.append(np.concatenate([tiles.hidden * np.arange(n) for n in counts]))
    expert_C, column_C = (jnp.asarray(np.stack(a), jnp.int32)[shard] for a in (expert, column))
    rows_C = (end_E - start_E)[expert_C]
    order_C = jnp.argsort(-rows_C, stable=True).astype(jnp.int32)
    expert_C, column_C = expert_C[order_C], column_C[order_C]
    return WeightTiles(start_E[expert_C], end_E[expert_C], column_C, tiles.hidden * order_C)


def forward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool,
    save: bool,
) -> tuple[jax.Array, Saved | None]:
    """Returns (y_ND, what `backward` needs if `save`, else None)."""
    w_gate, w_up, w_down = weights
    num_rows = x_ND.shape[0]
    routing = route(rows_E, shard, placement, tiles, num_rows)
    kernels = _Kernels(routing, placement, tiles, interpret)
    hidden_NM, *derivatives = kernels.compute_hidden(kernels.pad(x_ND), w_gate, w_up, save)
    y_ND = kernels.compute_model("expert_down", [(hidden_NM, w_down)], transposed=False)
    saved = Saved(routing, hidden_NM, *derivatives) if save else None
    return y_ND[:num_rows], saved


def backward(
    x_ND: jax.Array,
    rows_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    shard: jax.Array,
    saved: Saved,
    dy_ND: jax.Array,
    placement: expert_placement.Placement,
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients (dx_ND, dw_gate, dw_up, dw_down)."""
    w_gate, w_up, w_down = weights
    kernels = _Kernels(saved.routing, placement, tiles, interpret)
    x = kernels.pad(x_ND)
    dy = kernels.pad(dy_ND)
    dgate_NM, dup_NM = kernels.compute_gate_up_gradients(
        dy, w_down, saved.by_gate_NM, saved.by_up_NM
    )
    dx_ND = kernels.compute_model(
        "expert_dx", [(dgate_NM, w_gate), (dup_NM, w_up)], transposed=True
    )
    dw_gate, dw_up = kernels.compute_weights(
        "expert_dw_gate_up", x, (dgate_NM, dup_NM), hidden_first=False
    )
    (dw_down,) = kernels.compute_weights(
        "expert_dw_down", dy, (saved.hidden_NM,), hidden_first=True
    )
    return dx_ND[: x_ND.shape[0]], dw_gate, dw_up, dw_down


def _swiglu(gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    """Epilogue of kernel A in the forward pass."""
    return (swiglu.swiglu(gate, up),)


def _swiglu_and_derivatives(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    """Returns hidden = silu(gate) * up and its derivatives with respect to gate and up."""
    return swiglu.swiglu_backward(gate, up, jnp.ones_like(gate))


class _Kernels:
    """The kernels, launched for one routing."""

    def __init__(
        self, routing: Routing, placement: expert_placement.Placement, tiles: Tiles, interpret: bool
    ):
        self.routing = routing
        self.tiles = tiles
        self.interpret = interpret
        self.widest = max(map(max, placement.widths))
        self.num_hidden = sum(placement.widths[0])

    def pad(self, rows_ND: jax.Array) -> jax.Array:
        """Pads to full row tiles. The values do not matter; without padding this is a no-op."""
        num_rows = _num_row_tiles(rows_ND.shape[0], self.tiles) * self.tiles.rows
        return jnp.pad(rows_ND, ((0, num_rows - rows_ND.shape[0]), (0, 0)))

    def compute_hidden(
        self, rows_ND: jax.Array, w_gate: jax.Array, w_up: jax.Array, save: bool
    ) -> list[jax.Array]:
        """Launches kernel A of the forward pass.

        Returns:
          The hidden activations [N, M] and, if `save`, their derivatives with respect to gate and
          up. Only an expert's own hidden units in its own rows are written.
        """
        t = self.tiles
        epilogue = _swiglu_and_derivatives if save else _swiglu
        kernel = functools.partial(_gate_up_kernel, epilogue=epilogue, tiles=t)
        return self._call(
            kernel,
            "expert_gate_up",
            [self._hidden_shape(rows_ND)] * (3 if save else 1),
            self._num_hidden_programs(t.gate_up),
            t.launch_gate_up,
            self.routing.visits,
            rows_ND,
            w_gate,
            w_up,
        )

    def compute_gate_up_gradients(
        self, dy_ND: jax.Array, w_down: jax.Array, by_gate_NM: jax.Array, by_up_NM: jax.Array
    ) -> list[jax.Array]:
        """Launches kernel A of the backward pass. Returns the gradients of gate and up, [N, M]."""
        t = self.tiles
        return self._call(
            functools.partial(_gate_up_gradients_kernel, tiles=t),
            "expert_dgate_dup",
            [self._hidden_shape(dy_ND)] * 2,
            self._num_hidden_programs(t.dhidden),
            t.launch_dhidden,
            self.routing.visits,
            dy_ND,
            w_down,
            by_gate_NM,
            by_up_NM,
        )

    def _hidden_shape(self, rows_ND: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows_ND.shape[0], self.widest), rows_ND.dtype)

    def _num_hidden_programs(self, columns: int) -> int:
        return self.routing.visits.row_V.shape[0] * (self.widest // columns)

    def compute_model(
        self, name: str, pairs: list[tuple[jax.Array, jax.Array]], transposed: bool
    ) -> jax.Array:
        """Launches kernel B.

        Args:
          pairs: activations [N, M] and weights [H, D], or [D, H] if `transposed`.

        Returns:
          The sum of their matmuls, [N, D]; 0 in padding rows.
        """
        hidden_NM, weights = pairs[0]
        D = weights.shape[0 if transposed else 1]
        t = self.tiles
        model = _largest_tile(D, t.model)
        kernel = functools.partial(_model_kernel, transposed=transposed, model=model, tiles=t)
        operands = [a for pair in pairs for a in pair]
        visits = self.routing.visits
        shape = jax.ShapeDtypeStruct((hidden_NM.shape[0], D), hidden_NM.dtype)
        num_programs = visits.row_V.shape[0] * (D // model)
        return self._call(kernel, name, shape, num_programs, t.launch_model, visits, *operands)

    def compute_weights(
        self, name: str, rows_ND: jax.Array, hiddens: tuple[jax.Array, ...], hidden_first: bool
    ) -> list[jax.Array]:
        """Launches kernel C.

        Returns:
          For each of `hiddens` [N, M] the matmul with rows_ND over every expert's tokens: [H, D] if
          `hidden_first`, else [D, H].
        """
        D = rows_ND.shape[1]
        H = self.num_hidden
        t = self.tiles
        model = _largest_tile(D, t.model if hidden_first else t.gate_up_model)
        kernel = functools.partial(
            _weights_kernel,
            num_hiddens=len(hiddens),
            hidden_first=hidden_first,
            model=model,
            tiles=t,
        )
        shape = jax.ShapeDtypeStruct((H, D) if hidden_first else (D, H), rows_ND.dtype)
        num_programs = H // t.hidden * (D // model)
        return self._call(
            kernel,
            name,
            [shape] * len(hiddens),
            num_programs,
            t.launch_weights,
            self.routing.weight_tiles,
            rows_ND,
            *hiddens,
        )

    def _call(
        self,
        kernel: Callable[..., None],
        name: str,
        out_shape: Any,
        num_programs: int,
        launch: Launch,
        tables: Visits | WeightTiles,
        *operands: jax.Array,
    ) -> Any:
        """Runs a kernel over the tables and operands. Returns arrays like `out_shape`."""
        return pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=(num_programs,),
            name=name,
            interpret=self.interpret,
            compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        )(*tables, *operands)


def _largest_tile(dim: int, largest: int) -> int:
    """Returns `largest` if it divides the dimension, else half of it."""
    return largest if dim % largest == 0 else largest // 2


def _gate_up_kernel(
    row_V: Ref,
    start_V: Ref,
    end_V: Ref,
    width_V: Ref,
    offset_V: Ref,
    x_ref: Ref,
    w_gate_ref: Ref,
    w_up_ref: Ref,
    *out_refs: Ref,
    epilogue: Callable[..., tuple[jax.Array, ...]],
    tiles: Tiles,
) -> None:
    """Kernel A of the forward pass: epilogue(gate, up) of one visit and tile of hidden units."""
    columns = tiles.gate_up
    visits = Visits(row_V, start_V, end_V, width_V, offset_V)
    visit, column = _visit_and_column(out_refs[0].shape[1], columns, tiles)

    @pl.when(column < width_V[visit])
    def compute_tile() -> None:
        rows, units, own = _find_tile(visits, visit, column, columns, tiles)

        def accumulate(k: jax.Array, sums: tuple) -> tuple[jax.Array, jax.Array]:
            gate, up = sums
            model_dims = pl.ds(k * tiles.step, tiles.step)
            x = x_ref[rows, model_dims]
            gate = gate + _dot(x, w_gate_ref[model_dims, units])
            up = up + _dot(x, w_up_ref[model_dims, units])
            return gate, up

        zeros = jnp.zeros(own.shape, jnp.float32)
        gate, up = lax.fori_loop(0, x_ref.shape[1] // tiles.step, accumulate, (zeros, zeros))
        for ref, value in zip(out_refs, epilogue(gate, up)):
            block = ref.at[rows, pl.ds(column, columns)]
            triton.store(block, value.astype(ref.dtype), mask=own)


def _gate_up_gradients_kernel(
    row_V: Ref,
    start_V: Ref,
    end_V: Ref,
    width_V: Ref,
    offset_V: Ref,
    dy_ref: Ref,
    w_down_ref: Ref,
    by_gate_ref: Ref,
    by_up_ref: Ref,
    dgate_ref: Ref,
    dup_ref: Ref,
    *,
    tiles: Tiles,
) -> None:
    """Kernel A of the backward pass: the hidden activations' gradient times their derivatives."""
    columns = tiles.dhidden
    visits = Visits(row_V, start_V, end_V, width_V, offset_V)
    visit, column = _visit_and_column(dgate_ref.shape[1], columns, tiles)

    @pl.when(column < width_V[visit])
    def compute_tile() -> None:
        rows, units, own = _find_tile(visits, visit, column, columns, tiles)

        def accumulate(k: jax.Array, total: jax.Array) -> jax.Array:
            model_dims = pl.ds(k * tiles.step, tiles.step)
            dy = dy_ref[rows, model_dims]
            return total + _dot(dy, w_down_ref[units, model_dims], transposed_b=True)

        zeros = jnp.zeros(own.shape, jnp.float32)
        dhidden = lax.fori_loop(0, dy_ref.shape[1] // tiles.step, accumulate, zeros)
        # One output after the other, so that at most one saved tile is held in registers.
        for derivative_ref, out_ref in ((by_gate_ref, dgate_ref), (by_up_ref, dup_ref)):
            block = rows, pl.ds(column, columns)
            value = dhidden * derivative_ref[block].astype(jnp.float32)
            triton.store(out_ref.at[block], value.astype(out_ref.dtype), mask=own)


def _visit_and_column(widest: int, columns: int, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Returns the visit and the first hidden unit of this program of kernel A.

    Programs run by groups of visits, then tiles of hidden units, then visits of the group.
    """
    group, in_group = _divide(pl.program_id(0), tiles.group * (widest // columns))
    column, visit = _divide(in_group, tiles.group)
    return group * tiles.group + visit, pl.multiple_of(column * columns, columns)


def _find_tile(
    visits: Visits, visit: jax.Array, column: jax.Array, columns: int, tiles: Tiles
) -> tuple[pl.Slice, pl.Slice, jax.Array]:
    """Returns the row tile, the hidden units on the H axis, and a mask of the expert's own rows."""
    row = pl.multiple_of(visits.row_V[visit], tiles.rows)
    # Without this hint, weights are loaded 2 bytes at a time.
    first = pl.multiple_of(visits.offset_V[visit] + column, columns)
    start = visits.start_V[visit]
    own = _own_rows(row, start, visits.end_V[visit], (tiles.rows, columns))
    return pl.ds(row, tiles.rows), pl.ds(first, columns), own


def _model_kernel(
    row_V: Ref,
    start_V: Ref,
    end_V: Ref,
    width_V: Ref,
    offset_V: Ref,
    *refs: Ref,
    transposed: bool,
    model: int,
    tiles: Tiles,
) -> None:
    """Kernel B. All tiles of the model dimension of one visit run side by side."""
    *operands, out_ref = refs
    visit, q = _divide(pl.program_id(0), out_ref.shape[1] // model)
    row = pl.multiple_of(row_V[visit], tiles.rows)
    offset = pl.multiple_of(offset_V[visit], tiles.hidden)
    rows = pl.ds(row, tiles.rows)
    model_dims = pl.ds(q * model, model)
    total = jnp.zeros((tiles.rows, model), jnp.float32)
    for hidden_ref, weights_ref in zip(operands[::2], operands[1::2]):

        def accumulate(
            k: jax.Array,
            total: jax.Array,
            hidden_ref: Ref = hidden_ref,
            weights_ref: Ref = weights_ref,
        ) -> jax.Array:
            hidden = hidden_ref[rows, pl.ds(k * tiles.step, tiles.step)]
            units = pl.ds(offset + k * tiles.step, tiles.step)
            w = weights_ref[model_dims, units] if transposed else weights_ref[units, model_dims]
            return total + _dot(hidden, w, transposed_b=transposed)

        steps = lax.div(width_V[visit], jnp.int32(tiles.step))
        total = lax.fori_loop(0, steps, accumulate, total)
    own = _own_rows(row, start_V[visit], end_V[visit], total.shape)
    triton.store(out_ref.at[rows, model_dims], total.astype(out_ref.dtype), mask=own)


def _weights_kernel(
    start_C: Ref,
    end_C: Ref,
    column_C: Ref,
    flat_C: Ref,
    rows_ref: Ref,
    *refs: Ref,
    num_hiddens: int,
    hidden_first: bool,
    model: int,
    tiles: Tiles,
) -> None:
    """Kernel C. All tiles of the model dimension of one tile of hidden units run side by side."""
    hidden_refs = refs[:num_hiddens]
    out_refs = refs[num_hiddens:]
    tile, q = _divide(pl.program_id(0), rows_ref.shape[1] // model)
    start, end = start_C[tile], end_C[tile]
    units = pl.ds(pl.multiple_of(column_C[tile], tiles.hidden), tiles.hidden)
    flat = pl.ds(pl.multiple_of(flat_C[tile], tiles.hidden), tiles.hidden)
    model_dims = pl.ds(q * model, model)

    def accumulate(k: jax.Array, sums: tuple) -> tuple[jax.Array, ...]:
        # Steps begin at the expert's first row, so that only its end has to be masked.
        row = start + k * tiles.step
        step_rows = pl.ds(row, tiles.step)
        own = row + lax.iota(jnp.int32, tiles.step) < end

        def load_own(ref: Ref, columns: pl.Slice) -> jax.Array:
            mask = jnp.broadcast_to(own[:, None], (tiles.step, columns.size))
            return triton.load(ref.at[step_rows, columns], mask=mask, other=0.0)

        rows = load_own(rows_ref, model_dims)
        hiddens = [load_own(ref, units) for ref in hidden_refs]
        pairs = [(h, rows) if hidden_first else (rows, h) for h in hiddens]
        return tuple(total + _dot(a.T, b) for total, (a, b) in zip(sums, pairs))

    shape = (tiles.hidden, model) if hidden_first else (model, tiles.hidden)
    steps = lax.div(end - start + (tiles.step - 1), jnp.int32(tiles.step))
    zeros = (jnp.zeros(shape, jnp.float32),) * num_hiddens
    sums = lax.fori_loop(0, steps, accumulate, zeros)
    for ref, total in zip(out_refs, sums):
        block = (flat, model_dims) if hidden_first else (model_dims, flat)
        ref[block] = total.astype(ref.dtype)


def _divide(number: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Returns the quotient and the remainder."""
    divisor = jnp.int32(divisor)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _dot(a: jax.Array, b: jax.Array, transposed_b: bool = False) -> jax.Array:
    """Returns a @ b, or a @ b.T, accumulated in float32."""
    return triton.dot(a, b.T if transposed_b else b, allow_tf32=False)


def _own_rows(
    row: jax.Array, start: jax.Array, end: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """Returns a mask [rows, columns] of the rows from `row` on that lie between start and end."""
    row_R = row + lax.iota(jnp.int32, shape[0])
    own_R = (row_R >= start) & (row_R < end)
    return jnp.broadcast_to(own_R[:, None], shape)
