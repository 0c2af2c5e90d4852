"""Compiled ahead of time for TPUs that are not there: what the compiler refuses (memory, shapes) fails here."""

import dataclasses
import importlib.util
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks import tpu_report
from configs import modse_300m_x8
from modse_jax.config import loading
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import pallas_tpu
from modse_jax.planning import planner
from modse_jax.runtime import sharding

os.environ.update(
    TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true"
)  # read when a device is asked for


TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}


ROWS = 131_072


pytestmark = [
    pytest.mark.usefixtures("compiled_with_care"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="libtpu exists for Linux on x86-64 alone",
    ),
]


def device(chip):
    assert importlib.util.find_spec("libtpu"), (
        "libtpu is missing: pip install -r requirements-dev.txt"
    )
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


# 300Mx8 and 700Mx8; and where there is least room: v4, and float32 on v6e.
@pytest.mark.parametrize(
    "chip, dim, dtype, rows",
    [
        *((chip, dim, "bfloat16", ROWS) for chip in ("v5e", "v5p", "v6e") for dim in (1536, 2048)),
        ("v4", 2048, "bfloat16", ROWS),
        ("v6e", 2048, "float32", 32_768),
    ],
)
def test_kernels_compile_forward_and_backward(chip, dim, dtype, rows):
    where = jax.sharding.SingleDeviceSharding(device(chip))
    assert sharding.chip_name(jax.sharding.Mesh([device(chip)], "x")) == chip
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    placement = expert_placement.place_experts(widths, 1, "pairs")
    H, tiles = sum(widths), pallas_tpu.tiles_for(widths, dim, chip, dtype)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def both(x, rows, w_gate, w_up, w_down, dy):
        y, pull = jax.vjp(
            lambda x, *w: pallas_tpu.pallas_tpu(x, rows, *w, 0, placement, tiles),
            x,
            w_gate,
            w_up,
            w_down,
        )
        return y, pull(dy)

    compiled = (
        jax.jit(both)
        .lower(
            array(rows, dim),
            array(8, dtype="int32"),
            array(dim, H),
            array(dim, H),
            array(H, dim),
            array(rows, dim),
        )
        .compile()
    )
    kept = 3 * max(widths) + dim  # hidden, dgate and dup of every row, and one copy of the rows
    assert (
        compiled.memory_analysis().temp_size_in_bytes
        < 1.05 * jnp.dtype(dtype).itemsize * rows * kept
    )


def test_a_training_step_compiles():
    """configs/modse_300m_x8.py with two blocks, which take as long to compile as its eight."""
    config = modse_300m_x8.get_config()
    config.mesh.expert = 4
    config = loading.from_dict(config.to_dict())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    row = planner.plan(config, "v5e:4x4")
    assert row["fits"] and row["collective_bytes_by_kind"]["ragged-all-to-all"] > 0


@pytest.mark.parametrize("dim", [1536, 2048])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_tiles_issue_little_more_than_is_needed(chip, dim):
    """Uneven routing: tiles that experts share, and rows that fill no tile, cost at most 5% of the FLOPs."""
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    rows = [20_001, 13_007, 9_999, 25_003, 17_777, 11_111, 19_001]
    report = tpu_report.report([*rows, ROWS - sum(rows)], widths, dim, chip)
    assert 1 <= report.issued_over_needed <= 1.05
    assert report.flops_needed == 22 * dim * float(np.dot([*rows, ROWS - sum(rows)], widths))
    assert report.tile_visits == report.rows_wasted // 512 + ROWS // 512
