"""Plans: what a step sends, counted from its HLO, and the row of a topology."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.config import device_mesh, options
from modse_jax.errors import UserError
from modse_jax.model import kernel_selection
from modse_jax.planning import hlo_collectives, planner
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config
from tests.helpers.meshes import MESHES, compiled, config_on
from tests.helpers.runs import command

HLO = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[32,8]) -> bf16[8,8] {
  %p = bf16[32,8]{1,0} parameter(0)
  %ar = bf16[32,8]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = bf16[8,8]{1,0} slice(%ar)
}

%piece.1 (p: f32[4]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%piece.2 (p: f32[4]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%inner_condition (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %other = s32[] constant(7)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner (t: (s32[])) -> (s32[]) {
  %k = f32[4] custom-call(%y), custom_call_target="kernel", metadata="{
}
"
  %x = f32[10]{0} all-reduce(%y), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%add
  %z = bf16[8,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}

%outer_condition (t: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}

%outer (t: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%inner_condition, body=%inner
  %f = f32[16] fusion(%q), kind=kCustom, calls=%piece.1
  %g = f32[16] fusion(%q), kind=kCustom, calls=%piece.2
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[8,6]{1,0} all-gather-done(%s)
  %rows = bf16[10,8]{1,0} fusion(%p), kind=kLoop, calls=%add
  %r = bf16[40,8]{1,0} ragged-all-to-all(%rows, %room, %i, %j), channel_id=1, replica_groups={{0,1,2,3}}
  %c = (f32[9], f32[9], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_pieces_and_groups_are_counted():
    found = [(c.kind, c.bytes, c.times, c.group) for c in hlo_collectives.collectives(HLO)]
    assert sorted(found) == sorted(
        [
            ("reduce-scatter", 2 * 32 * 8 * 3 / 4, 15, 4),
            ("all-gather", 64 * 3 / 4, 3, 4),
            ("all-reduce", 2 * 40 * 3 / 4, 15, 4),
            ("all-gather", 192 * 3 / 4, 1, 4),
            ("collective-permute", 36, 1, 2),
            ("ragged-all-to-all", 10 * 8 * 2 * 3 / 4, 1, 4),
        ]
    )  # ten rows of the sender; the receiver has room for forty
    assert (
        hlo_collectives.bytes_by_kind(hlo_collectives.collectives(HLO))["all-gather"]
        == 3 * 48 + 144
    )


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="whose end is data"):
        hlo_collectives.collectives(HLO.replace("s32[]{:T(128)} constant(5)", "s32[] parameter(1)"))
    with pytest.raises(ValueError, match="unknown way"):
        hlo_collectives.collectives(HLO.replace("{'a'}", "{'a':(1)2}"))


def test_a_compiled_program_sends_what_it_says():
    """Seven sums of a [16, 32] array over 8 devices, in a loop, and one gather of a column of it over 4."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def spread(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    @functools.partial(
        jax.jit, in_shardings=(spread(("a", "b")), spread("b")), out_shardings=(spread(), spread())
    )
    def f(x, y):
        def turn(carry, _):
            total = jax.lax.with_sharding_constraint(jnp.sum(jnp.sin(x * carry), axis=0), spread())
            return carry + jnp.sum(total), None

        return jax.lax.scan(turn, jnp.float32(1), None, length=7)[0], y

    text = f.lower(jnp.zeros((8, 16)), jnp.zeros((12, 32))).compile().as_text()
    sent = hlo_collectives.bytes_by_kind(hlo_collectives.collectives(text))
    assert sent["all-gather"] == 12 * 32 * 4 * 3 / 4
    assert sent["all-reduce"] in (
        7 * 2 * 4 * 7 / 8,
        7 * 2 * 16 * 4 * 7 / 8,
    )  # XLA may add up columns first


def test_the_output_embedding_is_sent_once_whatever_the_chunks():
    """Not in every turn of the loss's loop, and no device gathers all activations for the input embedding."""
    config = config_on(*MESHES["2 data x 4 expert"])
    found = hlo_collectives.collectives(compiled(config)[1].as_text())
    head = [c for c in found if re.search(r"\b300\b", c.shape)]
    assert head and all(c.times == 1 for c in head)
    assert sum(c.kind == "all-to-all" for c in found) == 2  # tokens looked up, and their gradient


def test_a_plan_of_cpu_devices(tmp_path):
    config = config_on(*MESHES["2 data x 4 expert"])
    row = planner.plan(config, "cpu:8")
    assert tuple(row) == planner.FIELDS
    assert (
        row["devices"] == 8
        and row["mesh"] == {"data": 2, "fsdp": 1, "expert": 4}
        and row["fits"] is True
    )
    assert row["flops_max_over_mean"] == 1
    assert row["optimizer_bytes_per_device"] > 1.9 * row["parameter_bytes_per_device"]
    assert (
        row["peak_bytes_per_device"]
        > row["parameter_bytes_per_device"] + row["activation_bytes_per_device"]
    )
    assert (
        set(row["collective_bytes_by_kind"]) <= set(hlo_collectives.KINDS)
        and row["collective_bytes_by_kind"]
    )
    assert row["roofline_step_seconds"] is None and row["compile_seconds"] > 0
    gpu = planner.plan(config, "gpu:h200x8")
    assert gpu["roofline_step_seconds"] > 0 and gpu["roofline_bound_by"] in (
        "products",
        "collectives",
        "memory",
    )
    text = planner.table([row, {**gpu, "fits": False}])
    assert "data=2 fsdp=1 expert=4" in text and "gpu:h200x8: most of it is" in text
    planner.write_json([row, gpu], str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps([row, gpu]))


def test_advice_names_what_is_largest():
    sizes = {"parameter_bytes_per_device": 3, "optimizer_bytes_per_device": 6}
    assert "mesh.fsdp" in planner.advice({**sizes, "peak_bytes_per_device": 12})
    assert "gradient_accumulation" in planner.advice({**sizes, "peak_bytes_per_device": 40})
    assert "mesh.fsdp" in planner.advice({**sizes, "peak_bytes_per_device": None})


def test_bad_plans_end_in_one_line():
    _, err, code = command("train.py", "--config=configs/tiny.py", "--plan=v5e:4by4")
    assert code == 2 and err.startswith(
        "error: --plan='v5e:4by4' is not a topology; known: v4:2x2x1"
    ), err
    with pytest.raises(UserError, match="--plan_json=/nowhere/plan.json cannot be written"):
        planner.check(["cpu:2"], "/nowhere/plan.json")
    with pytest.raises(UserError, match="does not divide over mesh.data=3"):
        planner.plan(config_on((-1, 1, 1)), "cpu:3")
    with pytest.raises(
        UserError, match="moe.backend=pallas_gpu needs one of h100, h200, this is cpu"
    ):
        planner.plan(config_on(backend="pallas_gpu"), "cpu:1")


def test_what_multiplies_is_known_before_anything_is_compiled(monkeypatch):
    """Rows past a kernel's list of tasks, type and widths that it does not take: what would do, in one line."""

    def kernels(chip, width=128, **moe):
        monkeypatch.setattr(sharding, "chip_name", lambda _: chip)
        config = tiny_config(
            model=dict(dim=128, num_heads=2),
            training=dict(batch_size=moe.pop("batch", 8)),
            moe=dict(width=width, widths=(), pairs=False, **moe),
            mesh=options.MeshConfig(1, 1, 1),
        )
        return kernel_selection.select_kernels(
            config, device_mesh.build_mesh(config, jax.devices()[:1]), fused=False
        )

    assert kernels("v5e", backend="auto") == ("pallas_tpu", "blocks", "")
    backend, _, why = kernels("v5e", backend="auto", batch=2**20)
    assert backend == "blocked" and "67108864 rows over widths" in why
    with pytest.raises(
        UserError, match="lower training.batch_size, or use a backend without a list: blocked, ref"
    ):
        kernels("v5e", backend="pallas_tpu", batch=2**20)
    with pytest.raises(
        UserError, match=r"widths \[96\] do not divide by 128; backends that take any: blocked"
    ):
        kernels("v5e", backend="pallas_tpu", width=96)
    with pytest.raises(
        UserError, match="not float32; set model.dtype=bfloat16, or use a backend that takes any"
    ):
        kernels("h100", backend="pallas_gpu")
    assert kernels("cpu", backend="auto") == ("blocked", "blocks", "")
