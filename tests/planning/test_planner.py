"""Plans of a training step: topologies, rows, the table, and errors before anything is compiled."""

import dataclasses
import json
import re

import jax
import pytest

from modse_jax.config import device_mesh, options
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection
from modse_jax.planning import (
    gpu_compiler,
    hlo_collectives,
    plan_table,
    planner,
    roofline,
    step_compilation,
    step_plan,
)
from modse_jax.planning.topologies import Topology, parse_topology
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config
from tests.helpers.meshes import MESHES, config_on
from tests.helpers.runs import command


@pytest.mark.parametrize(
    "topology",
    [
        Topology("gpu:h100", "gpu", "h100", 1, 1),
        Topology("gpu:a100x8", "gpu", "a100", 1, 8),
        Topology("gpu:b200:2x8", "gpu", "b200", 2, 8),
        Topology("cpu:8", "cpu", "cpu", 1, 8),
        Topology("v5e:4x4", "tpu", "v5e", 1, 0),
    ],
    ids=lambda topology: topology.name,
)
def test_topologies_are_parsed(topology):
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    "name",
    ["gpu:l40sx8", "gpu:h100x0", "gpu:h100:8", "gpu:", "gpu:h100x8:2x8", "cpu:0", "h100"],
)
def test_unknown_topologies_are_refused_with_a_list_of_known_ones(name):
    known = "known: .*gpu:a100, gpu:b200, gpu:h100, gpu:h200, .*HOSTSxN"
    with pytest.raises(UserError, match=known):
        parse_topology(name)


def test_too_many_gpus_on_a_host_are_refused():
    message = "16 GPUs on a host, which can have at most 8; write gpu:h100:HOSTSxN"
    with pytest.raises(UserError, match=message):
        parse_topology("gpu:h100x16")


@pytest.fixture(scope="module")
def cpu_plan() -> step_plan.StepPlan:
    return planner.plan_step(config_on(*MESHES["2 data x 4 expert"]), "cpu:8")


def test_a_plan_describes_the_mesh_and_the_kernels(cpu_plan):
    assert cpu_plan.devices == 8
    assert cpu_plan.mesh == {"data": 2, "fsdp": 1, "expert": 4}
    assert cpu_plan.moe_backend == "blocked"
    assert cpu_plan.attention == "blocks"
    assert cpu_plan.flops_max_over_mean == 1
    assert cpu_plan.compile_seconds > 0


def test_a_plan_counts_memory(cpu_plan):
    parameter_bytes = cpu_plan.parameter_bytes_per_device
    assert cpu_plan.fits is True
    assert cpu_plan.optimizer_bytes_per_device > 1.9 * parameter_bytes
    assert cpu_plan.peak_bytes_per_device > parameter_bytes + cpu_plan.activation_bytes_per_device


def test_a_plan_counts_collectives(cpu_plan):
    sent = cpu_plan.collective_bytes_by_kind
    assert sent and set(sent) <= set(hlo_collectives.KINDS)


def test_a_plan_of_cpus_knows_no_rates_and_no_launches(cpu_plan):
    assert cpu_plan.roofline_step_seconds is None
    assert cpu_plan.kernels is None


def test_the_table_has_a_column_for_each_plan_and_advice_for_those_that_do_not_fit(cpu_plan):
    other = dataclasses.replace(cpu_plan, topology="cpu:9", fits=False)
    text = plan_table.format_table([cpu_plan, other])
    assert "data=2 fsdp=1 expert=4" in text
    assert "cpu:9: most of the memory holds" in text
    assert "kernels" not in text


def test_plans_are_written_as_json_in_the_order_of_their_fields(cpu_plan, tmp_path):
    planner.write_json([cpu_plan], str(tmp_path / "plan.json"))
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    assert row == json.loads(json.dumps(step_plan.to_dict(cpu_plan)))
    assert list(row) == [field.name for field in dataclasses.fields(step_plan.StepPlan)]


def test_json_has_the_fields_that_recorded_plans_have(cpu_plan):
    """Files of earlier plans stay comparable."""
    assert list(step_plan.to_dict(cpu_plan)) == [
        "topology",
        "devices",
        "hosts",
        "mesh",
        "moe_backend",
        "attention",
        "parameter_bytes_per_device",
        "optimizer_bytes_per_device",
        "activation_bytes_per_device",
        "peak_bytes_per_device",
        "capacity_bytes_per_device",
        "fits",
        "flops_per_device",
        "flops_max_over_mean",
        "collective_bytes_by_kind",
        "collective_bytes_between_hosts",
        "unknown_collectives",
        "kernels",
        "graph_launches",
        "host_waits",
        "open_loops",
        "roofline_step_seconds",
        "roofline_bound_by",
        "compile_seconds",
        "notes",
    ]


def test_unknown_collectives_are_in_the_plan_and_below_the_table(monkeypatch):
    hlo = """ENTRY %main (p: f32[4]) -> f32[4] {
  %r = f32[8]{0} all-reduce(%p), replica_groups={}
  %q = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}
}
"""
    step = step_compilation.CompiledStep(peak_bytes=2**21, temporary_bytes=2**20, hlo=hlo)
    monkeypatch.setattr(step_compilation, "compile_step", lambda *_: step)
    plan = planner.plan_step(config_on(*MESHES["2 data x 4 expert"]), "cpu:8")
    assert len(plan.unknown_collectives) == 1
    assert plan.collective_bytes_by_kind == {"all-reduce": 32}
    text = plan_table.format_table([plan])
    assert "one could not be counted: the replica groups of a collective" in text
    assert re.search(r"collectives not counted +1\n", text)


def test_launches_are_in_the_plan_and_the_table(cpu_plan):
    plan = dataclasses.replace(cpu_plan, topology="gpu:h100:2x4", hosts=2, notes=[])
    launches = gpu_compiler.Launches(
        kernels=700, collectives=20, graphs=30, host_waits=45, open_loops=3, iterations=1.0
    )
    planner.add_launches(plan, launches)
    assert (plan.kernels, plan.graph_launches) == (700, 30)
    assert (plan.host_waits, plan.open_loops) == (45, 3)
    text = plan_table.format_table([plan])
    assert re.search(r"host waits +45\n", text)
    assert "3 loops outside CUDA graphs have data-dependent trip counts" in text
    assert "for 1 iteration(s) of each" in text


def test_a_missing_list_of_launches_is_a_note(cpu_plan):
    plan = dataclasses.replace(cpu_plan, notes=[])
    planner.add_launches(plan, None)
    assert plan.kernels is None
    assert "kernels are not counted" in plan.notes[0]


@pytest.mark.parametrize(
    "gigabytes_sent, between_hosts, bound_by",
    [(0, 0, "memory"), (9000, 0, "collectives"), (9000, 9000, "network")],
)
def test_the_roofline_is_the_slowest_resource(cpu_plan, gigabytes_sent, between_hosts, bound_by):
    plan = dataclasses.replace(
        cpu_plan,
        collective_bytes_by_kind={"all-gather": gigabytes_sent * 1e9},
        collective_bytes_between_hosts=between_hosts * 1e9,
    )
    config = config_on(*MESHES["2 data x 4 expert"])
    bound = roofline.estimate_roofline(config, "h100", plan)
    assert bound.bound_by == bound_by
    if bound_by == "network":
        assert bound.seconds == pytest.approx(9000e9 / 0.05e12)
    if bound_by == "collectives":
        assert bound.seconds == pytest.approx(9000e9 / 0.45e12)


@pytest.mark.parametrize(
    "peak_bytes, advice", [(12, "mesh.fsdp"), (40, "gradient_accumulation"), (None, "mesh.fsdp")]
)
def test_advice_names_an_option_for_what_needs_the_most_memory(cpu_plan, peak_bytes, advice):
    plan = dataclasses.replace(
        cpu_plan,
        parameter_bytes_per_device=3,
        optimizer_bytes_per_device=6,
        peak_bytes_per_device=peak_bytes,
    )
    assert advice in plan_table.advise(plan)


def test_a_bad_topology_ends_the_command_with_one_line():
    _, err, code = command("train.py", "--config=configs/tiny.py", "--plan=v5e:4by4")
    message = "error: --plan='v5e:4by4' is not a topology; known: v4:2x2x1"
    assert code == 2 and err.startswith(message), err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled():
    with pytest.raises(UserError, match="--plan_json=/nowhere/plan.json cannot be written"):
        planner.check_arguments(["cpu:2"], "/nowhere/plan.json")


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="mesh.data=3"):
        planner.plan_step(config_on((-1, 1, 1)), "cpu:3")


def test_a_backend_of_another_chip_is_refused():
    message = "moe.backend=pallas_gpu needs one of h100, h200, this is cpu"
    with pytest.raises(UserError, match=message):
        planner.plan_step(config_on(backend="pallas_gpu"), "cpu:1")


@pytest.fixture
def select_on(monkeypatch):
    """A function that selects kernels on a chip that is not attached."""

    def select(chip: str, width: int = 128, batch: int = 8, **moe):
        monkeypatch.setattr(sharding, "chip_name", lambda _: chip)
        config = tiny_config(
            model=dict(dim=128, num_heads=2),
            training=dict(batch_size=batch),
            moe=dict(width=width, widths=(), pairs=False, **moe),
            mesh=options.MeshConfig(1, 1, 1),
        )
        mesh = device_mesh.build_mesh(config, jax.devices()[:1])
        return kernel_selection.select_kernels(config, mesh)

    return select


def test_auto_selects_the_kernels_of_the_chip(select_on):
    assert select_on("v5e", backend="auto") == ("pallas_tpu", "blocks", "")
    assert select_on("cpu", backend="auto") == ("blocked", "blocks", "")


def test_auto_explains_why_it_does_not_select_the_kernels_of_the_chip(select_on):
    backend, _, note = select_on("v5e", backend="auto", batch=2**20)
    assert backend == "blocked"
    assert "67108864 rows over widths" in note


def test_padding_of_hidden_units_is_reported(select_on):
    padded = select_on("v5e", backend="pallas_tpu", width=96)
    assert padded.line() == (
        "experts: pallas_tpu (hidden units padded to multiples of 128: 33.3% more FLOPs); "
        "attention: blocks"
    )


def test_errors_of_kernels_name_what_would_work(select_on):
    rows = "lower training.batch_size, or use a backend without a list: blocked, ref"
    with pytest.raises(UserError, match=rows):
        select_on("v5e", backend="pallas_tpu", batch=2**20)
    dtype = "not float32; set model.dtype=bfloat16, or use a backend that takes any"
    with pytest.raises(UserError, match=dtype):
        select_on("h100", backend="pallas_gpu")
