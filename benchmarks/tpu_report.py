"""Counts what one MoDSE layer's forward and backward pass needs on a TPU. Nothing is measured.

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
    "dims", ["1536", "2048"], "Model widths D. Experts are the paper's pairs of ratios."
)
ROWS = flags.DEFINE_integer("rows", 131_072, "Routed tokens, distributed at random over experts.")
CHIPS = flags.DEFINE_list("chips", list(pallas_tpu.TILINGS), "TPUs to count for.")

BFLOAT16_BYTES = 2


class Report(NamedTuple):
    """Work of the three kernels in one forward and backward pass."""

    tile_visits: int  # row tiles visited, once per expert with tokens in it
    rows_wasted: int  # rows of visited tiles that belong to another expert or to none
    flops_needed: float
    issued_over_needed: float  # FLOPs; the recomputation of gate and up counts as needed
    bytes_moved: float  # blocks that the kernels read and write
    matmul_seconds: float  # at the chip's peak rate; the slower of the two is the roofline
    memory_seconds: float


def count_work(rows: Sequence[int], widths: Sequence[int], dim: int, chip: str) -> Report:
    """Counts the work of the kernels in bfloat16.

    Args:
        rows: routed tokens of each expert.
        widths: hidden units of each expert.
        dim: model width.
        chip: a name in chips.CHIPS.
    """
    tiles = pallas_tpu.tiles_for(widths, dim, chip, "bfloat16")
    num_tiles = max(1, -(-sum(rows) // tiles.rows))
    count_E, _ = tile_lists.count_visits(jnp.asarray(rows), tiles, num_tiles)
    visits_E = np.asarray(count_E, np.float64)
    width_E = np.array(widths)
    needed = 22 * dim * float(np.array(rows) @ width_E)
    issued = 22 * dim * float((visits_E * tiles.rows) @ width_E)
    moved = _count_bytes(visits_E, width_E, dim, tiles)
    peak = chips.CHIPS[chip]
    return Report(
        tile_visits=int(visits_E.sum()),
        rows_wasted=int(visits_E.sum() * tiles.rows - sum(rows)),
        flops_needed=needed,
        issued_over_needed=issued / needed,
        bytes_moved=moved,
        matmul_seconds=issued / (peak.teraflops * 1e12),
        memory_seconds=moved / (peak.terabytes * 1e12),
    )


def _count_bytes(
    visits_E: np.ndarray, width_E: np.ndarray, dim: int, tiles: pallas_tpu.Tiles
) -> float:
    """Returns the bytes that the kernels A, B and C of pallas_tpu.py read and write."""
    # Tasks of kernels A and B. Kernel C has one more for each empty tile, which is left out.
    tasks = float(visits_E @ (width_E // tiles.hidden))
    row_tile = BFLOAT16_BYTES * tiles.rows * dim
    hidden_tile = BFLOAT16_BYTES * tiles.rows * tiles.hidden
    weight_tile = BFLOAT16_BYTES * tiles.hidden * dim
    all_weights = BFLOAT16_BYTES * int(width_E.sum()) * dim
    parts = dim // tiles.outer
    # A: x forward, x and dy backward, for every task. Its weights are read once if a tile covers
    # the entire model axis, and otherwise for every task.
    weights_read = all_weights if dim == tiles.inner else tasks * weight_tile
    kernel_a = tasks * (3 * row_tile + 4 * hidden_tile) + 5 * weights_read
    # B: hidden activations once for every part of the model axis, weights for every task, and one
    # tile of output rows per visit.
    output = 2 * visits_E.sum() * row_tile
    kernel_b = tasks * (3 * hidden_tile * parts + 3 * weight_tile) + output
    # C: rows for every task, hidden activations for every task and part, weight gradients once.
    kernel_c = tasks * (2 * row_tile + 3 * hidden_tile * parts) + 3 * all_weights
    return float(kernel_a + kernel_b + kernel_c)


def _format_row(chip: str, dim: int, report: Report) -> str:
    return (
        f"{chip:5} {dim:5} {report.tile_visits:7} {report.rows_wasted:12} "
        f"{report.issued_over_needed:14.3f} {report.bytes_moved / 1e9:9.1f} "
        f"{1e3 * report.matmul_seconds:7.1f}ms {1e3 * report.memory_seconds:7.1f}ms"
    )


def main(_: Sequence[str]) -> None:
    """Prints a line for each chip and model width."""
    print(
        f"{'chip':5} {'D':>5} {'visits':>7} {'rows wasted':>12} {'issued/needed':>14} "
        f"{'GB moved':>9} {'matmuls':>9} {'memory':>9}"
    )
    for chip in CHIPS.value:
        for dim in map(int, DIMS.value):
            widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
            rows = np.random.default_rng(0).multinomial(ROWS.value, np.full(8, 1 / 8)).tolist()
            print(_format_row(chip, dim, count_work(rows, widths, dim, chip)))


if __name__ == "__main__":
    app.run(main)
