"""The grouped feed-forward product as Pallas TPU kernels, over tiles of rows sorted by expert and of the flat hidden
axis.

The list of tasks (expert_tasks.py) is made on the device from the routing and read from scalar memory, its length is a
dynamic grid bound. Three kinds of kernel, each with as many operand pairs as its use needs:

  A hidden-out  [rows, D] x [D, h_e] -> [rows, h_e]: gate and up with SwiGLU behind them; its backward pass
  B hidden-in   [rows, h_e] x [h_e, D] -> [rows, D]: down; dx
  C weights     over an expert's rows, for every tile of the flat axis: the three weight gradients

What is not an expert's own is never stored (A, B) or is set to 0 by a select before it is summed (C), never multiplied
by 0: rows past the last expert's, and columns past an expert's width, may hold NaN. Checked in interpret mode and by
compiling for v5e, v5p and v6e; never run on hardware (LOG.md).

Legend: N routed rows, D model, E experts, H flat hidden axis, M widest expert; tiles: R of rows, V visits.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import hidden_unit_padding
from modse_jax.moe.experts.tile_lists import (
    Work,
    columns_of,
    hidden_in_work,
    repeat,
    swiglu,
    swiglu_backward,
    task_bound,
    visit_list,
    visits,
)

# Scalar memory is 1 MiB; the longest list has five numbers a task (kernel B). Some is left for the compiler.
MAX_TASKS = 1_000_000 // (5 * 4)


class Tiles(NamedTuple):
    """rows, hidden: tile sizes. inner, outer: of the model axis, where it is summed over (kernel A) and where it is of
    the output (B, C). cores: TensorCores that share a kernel (2 where the chip runs as a megacore)."""

    rows: int
    hidden: int
    inner: int
    outer: int
    cores: int = 1


# (rows, largest hidden tile, largest model tile, unit of the hidden tile, cores), by chip. 512 rows: with 8 experts at
# 131,072 rows the tiles that two experts share cost 2.7%; 1,024 would cost 5.5%. A whole model axis keeps the weight
# tile in place from one row tile to the next; kernels B and C cut it into as many parts as there are cores, since it is
# what the cores share there (kernel A's tasks are shared out by `split`). Hidden tiles of 256 are bound by arithmetic
# on v5e and v5p (benchmarks/tpu_report.py) and compile in half the time of 768; v6e has 256 x 256 matrix units and
# needs 768, or rows are fetched too often.
TILINGS = {
    "v4": (512, 128, 2048, 128, 2),
    "v5e": (512, 256, 2048, 128, 1),
    "v5p": (512, 256, 2048, 128, 2),
    "v6e": (512, 768, 2048, 256, 1),
}


VMEM_LIMIT = 48 * 2**20  # v4 has 16 MiB whatever is asked for, hence its smaller tiles


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """The tiles for a chip and type; of float32 they are half as large. Raises ValueError, naming what would do, for a
    chip that has none or a model width that cannot be cut into tiles."""
    if chip not in TILINGS:
        raise ValueError(
            f"moe.backend=pallas_tpu needs one of {', '.join(TILINGS)}, this is {chip}; backends that run "
            "anywhere: auto, blocked, reference"
        )
    rows, hidden, model, unit, cores = TILINGS[chip]
    if dim % 128:
        raise ValueError(
            f"pallas_tpu on {chip}: model.dim={dim} is not divisible by 128; backends that take any: "
            "blocked, reference"
        )
    hidden, model = (size * 2 // jnp.dtype(dtype).itemsize for size in (hidden, model))
    outer = _divisor(dim, 128, max(128, min(model, dim // cores)))
    common = math.gcd(*(hidden_unit_padding.pad_width(w, unit) for w in widths))
    return Tiles(
        rows, _divisor(common, unit, max(unit, hidden)), _divisor(dim, 128, model), outer, cores
    )


def unit_for(widths: Sequence[int], chip: str, dtype: str) -> int:
    """Returns the number of hidden units of which every expert's width must be a multiple (see expert_padding)."""
    return TILINGS[chip][3]


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError where the list of tasks for so many rows would not fit in scalar memory."""
    bound = task_bound(num_rows, placement, tiles)
    if bound > MAX_TASKS:
        raise ValueError(
            f"pallas_tpu: {num_rows} rows over widths {placement.widths} make {bound} tasks of tiles "
            f"{tiles.rows} x {tiles.hidden}, more than the {MAX_TASKS} that fit in scalar memory; lower "
            "training.batch_size, or use a backend without a list: blocked, reference"
        )


def check_rows(tiles: Tiles) -> int:
    """Rows of an expert that use a kernel in every way: whole tiles and a rest."""
    return 2 * tiles.rows + 5


def _divisor(number, unit, largest):
    return max(d for d in range(unit, min(number, largest) + 1, unit) if number % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def pallas_tpu(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret=False):
    """See expert_ffn.expert_ffn. Every width divides by tiles.hidden, D by tiles.inner and tiles.outer; the rows pass
    check_tasks. shard: which one of the placement this is, int32 []."""
    return _forward(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret)[0]


def _forward(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret):
    run = _Run(rows_E, shard, placement, tiles, interpret)
    x = run.pad(x_ND)
    (hidden_NM,) = run.hidden_out([x], [(0, w_gate, False), (0, w_up, False)], swiglu, 1)
    y_ND = run.hidden_in([(hidden_NM, w_down, False)])
    return run.unpad(y_ND, x_ND), (x_ND, rows_E, w_gate, w_up, w_down, shard)


def _backward(placement, tiles, interpret, saved, dy_ND):
    x_ND, rows_E, w_gate, w_up, w_down, shard = saved
    run = _Run(rows_E, shard, placement, tiles, interpret)
    x, dy = run.pad(x_ND), run.pad(dy_ND)
    parts = [(0, w_gate, False), (0, w_up, False), (1, w_down, True)]
    hidden_NM, dgate_NM, dup_NM = run.hidden_out([x, dy], parts, swiglu_backward, 3)
    dx_ND = run.hidden_in([(dgate_NM, w_gate, True), (dup_NM, w_up, True)])
    dw_gate, dw_up = run.weights(x, [dgate_NM, dup_NM], hidden_first=False)
    (dw_down,) = run.weights(dy, [hidden_NM], hidden_first=True)
    return run.unpad(dx_ND, x_ND), None, dw_gate, dw_up, dw_down, None


pallas_tpu.defvjp(_forward, _backward)


def hidden_out_work(rows_E, columns, tiles, num_tiles) -> Work:
    """Kernel A: by column tile, then visit, so that the visits to one output block follow one another."""
    expert_V, row_tile_V, live_V = visit_list(rows_E, tiles, num_tiles)
    V = expert_V.shape[0]
    alive = live_V[None, :] & (
        jnp.arange(columns.most)[:, None] < columns.count_E[expert_V][None, :]
    )
    index = jnp.nonzero(alive.reshape(-1), size=columns.bound, fill_value=0)[0]
    column, visit = (index // V).astype(jnp.int32), (index % V).astype(jnp.int32)
    expert = expert_V[visit]
    live = jnp.sum(alive, dtype=jnp.int32)
    return Work(
        live,
        expert,
        row_tile_V[visit],
        column,
        columns.first_E[expert] + column,
        jnp.zeros_like(column),
    )


def weights_work(rows_E, columns, tiles, num_tiles) -> Work:
    """Kernel C: by tile of the flat axis, then row tile. An expert without rows has one task, which writes zeros."""
    count_E, first_E = visits(rows_E, tiles, num_tiles, empty_too=True)
    count_C = count_E[columns.expert_C]
    flat, index = repeat(count_C, columns.bound)
    expert = columns.expert_C[flat]
    row_tile = jnp.clip(first_E[expert] + index, 0, num_tiles - 1)
    last = index == count_C[flat] - 1
    return Work(
        jnp.sum(count_C, dtype=jnp.int32),
        expert,
        row_tile,
        flat - columns.first_E[expert],
        flat,
        (index == 0) + 2 * last.astype(jnp.int32),
    )


def split(work: Work, cores: int):
    """(first, end) task of every core [cores]: even shares, cut only between output blocks (kernel A)."""
    position = jnp.arange(work.expert.shape[0])
    block = jnp.stack((work.column, work.row_tile))
    new = jnp.concatenate((jnp.ones(1, bool), jnp.any(block[:, 1:] != block[:, :-1], axis=0)))
    shares = [
        jnp.min(jnp.where(new & (position >= work.live * c // cores), position, work.live))
        for c in range(1, cores)
    ]
    cuts = jnp.minimum(jnp.stack([jnp.zeros((), jnp.int32), *shares, work.live]), work.live).astype(
        jnp.int32
    )
    first, end = cuts[:-1], cuts[1:]
    # A core without tasks would still store a block, which it never computed: it does the last one too, just the same.
    last = jnp.max(jnp.where(new & (position < work.live), position, 0)).astype(jnp.int32)
    return jnp.where(first == end, last, first), jnp.where(first == end, work.live, end)


class _Run:
    """The kernels over one routing."""

    def __init__(self, rows_E, shard, placement, tiles, interpret):
        self.rows_E, self.shard, self.placement, self.tiles, self.interpret = (
            rows_E,
            shard,
            placement,
            tiles,
            interpret,
        )
        self.bounds = jnp.concatenate(
            (jnp.zeros(1, jnp.int32), jnp.cumsum(rows_E).astype(jnp.int32))
        )

    def pad(self, x_ND):
        self.num_tiles = max(1, -(-x_ND.shape[0] // self.tiles.rows))
        return jnp.pad(x_ND, ((0, self.num_tiles * self.tiles.rows - x_ND.shape[0]), (0, 0)))

    def unpad(self, y_ND, like_ND):
        """Rows of nobody come back as 0, whatever the kernels left there."""
        y_ND = y_ND[: like_ND.shape[0]]
        return jnp.where((jnp.arange(y_ND.shape[0]) < self.bounds[-1])[:, None], y_ND, 0)

    def hidden_out(self, rows, pairs, epilogue, outputs):
        """Kernel A. rows: arrays [N, D]. pairs: (index into rows, weights, whether they are [H, D], not [D, H])."""
        t, work = self.tiles, self._work(hidden_out_work)
        first, end = split(work, t.cores)
        dtype, (N, D) = rows[0].dtype, rows[0].shape

        def task(core, step, first, end):
            return jnp.minimum(first[core] + step, jnp.maximum(end[core] - 1, 0))

        def rows_spec(core, step, q, bounds, first, end, expert, row_tile, column, flat):
            return row_tile[task(core, step, first, end)], q

        def weights_spec(
            transposed, core, step, q, bounds, first, end, expert, row_tile, column, flat
        ):
            here = flat[task(core, step, first, end)]
            return (here, q) if transposed else (q, here)

        def out_spec(core, step, q, bounds, first, end, expert, row_tile, column, flat):
            here = task(core, step, first, end)
            return row_tile[here], column[here]

        in_specs = [pl.BlockSpec((t.rows, t.inner), rows_spec)] * len(rows)
        for _, _, transposed in pairs:
            in_specs.append(
                pl.BlockSpec(
                    (t.hidden, t.inner) if transposed else (t.inner, t.hidden),
                    functools.partial(weights_spec, transposed),
                )
            )
        shape = jax.ShapeDtypeStruct((N, max(map(max, self.placement.widths))), dtype)
        return pl.pallas_call(
            functools.partial(
                _hidden_out_kernel,
                rows=len(rows),
                pairs=[(p[0], p[2]) for p in pairs],
                epilogue=epilogue,
                tiles=t,
                steps=D // t.inner,
            ),
            out_shape=[shape] * outputs,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=7,
                in_specs=in_specs,
                out_specs=[pl.BlockSpec((t.rows, t.hidden), out_spec)] * outputs,
                grid=(t.cores, jnp.max(end - first), D // t.inner),
                scratch_shapes=[pltpu.VMEM((t.rows, t.hidden), jnp.float32)] * len(pairs),
            ),
            compiler_params=_params("parallel", "arbitrary", "arbitrary"),
            interpret=self.interpret,
        )(self.bounds, first, end, *work[1:5], *rows, *[weights for _, weights, _ in pairs])

    def hidden_in(self, pairs):
        """Kernel B: the sum over pairs of (hidden [N, M], weights, whether they are [D, H] rather than [H, D])."""
        t, work = self.tiles, self._work(hidden_in_work)
        N, D = pairs[0][0].shape[0], pairs[0][1].shape[0 if pairs[0][2] else 1]

        def weights_spec(transposed, q, step, bounds, expert, row_tile, column, flat, flags):
            return (q, flat[step]) if transposed else (flat[step], q)

        in_specs = []
        for _, _, transposed in pairs:
            in_specs.append(
                pl.BlockSpec((t.rows, t.hidden), lambda q, step, *s: (s[2][step], s[3][step]))
            )
            in_specs.append(
                pl.BlockSpec(
                    (t.outer, t.hidden) if transposed else (t.hidden, t.outer),
                    functools.partial(weights_spec, transposed),
                )
            )
        return pl.pallas_call(
            functools.partial(_hidden_in_kernel, pairs=[p[2] for p in pairs], tiles=t),
            out_shape=jax.ShapeDtypeStruct((N, D), pairs[0][0].dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=6,
                in_specs=in_specs,
                out_specs=pl.BlockSpec((t.rows, t.outer), lambda q, step, *s: (s[2][step], q)),
                grid=(D // t.outer, work.live),
                scratch_shapes=[pltpu.VMEM((t.rows, t.outer), jnp.float32)],
            ),
            compiler_params=_params("parallel", "arbitrary"),
            interpret=self.interpret,
        )(self.bounds, *work[1:], *[a for hidden, weights, _ in pairs for a in (hidden, weights)])

    def weights(self, rows_ND, hiddens, hidden_first):
        """Kernel C: for every hidden [N, M], its product with the rows over N: [H, D] if hidden_first, else [D, H]."""
        t, work = self.tiles, self._work(weights_work)
        D, H = rows_ND.shape[1], sum(self.placement.widths[0])
        block, shape = (
            ((t.hidden, t.outer), (H, D)) if hidden_first else ((t.outer, t.hidden), (D, H))
        )

        def out_spec(q, step, bounds, expert, row_tile, column, flat, flags):
            return (flat[step], q) if hidden_first else (q, flat[step])

        return pl.pallas_call(
            functools.partial(
                _weights_kernel, hidden_first=hidden_first, tiles=t, hiddens=len(hiddens)
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, rows_ND.dtype)] * len(hiddens),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=6,
                in_specs=[pl.BlockSpec((t.rows, t.outer), lambda q, step, *s: (s[2][step], q))]
                + [pl.BlockSpec((t.rows, t.hidden), lambda q, step, *s: (s[2][step], s[3][step]))]
                * len(hiddens),
                out_specs=[pl.BlockSpec(block, out_spec)] * len(hiddens),
                grid=(D // t.outer, work.live),
                scratch_shapes=[pltpu.VMEM(block, jnp.float32)] * len(hiddens),
            ),
            compiler_params=_params("parallel", "arbitrary"),
            interpret=self.interpret,
        )(self.bounds, *work[1:], rows_ND, *hiddens)

    def _work(self, kind):
        columns = columns_of(
            self.placement, self.shard, self.num_tiles * self.tiles.rows, self.tiles
        )
        return kind(self.rows_E, columns, self.tiles, self.num_tiles)


def _hidden_out_kernel(
    bounds, first, end, expert, row_tile, column, flat, *refs, rows, pairs, epilogue, tiles, steps
):
    weights, outputs, sums = (
        refs[rows : rows + len(pairs)],
        refs[rows + len(pairs) : -len(pairs)],
        refs[-len(pairs) :],
    )
    core, q = pl.program_id(0), pl.program_id(2)
    task = first[core] + pl.program_id(1)

    @pl.when(task < end[core])
    def _():
        for i, (row, transposed) in enumerate(pairs):
            new = _dot(refs[row][...], weights[i][...], 1, 1 if transposed else 0)
            sums[i][...] = jnp.where(q == 0, new, sums[i][...] + new)

        @pl.when(q == steps - 1)
        def _():
            mine = _mine(bounds, expert[task], row_tile[task], tiles)
            for out, new in zip(outputs, epilogue(*(s[...] for s in sums))):
                out[...] = jnp.where(mine, new, out[...].astype(jnp.float32)).astype(out.dtype)


def _hidden_in_kernel(bounds, expert, row_tile, column, flat, flags, *refs, pairs, tiles):
    *operands, out, total = refs
    task = pl.program_id(1)
    new = sum(
        _dot(operands[2 * i][...], operands[2 * i + 1][...], 1, 1 if transposed else 0)
        for i, transposed in enumerate(pairs)
    )
    total[...] = jnp.where(flags[task] % 2 == 1, new, total[...] + new)

    @pl.when(flags[task] >= 2)
    def _():
        mine = _mine(bounds, expert[task], row_tile[task], tiles)
        out[...] = jnp.where(mine, total[...], out[...].astype(jnp.float32)).astype(out.dtype)


def _weights_kernel(
    bounds, expert, row_tile, column, flat, flags, rows, *refs, hidden_first, tiles, hiddens
):
    operands, outputs, totals = refs[:hiddens], refs[hiddens : 2 * hiddens], refs[2 * hiddens :]
    task = pl.program_id(1)
    mine = _mine(bounds, expert[task], row_tile[task], tiles)
    left = _masked(rows, mine)
    for operand, total in zip(operands, totals):
        right = _masked(operand, mine)
        new = _dot(right, left, 0, 0) if hidden_first else _dot(left, right, 0, 0)
        total[...] = jnp.where(flags[task] % 2 == 1, new, total[...] + new)

    @pl.when(flags[task] >= 2)
    def _():
        for out, total in zip(outputs, totals):
            out[...] = total[...].astype(out.dtype)


def _mine(bounds, expert, row_tile, tiles):
    row = row_tile * tiles.rows + lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
    return (row >= bounds[expert]) & (row < bounds[expert + 1])


def _masked(ref, mine):
    return jnp.where(mine, ref[...].astype(jnp.float32), 0).astype(ref.dtype)


def _dot(a, b, axis_a, axis_b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _params(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)
