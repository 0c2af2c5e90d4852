"""The grouped feed-forward product as Pallas Mosaic GPU kernels for Hopper (sm90), over tiles of rows sorted by expert.

The kernels are persistent: a block per multiprocessor, which takes tasks from a list made on the device from the
routing (expert_tasks.py). Weights are read through one descriptor of the flat axis, wherever an expert's columns begin.
Three kinds of kernel:

  A hidden-out  a visit (rows of one expert in one tile) times 64 of the expert's columns: gate and up with SwiGLU
                behind them; or the gradient of the hidden activations, with SwiGLU's own gradient behind it
  B hidden-in   a visit times a tile of the model axis, over as many columns as the expert has: down; dx
  C weights     a tile of the flat axis times one of the model axis, over the expert's rows: weight gradients

Work whose length differs (B, C) is begun with the longest. Every visit stores its own rows alone, in pieces of powers
of two: what is not an expert's own is never stored (A, B), or set to 0 by a select before it is summed (C). So rows
past the last expert's, and columns past an expert's width, may hold NaN. Gate and up activations are kept for the
backward pass, [N, M] each; it begins by transposing the weights, x and dy, by estimate 3% of its time, so that every
product has its operands as they lie in memory. Checked in interpret mode, which knows
nothing of waiting, and by lowering for CUDA without one; never run on hardware (LOG.md).

Legend: N routed rows, D model, E experts, H flat hidden axis, M widest expert, V visits; tiles: R rows, T tasks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import hidden_unit_padding, tile_lists

CHIPS = {"h100": 132, "h200": 132}  # multiprocessors


DTYPES = ("bfloat16", "float16")


UNIT = 64  # columns of kernel A's tiles, of which it sums two at once, and of B's steps; rows of C's steps


MODEL = 128  # of the model axis, in B and C


MAX_TASKS = 2**24


class Tiles(NamedTuple):
    """rows: of a tile. hidden: columns of kernel A's tiles, and of B's steps. wide: columns of C's tiles. stages: steps
    in flight. blocks: multiprocessors."""

    rows: int = 128
    hidden: int = UNIT
    wide: int = 128
    stages: int = 4
    blocks: int = 132


def tiles_for(widths: Sequence[int], dim: int, chip: str, dtype: str) -> Tiles:
    """The tiles for a chip. Raises ValueError, naming what would do, for a chip without these kernels, a type that they
    do not multiply, or a model width that cannot be cut into tiles."""
    if chip not in CHIPS:
        raise ValueError(
            f"moe.backend=pallas_gpu needs one of {', '.join(CHIPS)}, this is {chip}; backends that run "
            "anywhere: auto, blocked, reference"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"pallas_gpu multiplies {' and '.join(DTYPES)}, not {dtype}; set model.dtype=bfloat16, or use "
            "a backend that takes any: blocked, reference"
        )
    if dim % MODEL:
        raise ValueError(
            f"pallas_gpu on {chip}: model.dim={dim} is not divisible by {MODEL}; backends that take any: "
            "blocked, reference"
        )
    wide = 128 if all(hidden_unit_padding.pad_width(w, UNIT) % 128 == 0 for w in widths) else UNIT
    return Tiles(wide=wide, blocks=_multiprocessors(chip))


def unit_for(widths: Sequence[int], chip: str, dtype: str) -> int:
    """Returns the number of hidden units of which every expert's width must be a multiple (see expert_padding)."""
    return UNIT


def _multiprocessors(chip):
    """Of this machine's GPU, which may have fewer than others of its name; else the usual number."""
    device = jax.local_devices()[0]
    return device.core_count if device.platform == "gpu" else CHIPS[chip]


def check_rows(tiles: Tiles) -> int:
    """Rows of an expert that use a kernel in every way: whole tiles, more steps than are in flight, a rest."""
    return 2 * tiles.rows + (tiles.stages + 2) * UNIT + 5


def check_tasks(num_rows: int, placement: expert_placement.Placement, tiles: Tiles) -> None:
    """Raises ValueError where the list of tasks for so many rows would be too long."""
    bound = tile_lists.task_bound(num_rows, placement, tiles)
    if bound > MAX_TASKS:
        raise ValueError(
            f"pallas_gpu: {num_rows} rows over widths {placement.widths} make {bound} tasks of tiles "
            f"{tiles.rows} x {tiles.hidden}, more than {MAX_TASKS}; lower training.batch_size, or use a "
            "backend without a list: blocked, reference"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def pallas_gpu(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret=False):
    """See expert_ffn.expert_ffn. Every width divides by 64, D by 128; bfloat16 or float16; the rows pass check_tasks.
    shard: which one of the placement this is, int32 []."""
    return _forward(
        x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret, keep=False
    )[0]


def _forward(x_ND, rows_E, w_gate, w_up, w_down, shard, placement, tiles, interpret, keep=True):
    run = _Run(x_ND, rows_E, shard, placement, tiles, interpret)
    x = run.pad(x_ND)
    epilogue, outputs = (_swiglu_kept, 3) if keep else (tile_lists.swiglu, 1)
    hidden_NM, *kept = run.hidden_out(x, [w_gate, w_up], epilogue, outputs)
    y_ND = run.hidden_in([(hidden_NM, w_down)])
    return run.unpad(y_ND, x_ND), (x_ND, rows_E, w_gate, w_up, w_down, shard, kept)


def _backward(placement, tiles, interpret, saved, dy_ND):
    x_ND, rows_E, w_gate, w_up, w_down, shard, kept = saved
    run = _Run(x_ND, rows_E, shard, placement, tiles, interpret)
    x, dy = run.pad(x_ND), run.pad(dy_ND)
    hidden_NM, dgate_NM, dup_NM = run.hidden_out(dy, [w_down.T], _swiglu_backward, 3, kept)
    dx_ND = run.hidden_in([(dgate_NM, w_gate.T), (dup_NM, w_up.T)])
    dw_gate, dw_up = (run.weights(x.T, d) for d in (dgate_NM, dup_NM))
    return run.unpad(dx_ND, x_ND), None, dw_gate, dw_up, run.weights(dy.T, hidden_NM).T, None


pallas_gpu.defvjp(_forward, _backward)


def _swiglu_kept(gate, up):
    return *tile_lists.swiglu(gate, up), gate, up


def _swiglu_backward(dhidden, gate, up):
    return tile_lists.swiglu_backward(gate, up, dhidden)


class _Run:
    """The kernels over one routing."""

    def __init__(self, x_ND, rows_E, shard, placement, tiles, interpret):
        self.rows_E, self.placement, self.tiles, self.interpret = (
            rows_E,
            placement,
            tiles,
            interpret,
        )
        self.num_tiles = max(1, -(-x_ND.shape[0] // tiles.rows))
        self.columns = tile_lists.columns_of(placement, shard, self.num_tiles * tiles.rows, tiles)
        self.end_E = jnp.cumsum(rows_E).astype(jnp.int32)
        self.start_E = self.end_E - rows_E
        self.widest = max(map(max, placement.widths))

    def pad(self, x_ND):
        return jnp.pad(x_ND, ((0, self.num_tiles * self.tiles.rows - x_ND.shape[0]), (0, 0)))

    def unpad(self, y_ND, like_ND):
        """Rows of nobody come back as 0, whatever the kernels left there."""
        y_ND = y_ND[: like_ND.shape[0]]
        return jnp.where((jnp.arange(y_ND.shape[0]) < self.end_E[-1])[:, None], y_ND, 0)

    def hidden_out(self, rows_ND, weights, epilogue, outputs, kept=()):
        """Kernel A: [N, M] arrays, epilogue(rows x each of the weights [D, H], each of the kept [N, M])."""
        t, work = (
            self.tiles,
            tile_lists.hidden_in_work(self.rows_E, self.columns, self.tiles, self.num_tiles),
        )
        (N, D), dtype = rows_ND.shape, rows_ND.dtype
        n, block = len(weights), (t.rows, t.hidden)

        def body(live, lo, hi, row_tile, column, flat, x, *refs):
            w, kept_refs, out = refs[:n], refs[n : n + len(kept)], refs[n + len(kept) :]

            @plgpu.nd_loop((live[0],), collective_axes="sm")
            def _(loop):
                task = loop.index[0]
                r, c, f = row_tile[task], column[task], flat[task]

                def products(*sums):
                    def step(_, x_smem, *w_smem):
                        for total, tile in zip(sums, w_smem):
                            plgpu.wgmma(total, x_smem, tile)
                        plgpu.wgmma_wait(
                            len(sums)
                        )  # the step before is done with its tiles: they are released

                    w_spec = plgpu.BlockSpec((UNIT, t.hidden), lambda k: (k, f), delay_release=1)
                    plgpu.emit_pipeline(
                        step,
                        grid=(D // UNIT,),
                        max_concurrent_steps=t.stages,
                        in_specs=[
                            plgpu.BlockSpec((t.rows, UNIT), lambda k: (r, k), delay_release=1)
                        ]
                        + [w_spec] * n,
                    )(x, *w)
                    return tuple(total[...] for total in sums)

                values = pl.run_scoped(products, *[plgpu.ACC(block)] * n)

                def finish(barrier, *tiles):
                    read, write = tiles[: len(kept)], tiles[len(kept) :]
                    here = pl.ds(r * t.rows, t.rows), pl.ds(c * t.hidden, t.hidden)
                    for ref, tile in zip(kept_refs, read):
                        plgpu.copy_gmem_to_smem(ref.at[here], tile, barrier)
                    if kept:
                        plgpu.barrier_wait(barrier)
                    new = epilogue(*values, *(tile[...].astype(jnp.float32) for tile in read))
                    for tile, value in zip(write, new):
                        tile[...] = value.astype(dtype)
                    _store(
                        write,
                        out,
                        r * t.rows,
                        lo[task],
                        hi[task],
                        pl.ds(c * t.hidden, t.hidden),
                        t.rows,
                    )

                pl.run_scoped(
                    finish,
                    plgpu.Barrier(num_arrivals=max(1, len(kept))),
                    *[plgpu.SMEM(block, dtype)] * (len(kept) + outputs),
                )

        shape = jax.ShapeDtypeStruct((N, self.widest), dtype)
        lo, hi = self._own(work.expert, work.row_tile)
        return self._call(
            body,
            [shape] * outputs,
            work.live[None],
            lo,
            hi,
            work.row_tile,
            work.column,
            work.flat,
            rows_ND,
            *weights,
            *kept,
        )

    def hidden_in(self, pairs):
        """Kernel B: [N, D], the sum over pairs of hidden [N, M] x weights [H, D]."""
        t, dtype = self.tiles, pairs[0][0].dtype
        N, D = pairs[0][0].shape[0], pairs[0][1].shape[1]
        expert_V, row_tile_V, live_V = tile_lists.visit_list(self.rows_E, t, self.num_tiles)
        steps_V = jnp.where(live_V, self.columns.count_E[expert_V], 0)
        order = jnp.argsort(-steps_V, stable=True)  # the longest first; those not live last
        expert_V, row_tile_V, steps_V = expert_V[order], row_tile_V[order], steps_V[order]
        live = jnp.sum(live_V, dtype=jnp.int32) * (D // MODEL)
        lo, hi = self._own(expert_V, row_tile_V)

        def body(live, lo, hi, row_tile, steps, first, *refs):
            *operands, out = refs

            @plgpu.nd_loop((live[0],), collective_axes="sm")
            def _(loop):
                visit, q = lax.div(loop.index[0], D // MODEL), lax.rem(loop.index[0], D // MODEL)
                r, f = row_tile[visit], first[visit]

                def products(total):
                    for hidden, w in zip(operands[::2], operands[1::2]):

                        def step(_, hidden_smem, w_smem):
                            plgpu.wgmma(total, hidden_smem, w_smem)
                            plgpu.wgmma_wait(1)

                        plgpu.emit_pipeline(
                            step,
                            grid=(steps[visit],),
                            max_concurrent_steps=t.stages,
                            in_specs=[
                                plgpu.BlockSpec((t.rows, UNIT), lambda k: (r, k), delay_release=1),
                                plgpu.BlockSpec(
                                    (UNIT, MODEL), lambda k: (f + k, q), delay_release=1
                                ),
                            ],
                        )(hidden, w)
                        plgpu.wgmma_wait(
                            0
                        )  # the next pipeline begins by overwriting this one's tiles
                    return total[...]

                value = pl.run_scoped(products, plgpu.ACC((t.rows, MODEL)))

                def finish(tile):
                    tile[...] = value.astype(dtype)
                    _store(
                        [tile],
                        [out],
                        r * t.rows,
                        lo[visit],
                        hi[visit],
                        pl.ds(q * MODEL, MODEL),
                        t.rows,
                    )

                pl.run_scoped(finish, plgpu.SMEM((t.rows, MODEL), dtype))

        return self._call(
            body,
            jax.ShapeDtypeStruct((N, D), dtype),
            live[None],
            lo,
            hi,
            row_tile_V,
            steps_V,
            self.columns.first_E[expert_V],
            *[a for pair in pairs for a in pair],
        )

    def weights(self, rows_DN, hidden_NM):
        """Kernel C: [D, H], for every tile of the flat axis rows x hidden, over the rows of its expert."""
        t, dtype = self.tiles, rows_DN.dtype
        D, H = rows_DN.shape[0], sum(self.placement.widths[0])
        scale = t.wide // t.hidden
        expert_C = self.columns.expert_C[::scale]  # of every tile of `wide` columns
        column_C = (
            jnp.arange(H // t.wide, dtype=jnp.int32) - self.columns.first_E[expert_C] // scale
        )
        flat_C = jnp.argsort(-self.rows_E[expert_C], stable=True).astype(
            jnp.int32
        )  # the longest first
        expert_C, column_C = expert_C[flat_C], column_C[flat_C]
        block = MODEL, t.wide
        swizzle = plgpu.find_swizzle(UNIT * dtype.itemsize * 8)
        transforms = (
            plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
            plgpu.SwizzleTransform(swizzle),
        )

        def body(start, stop, column, flat, x, hidden, out):
            @plgpu.nd_loop((H // t.wide * (D // MODEL),), collective_axes="sm")
            def _(loop):
                task, q = lax.div(loop.index[0], D // MODEL), lax.rem(loop.index[0], D // MODEL)
                lo, hi, c, f = start[task], stop[task], column[task], flat[task]
                first = lax.div(lo, UNIT)
                steps = lax.div(hi + UNIT - 1, UNIT) - first

                def products(total):
                    def step(indices, x_smem, hidden_smem):
                        @pl.when((indices[0] == 0) | (indices[0] == steps - 1))
                        def _():  # a neighbour's rows
                            row = (first + indices[0]) * UNIT
                            for axis, tile in ((1, x_smem), (0, hidden_smem)):
                                _keep(tile, axis, lo - row, hi - row)
                            plgpu.commit_smem()

                        plgpu.wgmma(total, x_smem, hidden_smem)
                        plgpu.wgmma_wait(1)

                    @pl.when(hi > lo)
                    def _():
                        plgpu.emit_pipeline(
                            step,
                            grid=(steps,),
                            max_concurrent_steps=t.stages,
                            in_specs=[
                                plgpu.BlockSpec(
                                    (MODEL, UNIT),
                                    lambda k: (q, first + k),
                                    delay_release=1,
                                    transforms=transforms,
                                ),
                                plgpu.BlockSpec(
                                    (UNIT, t.wide),
                                    lambda k: (first + k, c),
                                    delay_release=1,
                                    transforms=transforms,
                                ),
                            ],
                        )(x, hidden)

                    return total[...]

                value = pl.run_scoped(products, plgpu.ACC(block))

                def finish(tile):
                    tile[...] = value.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        tile, out.at[pl.ds(q * MODEL, MODEL), pl.ds(f * t.wide, t.wide)]
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                pl.run_scoped(finish, plgpu.SMEM(block, dtype, transforms=transforms))

        return self._call(
            body,
            jax.ShapeDtypeStruct((D, H), dtype),
            self.start_E[expert_C],
            self.end_E[expert_C],
            column_C,
            flat_C,
            rows_DN,
            hidden_NM,
        )

    def _own(self, expert, row_tile):
        """(first, end) row of an expert within a tile of rows."""
        return (
            jnp.maximum(self.start_E[expert] - row_tile * self.tiles.rows, 0),
            jnp.minimum(self.end_E[expert] - row_tile * self.tiles.rows, self.tiles.rows),
        )

    def _call(self, body, out_type, *arguments):
        options = {"interpret": self.interpret} if self.interpret else {}
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=(self.tiles.blocks,),
            grid_names=("sm",),
            **options,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
        )(*arguments)


def _keep(tile, axis, lo, hi):
    """Sets what a tile in shared memory holds outside lo:hi of an axis to 0."""
    place = lax.broadcasted_iota(jnp.int32, tile.shape, axis)
    value = tile[...]
    tile[...] = jnp.where((place >= lo) & (place < hi), value, jnp.zeros_like(value))


def _store(tiles, outputs, row, lo, hi, columns, rows):
    """Rows lo:hi of tiles in shared memory to where they belong, in powers of 2: a copy has a static number of rows."""
    plgpu.commit_smem()
    count, done, size = hi - lo, lo, rows
    while size:

        @pl.when((count & size) != 0)
        def _(done=done, size=size):
            for tile, out in zip(tiles, outputs):
                plgpu.copy_smem_to_gmem(
                    tile.at[pl.ds(done, size)], out.at[pl.ds(row + done, size), columns]
                )

        done, size = done + (count & size), size // 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
