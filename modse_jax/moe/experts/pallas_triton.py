"""The expert FFN as Pallas Triton kernels, for NVIDIA GPUs since Ampere (A100, H100, H200, B200).

Routed tokens are sorted by expert and divided into row tiles. A row tile may hold tokens of several
experts. A *visit* is one (expert, row tile) pair in which the expert has tokens. There are three
kinds of kernel, called A, B and C below. One thread block computes:

  A  to-hidden: one visit x one tile of the expert's hidden units, contracted over the model
     dimension: gate and up followed by SwiGLU, or the gradients of gate and up
  B  from-hidden: one visit x one tile of the model dimension, contracted over all hidden units of
     the expert: the down projection; or dx, the sum of two such matmuls
  C  weights: one tile of hidden units x one tile of the model dimension, contracted over the tokens
     of the expert: the gradients of the weights

The number of visits depends on the routing, but the number of thread blocks (Triton's programs)
must be static. Every kernel is launched with as many as any routing can need, and those without
work end at once. Rows that do not belong to the visiting expert are never stored (A, B) and are
replaced by zeros when they are loaded (C), and no contraction runs past the expert's own hidden
units. Padding rows and unused hidden units may therefore hold NaN.

Saved for the backward pass are the hidden activations and their derivatives with respect to gate
and up. With gate and up saved instead, kernel A of the backward pass has to compute and write the
hidden activations again, and spills 560 bytes of registers per thread when compiled for an H100.
Triton reads transposed operands from shared memory, so neither pass transposes an array in global
memory.

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

# The model dimension must be a multiple of this.
MODEL_UNIT = 128

# The largest number of blocks of a CUDA grid.
MAX_PROGRAMS = 2**31 - 1

# A Pallas reference to an array in global memory. Pallas has no public type for it.
Ref = Any


class Launch(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
      warps: warps of a thread block.
      stages: loop iterations whose loads from memory are in flight.
    """

    warps: int = 8
    stages: int = 3


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of the kernels.

    The to-hidden kernel (A) outputs hidden units, the from-hidden kernel (B) contracts over them,
    and the weights kernel (C) computes weight gradients.

    Attributes:
      rows: routed tokens in a row tile.
      hidden: hidden units in a tile of kernel C. Every expert's width is a multiple of it.
      gate_up: hidden units in a tile of kernel A in the forward pass; divides `hidden`.
      dhidden: hidden units in a tile of kernel A in the backward pass; divides `hidden`.
      model: most model dimensions in a tile of kernel B, and of kernel C for w_down.
      gate_up_model: most model dimensions in a tile of kernel C for w_gate and w_up, whose
        gradients one thread block computes together.
      step: length of one step of a contraction; divides `hidden`.
      group: number of visits (an expert and a row tile each) that kernel A takes through all tiles
        of hidden units before it takes the next ones. Thread blocks that run at the same time then
        read the same data, which stays in the L2 cache.
      launch_gate_up: launch parameters of kernel A in the forward pass.
      launch_dhidden: launch parameters of kernel A in the backward pass.
      launch_model: launch parameters of kernel B.
      launch_weights: launch parameters of kernel C.
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

    Other widths are padded (hidden_unit_padding.py). It is 128, for which tiles are the fastest, or
    64 if padding to 128 would cost more than 10% more FLOPs than padding to 64.
    """
    small, large = (sum(-(-w // unit) * unit for w in widths) for unit in (64, 128))
    return 64 if large > 1.1 * small else 128


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """Returns the tile sizes for experts of these widths on a chip.

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
    """Returns how many tokens an expert needs in a self-test to take every path of the kernels.

    They fill more than one row tile and part of another one, and need more contraction steps than
    are in flight at a time.
    """
    return 2 * tiles.rows + (tiles.launch_weights.stages + 2) * tiles.step + 5


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError if a kernel would need more thread blocks than a CUDA grid may have."""
    columns = max(map(max, placement.widths)) // min(tiles.gate_up, tiles.dhidden)
    programs = _num_visits(num_rows, placement, tiles) * columns
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"moe.backend=pallas_triton: {num_rows} routed tokens over experts of widths "
            f"{placement.widths} need {programs} programs, more than {MAX_PROGRAMS}; lower "
            "training.batch_size, or use a backend without this limit: blocked, reference"
        )


class Visits(NamedTuple):
    """The tasks of a shard: pairs of an expert and a row tile that holds tokens routed to it.

    Such a pair is called a visit. Those of the widest expert come first. Padding rows count as an
    expert of width 0, so that the from-hidden kernel (B), which multiplies hidden activations by
    the down projection, stores zeros there. The list has room for the most visits of any routing.
    Entries that are left over have no rows and no width, so that a kernel stores nothing for them.
    All arrays are int32.
    """

    row_V: jax.Array  # first row of the row tile
    start_V: jax.Array  # first row of the expert
    end_V: jax.Array  # the row after the expert's last one
    width_V: jax.Array  # number of hidden units of the expert
    offset_V: jax.Array  # its first hidden unit on the H axis


class WeightTiles(NamedTuple):
    """The tiles of hidden units of a shard, those of the expert with the most tokens first.

    The weights kernel (C) computes their gradients. All arrays are int32.
    """

    start_C: jax.Array  # first row of the expert that owns the tile
    end_C: jax.Array  # the row after the expert's last one
    column_C: jax.Array  # first hidden unit of the tile, counted within the expert
    flat_C: jax.Array  # the same hidden unit, counted on the H axis


class Routing(NamedTuple):
    """Everything that the kernels read about the routing; built once per layer and step."""

    visits: Visits
    weight_tiles: WeightTiles


class Saved(NamedTuple):
    """The arrays that the forward pass saves for the backward pass."""

    routing: Routing
    hidden_NM: jax.Array
    by_gate_NM: jax.Array  # derivative of the hidden activations with respect to gate
    by_up_NM: jax.Array  # derivative of the hidden activations with respect to up


def _num_visits(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> int:
    """Returns the static length of the list of visits: (expert, row tile) pairs with tokens.

    It is the largest number that any routing can give, rounded up to a multiple of `tiles.group`.
    """
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
    """Builds the lists of tiles that the kernels read.

    All devices run the same compiled code, so whatever differs between shards is looked up in
    constant tables by `shard`.

    Args:
      rows_E: the number of tokens routed to every expert of the shard.
      shard: the shard that this device holds.
      placement: the experts of all shards.
      tiles: the tile sizes.
      num_rows: routed tokens and padding rows.
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
    """Lists the visits, the (expert, row tile) pairs with tokens, those of the widest expert first.

    A thread block of the from-hidden kernel (B) takes longer for a wider expert. The longest start
    first, so that none is left to run alone at the end. The expert of an entry is found by
    comparing the entry's index with the last index of every expert: a small reduction instead of a
    scatter, which would be slow on GPU.
    """
    num_tiles = _num_row_tiles(num_rows, tiles)
    widths = np.zeros((len(placement.widths), placement.slots), np.int32)
    offsets = np.zeros_like(widths)
    for s, shard_widths in enumerate(placement.widths):
        widths[s, : len(shard_widths)] = shard_widths
        offsets[s, : len(shard_widths)] = expert_widths.offsets(shard_widths)
    order = np.argsort(-widths, axis=1, kind="stable")
    # The last entry stands for the padding rows, as if they belonged to an expert of width 0.
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
    """Lists the tiles of the H axis, those of the expert with the most tokens first.

    Their contraction over tokens takes longest, so they start first.
    """
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
    """Computes the expert FFN of every row. See chunks.py for the arguments.

    Returns:
      y_ND, and the arrays that `backward` needs, or None unless `save` is set.
    """
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
    """Returns (dx_ND, dw_gate, dw_up, dw_down). See chunks.py for the arguments."""
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
    """Epilogue of the to-hidden kernel (A) in a forward pass that saves nothing: SwiGLU."""
    return (swiglu.swiglu(gate, up),)


def _swiglu_and_derivatives(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    """Returns (hidden, its derivative with respect to gate, its derivative with respect to up).

    hidden is silu(gate) * up. The to-hidden kernel (A) applies this in the forward pass of
    training.
    """
    return swiglu.swiglu_backward(gate, up, jnp.ones_like(gate))


class _Kernels:
    """Launches the kernels for one routing of tokens to experts."""

    def __init__(
        self, routing: Routing, placement: expert_placement.Placement, tiles: Tiles, interpret: bool
    ):
        self.routing = routing
        self.tiles = tiles
        self.interpret = interpret
        self.widest = max(map(max, placement.widths))
        self.num_hidden = sum(placement.widths[0])

    def pad(self, rows_ND: jax.Array) -> jax.Array:
        """Returns rows padded to a multiple of the row tile size; the kernels ignore the padding.

        If there is nothing to pad, no copy is made.
        """
        num_rows = _num_row_tiles(rows_ND.shape[0], self.tiles) * self.tiles.rows
        return jnp.pad(rows_ND, ((0, num_rows - rows_ND.shape[0]), (0, 0)))

    def compute_hidden(
        self, rows_ND: jax.Array, w_gate: jax.Array, w_up: jax.Array, save: bool
    ) -> list[jax.Array]:
        """Launches the to-hidden kernel (A) of the forward pass: gate and up matmuls and SwiGLU.

        Returns:
          The hidden activations [N, M] and, if `save`, their derivatives with respect to gate and
          up. Only an expert's own hidden units in its own rows are written; the other elements are
          undefined.
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
        """Launches the to-hidden kernel (A) of the backward pass.

        Args:
          dy_ND: the gradient of the output.
          w_down: the weights of the down projection.
          by_gate_NM, by_up_NM: the saved derivatives of the hidden activations.

        Returns:
          The gradients of gate and up, [N, M] each.
        """
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
        """Launches the from-hidden kernel (B): hidden activations times their expert's weights.

        Args:
          name: the name of the kernel in profiles.
          pairs: one pair for the down projection, two for the gradient of the input. Each is hidden
            activations [N, M] and weights [H, D], or [D, H] if `transposed`.
          transposed: whether the weights are transposed.

        Returns:
          The sum of the matmuls of all pairs, [N, D]; 0 in padding rows.
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
        """Launches the weights kernel (C), which computes weight gradients.

        For every expert it multiplies rows by hidden activations, summed over the expert's rows.

        Args:
          name: the name of the kernel in profiles.
          rows_ND: the inputs of the experts, or the gradients of their outputs.
          hiddens: hidden activations or their gradients, [N, M] each.
          hidden_first: True for w_down [H, D], False for w_gate and w_up [D, H].

        Returns:
          One weight gradient for each of `hiddens`.
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
        """Launches a kernel with `num_programs` thread blocks; returns arrays like `out_shape`."""
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
    """The to-hidden kernel (A) of the forward pass: stores epilogue(gate, up) for one tile.

    The tile is one visit (an expert and a row tile) x `tiles.gate_up` of the expert's hidden units.
    """
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
    """The to-hidden kernel (A) of the backward pass: stores the gradients of gate and up.

    They are the gradient of the hidden activations, dy w_down^T, times the saved derivatives of the
    hidden activations with respect to gate and up.
    """
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
        # The outputs are computed one after the other, so that registers hold at most one tile of
        # saved derivatives at a time.
        for derivative_ref, out_ref in ((by_gate_ref, dgate_ref), (by_up_ref, dup_ref)):
            block = rows, pl.ds(column, columns)
            value = dhidden * derivative_ref[block].astype(jnp.float32)
            triton.store(out_ref.at[block], value.astype(out_ref.dtype), mask=own)


def _visit_and_column(widest: int, columns: int, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Returns what this thread block of the to-hidden kernel (A) computes.

    Consecutive thread blocks take the visits (an expert and a row tile) of one group for one tile
    of hidden units, then the same visits for the next tile, then the next group of visits.

    Args:
      widest: the number of hidden units of the widest expert.
      columns: the hidden units in a tile.
      tiles: the tile sizes.

    Returns:
      The index of the visit, and the first hidden unit of the tile, counted within the expert.
    """
    group, in_group = _divide(pl.program_id(0), tiles.group * (widest // columns))
    column, visit = _divide(in_group, tiles.group)
    return group * tiles.group + visit, pl.multiple_of(column * columns, columns)


def _find_tile(
    visits: Visits, visit: jax.Array, column: jax.Array, columns: int, tiles: Tiles
) -> tuple[pl.Slice, pl.Slice, jax.Array]:
    """Returns the slice of the row tile, the slice of hidden units on the H axis, and a mask.

    The mask selects the rows of the tile that belong to the visiting expert.
    """
    row = pl.multiple_of(visits.row_V[visit], tiles.rows)
    # Without the hint `multiple_of`, Triton would load weights 2 bytes at a time.
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
    """The from-hidden kernel (B): one output tile, summed over the expert's hidden units.

    The tile is one visit (an expert and a row tile) x `model` of the model dimensions. Consecutive
    thread blocks compute the tiles of one visit, which read the same activations.
    """
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
    """The weights kernel (C): one tile of weight gradients, summed over the expert's rows.

    The tile is `tiles.hidden` hidden units x `model` of the model dimensions. Consecutive thread
    blocks compute the tiles of the same hidden units, which read the same activations.
    """
    hidden_refs = refs[:num_hiddens]
    out_refs = refs[num_hiddens:]
    tile, q = _divide(pl.program_id(0), rows_ref.shape[1] // model)
    start, end = start_C[tile], end_C[tile]
    units = pl.ds(pl.multiple_of(column_C[tile], tiles.hidden), tiles.hidden)
    flat = pl.ds(pl.multiple_of(flat_C[tile], tiles.hidden), tiles.hidden)
    model_dims = pl.ds(q * model, model)

    def accumulate(k: jax.Array, sums: tuple) -> tuple[jax.Array, ...]:
        # Steps begin at the expert's first row, so only rows after its last one have to be masked.
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
    """Returns the quotient and the remainder of a division by a static divisor, as int32."""
    divisor = jnp.int32(divisor)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _dot(a: jax.Array, b: jax.Array, transposed_b: bool = False) -> jax.Array:
    """Returns a @ b, or a @ b.T, accumulated in float32."""
    return triton.dot(a, b.T if transposed_b else b, allow_tf32=False)


def _own_rows(
    row: jax.Array, start: jax.Array, end: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """Returns the mask of a tile that selects the rows of one expert.

    Args:
      row: the first row of the tile.
      start, end: the first row of the expert, and the row after its last one.
      shape: the shape of the tile, and of the mask: (rows, columns).
    """
    row_R = row + lax.iota(jnp.int32, shape[0])
    own_R = (row_R >= start) & (row_R < end)
    return jnp.broadcast_to(own_R[:, None], shape)
