"""A sharded training step, really compiled for eight H100s that are not there (modse_jax.gpu_compiler)."""

import dataclasses
import platform

import pytest

from modse_jax.config import options
from modse_jax.errors import UserError
from modse_jax.planning import gpu_compiler, planner
from tests.helpers.configs import tiny_config

pytestmark = [
    pytest.mark.usefixtures("compiled_with_care"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="the CUDA compiler is tested on Linux on x86-64, where its packages are installed",
    ),
]


LAYERS, DIM, VOCABULARY, LENGTH, BATCH, TOP_K = 2, 128, 256, 128, 32, 2


WIDTHS = (256, 128, 192, 192)


DATA, EXPERT = 4, 2


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
            backend="pallas_gpu",
            exchange="all_to_all",
        ),
        data=dict(sequence_length=LENGTH),
        training=dict(batch_size=BATCH, loss_chunk=512),
    )
    return dataclasses.replace(base, mesh=options.MeshConfig(DATA, 1, EXPERT))


def expected_bytes() -> dict[str, float]:
    """What a device sends in a step in a ring, small arrays (router, norms, statistics) left out.

    A layer runs forward, forward again to recompute (remat=full), and backward. Its attention
    weights are sharded over `expert` along the model width, so they are all-gathered in bfloat16
    twice, and their gradients reduce-scattered. So is the output embedding, once, in float32.
    The input embedding looks up its part of the model width for all tokens, and an all-to-all
    makes tokens of parts, and parts of gradients. Routed tokens go to their experts and back.
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


def test_a_compiled_step_sends_what_a_formula_says(config):
    row = planner.plan(config, "gpu:h100x8")
    assert tuple(row) == planner.FIELDS and row["mesh"] == {"data": 4, "fsdp": 1, "expert": 2}
    assert row["moe_backend"] == "pallas_gpu" and row["attention"] == "cudnn"
    assert row["unknown_collectives"] == [] and row["collective_bytes_between_hosts"] == 0
    assert row["collective_bytes_by_kind"] == pytest.approx(expected_bytes(), rel=0.02)
    assert row["fits"] and row["capacity_bytes_per_device"] == 79 * 2**30
    assert row["parameter_bytes_per_device"] < row["peak_bytes_per_device"] < 2**28
    # Nothing in this step waits for the device, and most of it is in CUDA graphs.
    assert row["host_waits"] == 0 and row["open_loops"] == 0
    assert 0 < row["graph_launches"] < row["kernels"] < 2000
    assert row["roofline_step_seconds"] > 0 and row["roofline_bound_by"] != "network"
    assert "workspace of cuDNN's attention" in planner.table([row])


def test_hosts_and_gpus_are_described():
    devices = gpu_compiler.describe_topology("a100", hosts=2, devices_per_host=4)
    assert [d.process_index for d in devices] == [0] * 4 + [1] * 4
    assert [d.id for d in devices] == list(range(8))
    assert {d.device_kind for d in devices} == {"NVIDIA A100-SXM4-80GB"}
