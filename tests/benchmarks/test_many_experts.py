"""The benchmark of many experts runs on tiny shapes. Nothing here tests speed."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import many_experts, timing
from benchmarks.many_experts import Shape, Workload
from modse_jax.errors import UserError

TINY = Workload(dim=24, sequences=2, length=16)
SHAPE = Shape(experts=16, top_k=4, width=8)


def test_the_shapes_are_those_of_the_study():
    """The dense width at model width 240 is 960, and k g = 1."""
    shapes = (*many_experts.EXPERT_LADDER, *many_experts.GRANULARITY_LADDER)
    shapes += many_experts.POOL_SHAPES
    assert {shape.top_k * shape.width for shape in shapes} == {960}
    for ladder in (many_experts.EXPERT_LADDER, many_experts.GRANULARITY_LADDER):
        assert (ladder[0].experts, ladder[-1].experts) == (8, 1024)
    assert len({(shape.top_k, shape.width) for shape in many_experts.EXPERT_LADDER}) == 1
    assert many_experts.WORKLOAD.tokens == 4096


def test_two_pools_have_the_experts_and_choices_of_one():
    one, two = (SHAPE._replace(pools=pools).router_options.pools for pools in (1, 2))
    assert one == ((16, 4),)
    assert two == ((8, 2), (8, 2))


def test_routing_only_is_the_layer_with_experts_that_return_their_input():
    run, arguments = many_experts.layer_case(SHAPE, TINY)
    (_, statistics), _ = jax.jit(run)(*arguments)
    run_routing, routing_arguments = many_experts.layer_case(SHAPE, TINY, many_experts.RoutingOnly)
    (_, routing_statistics), (router_gradient, dx_BLD) = jax.jit(run_routing)(*routing_arguments)
    jax.tree.map(np.testing.assert_array_equal, routing_statistics, statistics)
    # The output is the input times the sum of the gates, which the router's losses are added to.
    layer = many_experts.build_layer(SHAPE, TINY.dim, many_experts.RoutingOnly)
    x_BLD = routing_arguments[1]
    gates_BLK, _ = layer.choose_experts(x_BLD)
    expected = x_BLD * jnp.sum(gates_BLK, axis=-1, keepdims=True)
    np.testing.assert_allclose(layer(x_BLD).y_BLD, expected, rtol=1e-5, atol=1e-6)
    assert dx_BLD.shape == x_BLD.shape
    (gradient,) = jax.tree.leaves(router_gradient)
    assert gradient.shape == (TINY.dim, SHAPE.experts) and np.abs(gradient).max() > 0


def test_shares_are_relative_to_the_layer(monkeypatch):
    fixed = {"layer": [2.0, 4.0], "routing": [0.5, 1.0], "experts": [1.5, 3.0]}
    time_interleaved = timing.time_interleaved

    def time_with_fixed_results(cases, *arguments, **options):
        assert set(time_interleaved(cases, *arguments, **options)) == set(fixed)
        return fixed

    monkeypatch.setattr(timing, "time_interleaved", time_with_fixed_results)
    row = many_experts.measure_share(SHAPE, TINY, repeats=1)
    assert row == {
        "shape": "16 of 8, top-4",
        "tokens": 32,
        "routing": 0.25,
        "experts": 0.75,
        "seconds": 3.0,
    }


def test_ladders_are_relative_to_their_first_layer():
    first, second = many_experts.measure_ladder((Shape(2, 1, 8), SHAPE), TINY, repeats=2)
    assert first["over_first"] == 1
    assert first["routing_over_first"] > 0
    assert second["shape"] == "16 of 8, top-4"
    assert second["over_first"] > 0 and second["compile_seconds"] > 0


def test_pools_are_compared_with_one_pool():
    (row,) = many_experts.measure_pools((SHAPE,), TINY, repeats=2)
    assert row["two_over_one"] > 0 and row["two_over_one"] != 1
    assert row["repeats"] == 2


@pytest.mark.slow
def test_memory_of_a_step_covers_its_state():
    row = many_experts.measure_memory(SHAPE, TINY, steps=1)
    weights = TINY.dim * (3 * 16 * 8 + 16 + 2 * 512)
    assert row["state_bytes"] > 3 * 4 * weights  # with both moments
    assert row["planned_bytes"] > row["argument_bytes"] >= row["state_bytes"]
    assert row["temporary_bytes"] > 0
    if sys.platform == "linux":
        assert row["growth_at_start_bytes"] > 0


def test_accounting_covers_every_arm():
    row = many_experts.measure_accounting()
    assert row["arms"] == 343 + 7
    assert row["cpu_seconds"] > 0


def test_parts_are_added_to_a_file_of_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {}, "parts": {"pools": [1], "accounting": {}}}))
    monkeypatch.setattr(timing, "JSON", types.SimpleNamespace(value=str(path)))
    monkeypatch.setattr(timing, "REPEATS", types.SimpleNamespace(value=2))
    monkeypatch.setattr(many_experts, "PARTS", types.SimpleNamespace(value=["accounting"]))
    monkeypatch.setattr(many_experts, "measure_accounting", lambda: {"arms": 1})
    many_experts.main([])
    assert json.loads(capsys.readouterr().out) == {"accounting": {"arms": 1}}
    parts = json.loads(path.read_text())["parts"]
    assert parts == {"pools": [1], "accounting": {"arms": 1}}


def test_unknown_parts_are_refused(monkeypatch, capsys):
    known = list(many_experts.list_parts(TINY, 1))
    assert many_experts.choose_parts(None, known) == known
    assert many_experts.choose_parts(["pools", "memory"], known) == ["memory", "pools"]
    with pytest.raises(
        UserError, match="--parts has 'speed', which is unknown; choose from memory"
    ):
        many_experts.choose_parts(["speed"], known)
    monkeypatch.setattr(many_experts, "PARTS", types.SimpleNamespace(value=["speed"]))
    monkeypatch.setattr(timing, "REPEATS", types.SimpleNamespace(value=2))
    with pytest.raises(SystemExit, match="2"):
        many_experts.main([])
    assert capsys.readouterr().err.count("\n") == 1
