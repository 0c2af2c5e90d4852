"""What one MoDSE layer's forward and backward pass asks of a TPU: counted, not measured.

python -m benchmarks.tpu_report [--dims=1536,2048] [--rows=131072] [--chips=v5e,v5p,v6e]
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from modse_jax.moe import expert_widths
from modse_jax.moe.experts import pallas_tpu, tile_lists
from modse_jax.runtime import chips

DIMS = flags.DEFINE_list(
    "dims", ["1536", "2048"], "model widths D; experts are the paper's pairs of ratios"
)


ROWS = flags.DEFINE_integer("rows", 131_072, "routed rows, spread at random over the experts")


NAMES = flags.DEFINE_list("chips", list(pallas_tpu.TILINGS), "chips")


class Report(NamedTuple):
    tile_visits: int  # row tiles visited, once per expert with rows in it
    rows_wasted: int  # rows of visited tiles that are not the visiting expert's
    flops_needed: float
    issued_over_needed: float  # the recomputation of gate and up counts as needed
    bytes_moved: float  # by the kernels: blocks fetched and stored
    product_seconds: float  # at the chip's peak rates; the slower of the two is the roofline
    memory_seconds: float


def report(rows: Sequence[int], widths: Sequence[int], dim: int, chip: str) -> Report:
    """Counts of the three kernels, bf16, for a routing. rows: per expert."""
    tiles = pallas_tpu.tiles_for(widths, dim, chip, "bfloat16")
    count_E, _ = tile_lists.count_visits(
        jnp.asarray(rows), tiles, max(1, -(-sum(rows) // tiles.rows))
    )
    visited_E, width_E = np.asarray(count_E, np.float64), np.array(widths)
    needed, issued = (
        22 * dim * float(n_E @ width_E) for n_E in (np.array(rows), visited_E * tiles.rows)
    )
    moved = _bytes(visited_E, width_E, dim, tiles)
    peak = chips.CHIPS[chip]
    return Report(
        int(visited_E.sum()),
        int(visited_E.sum() * tiles.rows - sum(rows)),
        needed,
        issued / needed,
        moved,
        issued / (peak.teraflops * 1e12),
        moved / (peak.terabytes * 1e12),
    )


def _bytes(visited_E, width_E, dim, tiles):
    tasks = float(
        visited_E @ (width_E // tiles.hidden)
    )  # of kernels A and B; C has one more per empty tile
    row, hidden, weight, flat = (
        2 * n
        for n in (
            tiles.rows * dim,
            tiles.rows * tiles.hidden,
            tiles.hidden * dim,
            int(width_E.sum()) * dim,
        )
    )
    parts = dim // tiles.outer
    # A: x forward, x and dy backward, for every task; its weights stay where the model axis is one tile.
    a = tasks * (3 * row + 4 * hidden) + 5 * (flat if dim == tiles.inner else tasks * weight)
    # B: hidden once for every part of the model axis, weights for every task; one output row tile per visit.
    b = tasks * (3 * hidden * parts + 3 * weight) + 2 * visited_E.sum() * row
    # C: rows for every task, hidden for every task and part, weight gradients once.
    c = tasks * (2 * row + 3 * hidden * parts) + 3 * flat
    return float(a + b + c)


def main(_):
    print(
        f"{'chip':5} {'D':>5} {'visits':>7} {'rows wasted':>12} {'issued/needed':>14} {'GB moved':>9} {'products':>9}"
        f" {'memory':>9}"
    )
    for chip in NAMES.value:
        for dim in map(int, DIMS.value):
            widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
            rows = np.random.default_rng(0).multinomial(ROWS.value, np.full(8, 1 / 8)).tolist()
            r = report(rows, widths, dim, chip)
            print(
                f"{chip:5} {dim:5} {r.tile_visits:7} {r.rows_wasted:12} {r.issued_over_needed:14.3f} "
                f"{r.bytes_moved / 1e9:9.1f} {1e3 * r.product_seconds:7.1f}ms {1e3 * r.memory_seconds:7.1f}ms"
            )


if __name__ == "__main__":
    app.run(main)
