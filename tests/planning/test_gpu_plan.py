"""A sharded training step, compiled for eight H100s that are not attached."""

import dataclasses
import platform
from typing import NamedTuple

import pytest

from benchmarks import gpu_report
from modse_jax.config import options
from modse_jax.errors import UserError
from modse_jax.planning import gpu_compiler, plan_table, planner, step_compilation
from tests.helpers.configs import tiny_config

pytestmark = [
    pytest.mark.usefixtures("compiled_with_care"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="the CUDA compiler is tested on Linux on x86-64, where its packages are installed",
    ),
]


LAYERS = 2
DIM = 128
VOCABULARY = 256
LENGTH = 128
BATCH = 32
TOP_K = 2
WIDTHS = (256, 128, 256, 128)
DATA = 4  # sizes of the axes of the mesh
EXPERT = 2


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        gpu_compiler.find_compiler()
    except UserError as error:
        pytest.fail(f"{error} (make test does)")


@pytest.fixture(scope="module")
def config():
    base = tiny_config(
        model=dict(
            dim=DIM,
            num_layers=LAYERS,
            num_heads=2,
            vocab_size=VOCABULARY,
            context_length=LENGTH,
            dtype="bfloat16",
            attention="cudnn",
            remat="full",
        ),
        moe=dict(
            width=192,
            widths=WIDTHS,
            pairs=False,
            top_k=TOP_K,
            backend="auto",
            exchange="all_to_all",
        ),
        data=dict(sequence_length=LENGTH),
        training=dict(batch_size=BATCH),
        advanced=dict(loss_chunk=512),
    )
    return dataclasses.replace(base, mesh=options.MeshConfig(DATA, 1, EXPERT))


def expected_bytes() -> dict[str, float]:
    """Returns what a device sends in a step in a ring, without small arrays (router, norms, ...).

    A layer runs forward, forward again for rematerialization (remat=full), and backward. Its
    attention weights are sharded over `expert` along the model width, so they are all-gathered in
    bfloat16 twice, and their gradients reduce-scattered. So is the output embedding, once, in
    float32. The input embedding looks up its slice of the model width for all tokens, and an
    all-to-all exchanges slices of activations and of gradients. Routed tokens go to their experts
    and back.
    """
    tokens = BATCH * LENGTH // (DATA * EXPERT)
    others = (EXPERT - 1) / EXPERT
    attention = LAYERS * 4 * DIM * DIM
    experts = LAYERS * 3 * DIM * sum(WIDTHS)
    embedding = VOCABULARY * DIM
    gradients_per_device = (4 * experts + 2 * attention + 4 * 2 * embedding) / EXPERT
    return {
        "ragged-all-to-all": 2 * 3 * LAYERS * tokens * TOP_K * DIM * 2 * others,
        "all-to-all": 2 * tokens * DIM * 2 * others,
        "all-gather": (2 * 2 * attention + 4 * embedding) * others,
        "reduce-scatter": (2 * attention + 4 * embedding) * others,
        "all-reduce": 2 * gradients_per_device * (DATA - 1) / DATA,
    }


class PlannedStep(NamedTuple):
    plan: planner.StepPlan
    compiled: step_compilation.CompiledStep


@pytest.fixture(scope="module")
def planned(config):
    compiled = []
    compile_step = step_compilation.compile_step

    def record(*arguments):
        compiled.append(compile_step(*arguments))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_compilation, "compile_step", record)
        return PlannedStep(planner.plan_step(config, "gpu:h100x8"), *compiled)


@pytest.fixture(scope="module")
def plan(planned):
    return planned.plan


def test_a_compiled_step_sends_the_expected_bytes(plan):
    assert plan.mesh == {"data": 4, "fsdp": 1, "expert": 2}
    assert plan.moe_backend == "pallas_triton" and plan.attention == "cudnn"
    assert plan.unknown_collectives == []
    assert plan.collective_bytes_between_hosts == 0
    assert plan.collective_bytes_by_kind == pytest.approx(expected_bytes(), rel=0.02)


def test_a_compiled_step_fits(plan):
    assert plan.fits
    assert plan.capacity_bytes_per_device == 79 * 2**30
    assert plan.parameter_bytes_per_device < plan.peak_bytes_per_device < 2**28
    assert plan.roofline_step_seconds > 0
    assert plan.roofline_bound_by != "network"
    assert "workspace of cuDNN's attention" in plan_table.format_table([plan])


def test_a_compiled_step_never_waits_for_the_device_and_mostly_launches_graphs(plan):
    assert plan.host_waits == 0
    assert plan.open_loops == 0
    assert 0 < plan.graph_launches < plan.kernels < 2000


def test_temporary_memory_and_sorts_of_a_compiled_step_are_bounded(planned):
    """The routed tokens of a device are sorted at once, and nothing that is longer."""
    routed_tokens = BATCH * LENGTH // (DATA * EXPERT) * TOP_K
    assert 0 < gpu_report.largest_sort(planned.compiled.hlo) <= EXPERT * routed_tokens
    assert planned.compiled.temporary_bytes <= 12 * 2**20


def test_hosts_and_gpus_are_described():
    devices = gpu_compiler.describe_topology("a100", hosts=2, devices_per_host=4)
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    assert [device.id for device in devices] == list(range(8))
    assert {device.device_kind for device in devices} == {"NVIDIA A100-SXM4-80GB"}
