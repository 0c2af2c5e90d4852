"""Kernels and a training step, compiled for TPUs that are not attached.

The compiler refuses kernels with wrong block shapes, or that need too much memory.
"""

import dataclasses
import importlib.util
import os
import platform
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks import tpu_report
from configs import modse_300m_x8
from modse_jax.config import loading, options
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import pallas_tpu, select
from modse_jax.planning import planner
from modse_jax.runtime import sharding
from modse_jax.study import arms
from tests.helpers.configs import tiny_config

# libtpu reads these when a device is first used.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}

ROWS = 131_072  # routed tokens

pytestmark = [
    pytest.mark.usefixtures("compiled_with_care"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="libtpu exists for Linux on x86-64 alone",
    ),
]


def first_device(chip: str) -> jax.Device:
    installed = importlib.util.find_spec("libtpu")
    assert installed, "libtpu is missing: pip install -r requirements-dev.txt"
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


# The widths of 300Mx8 and 700Mx8, and the cases with the least memory: v4, and float32 on v6e.
KERNEL_CASES = [
    *((chip, dim, "bfloat16", ROWS) for chip in ("v5e", "v5p", "v6e") for dim in (1536, 2048)),
    ("v4", 2048, "bfloat16", ROWS),
    ("v6e", 2048, "float32", 32_768),
]


# v5p has two cores, which the others do not have, and compiles in the shortest time.
@pytest.mark.parametrize(
    "chip, dim, dtype, rows",
    [
        case if case[:2] == ("v5p", 1536) else pytest.param(*case, marks=pytest.mark.slow)
        for case in KERNEL_CASES
    ],
)
def test_kernels_compile_forward_and_backward(chip, dim, dtype, rows):
    device = first_device(chip)
    on_device = jax.sharding.SingleDeviceSharding(device)
    assert sharding.chip_name(jax.sharding.Mesh([device], "x")) == chip
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    placement = expert_placement.place_experts(widths, 1, "whole")
    hidden = sum(widths)
    tiles = pallas_tpu.tiles_for(widths, dim, chip, dtype)

    def describe(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_device)

    def run(x_ND, rows_E, w_gate, w_up, w_down, dy_ND):
        def forward(x_ND, *weights):
            return pallas_tpu.pallas_tpu(x_ND, rows_E, *weights, 0, placement, tiles)

        y_ND, pull = jax.vjp(forward, x_ND, w_gate, w_up, w_down)
        return y_ND, pull(dy_ND)

    x_ND = describe(rows, dim)
    rows_E = describe(8, dtype="int32")
    weights = describe(dim, hidden), describe(dim, hidden), describe(hidden, dim)
    compiled = jax.jit(run).lower(x_ND, rows_E, *weights, x_ND).compile()
    # hidden, dgate and dup of every token, and one copy of the tokens
    elements_per_row = 3 * max(widths) + dim
    limit = 1.05 * jnp.dtype(dtype).itemsize * rows * elements_per_row
    assert compiled.memory_analysis().temp_size_in_bytes < limit


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_kernels_of_narrow_experts_compile_forward_and_backward(chip):
    """An arm of Slicing and Dicing: widths and the model width are padded to full tiles."""
    config = arms.build_mixture("80M", 256, Fraction(1, 32))
    dim, widths = config.model.dim, config.widths
    assert (dim, set(widths), config.moe.top_k) == (336, {42}, 32)
    on_device = jax.sharding.SingleDeviceSharding(first_device(chip))
    placement = expert_placement.place_experts(widths, 1, "whole")
    job = select.checked_tiles("pallas_tpu", placement, (ROWS, dim), chip, "bfloat16")

    def describe(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_device)

    def run(x_ND, rows_E, weights, dy_ND):
        def forward(x_ND, weights):
            return select.run_kernels(
                "pallas_tpu", x_ND, rows_E, weights, jnp.int32(0), placement, job
            )

        y_ND, pull = jax.vjp(forward, x_ND, weights)
        return y_ND, pull(dy_ND)

    x_ND, rows_E = describe(ROWS, dim), describe(256, dtype="int32")
    hidden = sum(widths)
    weights = describe(dim, hidden), describe(dim, hidden), describe(hidden, dim)
    compiled = jax.jit(run).lower(x_ND, rows_E, weights, x_ND).compile()
    # In bfloat16, per row: hidden, dgate and dup in padded widths, and padded x, dx, y and dy.
    elements_per_row = 3 * job.hidden_unit + 4 * job.pad_dim(dim)
    weights_copies = 2 * 3 * 256 * job.hidden_unit * job.pad_dim(dim)
    limit = 1.2 * 2 * (ROWS * elements_per_row + weights_copies)
    assert compiled.memory_analysis().temp_size_in_bytes < limit


def test_a_small_training_step_compiles():
    config = tiny_config(
        model=dict(dim=256, num_heads=2, dtype="bfloat16"),
        moe=dict(
            num_experts=4,
            width=192,
            widths=(256, 128, 256, 128),
            pairs=False,
            backend="pallas_tpu",
            exchange="all_to_all",
        ),
        training=dict(batch_size=16),
        mesh=options.MeshConfig(4, 1, 2),
    )
    plan = planner.plan_step(config, "v5e:2x4")
    assert plan.fits
    assert plan.moe_backend == "pallas_tpu"
    assert plan.collective_bytes_by_kind["ragged-all-to-all"] > 0


@pytest.mark.slow
def test_a_training_step_compiles():
    """Compiles configs/modse_300m_x8.py with two blocks, which take as long as its eight."""
    values = modse_300m_x8.get_config()
    values.mesh.expert = 4
    config = loading.from_dict(values.to_dict())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    plan = planner.plan_step(config, "v5e:4x4")
    assert plan.fits
    assert plan.collective_bytes_by_kind["ragged-all-to-all"] > 0


@pytest.mark.parametrize("dim", [1536, 2048])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_tiles_compute_little_more_than_needed_with_uneven_routing(chip, dim):
    """Tiles that experts share, and rows that fill no tile, cost at most 5% of the FLOPs."""
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    rows = [20_001, 13_007, 9_999, 25_003, 17_777, 11_111, 19_001]
    rows.append(ROWS - sum(rows))
    report = tpu_report.count_work(rows, widths, dim, chip)
    assert 1 <= report.issued_over_needed <= 1.05
    assert report.flops_needed == 22 * dim * float(np.dot(rows, widths))
    assert report.tile_visits == report.rows_wasted // 512 + ROWS // 512
