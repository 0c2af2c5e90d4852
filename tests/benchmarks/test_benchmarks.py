"""The benchmarks run, and their results have the promised fields. Nothing here tests speed."""

import dataclasses
import json
import types

import numpy as np
import pytest

from benchmarks import evaluate, expert_ffn, scaling, timing, train_step
from modse_jax.config.options import MeshConfig
from modse_jax.moe.experts.block_sizes import Blocks
from tests.helpers.configs import tiny_config


def test_expert_ffn_measures_every_case_and_backend():
    rows = expert_ffn.measure(["modse", "equal"], ["reference"], 8, 16, "float32", 2, Blocks(8, 4))
    assert [(row["case"], row["backend"]) for row in rows] == [
        ("modse", "dense"),
        ("modse", "reference"),
        ("equal", "dense"),
        ("equal", "reference"),
    ]
    assert set(rows[0]) == {
        "case",
        "backend",
        "platform",
        "dtype",
        "forward_seconds",
        "forward_backward_seconds",
        "over_dense",
        "over_equal_width",
        "compile_seconds",
        "peak_bytes",
    }
    for row in rows:
        assert row["forward_seconds"] > 0
        assert row["compile_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert (row["over_dense"] == 1) == (row["backend"] == "dense")
        assert (row["over_equal_width"] is not None) == (row["case"] == "modse")


def test_padded_ragged_dot_computes_the_expert_ffn():
    """Otherwise its time would mean nothing."""
    widths, rows = expert_ffn.list_cases(8, 16)["modse"]
    inputs = expert_ffn.random_inputs(8, widths, rows, "float32")
    outputs = [
        expert_ffn.make_passes(widths, backend, "cpu", Blocks(8, 4)).forward(*inputs)
        for backend in ("reference", "ragged_dot")
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_cases_have_the_routing_that_their_names_say():
    cases = expert_ffn.list_cases(384, 4096)
    assert {name: len(routing.widths) for name, routing in cases.items()} == {
        "modse": 8,
        "equal": 8,
        "64 experts top-8": 64,
        "1024 experts": 1024,
        "one empty": 8,
        "all on one": 8,
    }
    for name in ("modse", "equal", "all on one"):
        assert sum(cases[name].rows) == 8192
    assert sum(cases["modse"].widths) == sum(cases["equal"].widths) == 8 * 960
    assert (cases["one empty"].rows == 0).sum() == 1
    assert (cases["all on one"].rows == 0).sum() == 7


@pytest.fixture(scope="module")
def step_rows() -> list[dict]:
    """Results of two shapes, as if the second one took twice as long."""
    time_interleaved = timing.time_interleaved

    def time_with_fixed_results(cases, *args, **options):
        seconds = time_interleaved(cases, *args, **options)
        return {
            key: [2.0 if "tiny-modse" in key else 1.0] * len(values)
            for key, values in seconds.items()
        }

    config = tiny_config()
    equal = dataclasses.replace(config, moe=dataclasses.replace(config.moe, widths=(), pairs=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time_interleaved", time_with_fixed_results)
        return train_step.measure({"tiny": equal, "tiny-modse": config}, 2, False)


def test_training_steps_have_rates_and_shares(step_rows):
    for row in step_rows:
        assert row["tokens_per_second"] > 0
        assert 0 < row["mfu_realised"] < 1
        assert 0 < row["mfu_nominal"] < 1
        assert set(row["share"]) == {"attention", "experts", "dispatch", "loss", "optimiser"}


def test_training_steps_are_compared_with_equal_widths_at_equal_flops(step_rows):
    equal, modse = step_rows
    assert "over_equal_width" not in equal
    assert equal["mfu_realised"] == equal["mfu_nominal"]
    flops_ratio = 2 * modse["teraflops_realised"] / equal["teraflops_realised"]
    assert flops_ratio != 1
    assert modse["over_equal_width"] == pytest.approx(2 / flops_ratio)


def test_built_in_shapes_of_training_steps():
    equal = train_step.shape_config("A")
    modse = train_step.shape_config("A-modse")
    many_experts = train_step.shape_config("B")
    assert sum(equal.widths) == sum(modse.widths)
    assert len(many_experts.widths) == 64
    assert many_experts.moe.top_k == 8
    assert many_experts.widths[0] == 240


def test_results_are_written_to_the_file_of_json(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setattr(timing, "JSON", types.SimpleNamespace(value=str(path)))
    timing.write([{"a": 1}])
    assert json.loads(path.read_text()) == [{"a": 1}]


def test_ratios_are_computed_within_a_repeat():
    assert timing.median_ratio([2, 20, 6], [1, 10, 2]) == 2


def test_the_batch_of_the_scaling_benchmark_grows_with_the_devices():
    config = scaling.small_config(8)
    assert config.training.batch_size == 8 * scaling.SEQUENCES
    assert config.mesh.expert == 4


def test_scaling_measures_each_number_of_devices(monkeypatch):
    def tiny_on(devices):
        return tiny_config(mesh=MeshConfig(*scaling.MESHES[devices]))

    monkeypatch.setattr(scaling, "small_config", tiny_on)
    one, two = scaling.measure_on_cpu((1, 2), repeats=1)
    assert one["over_one_device"] == 1
    assert two["over_one_device"] > 0
    assert two["mesh"]["expert"] == 2
    assert not one["collective_bytes_by_kind"]
    assert sum(two["collective_bytes_by_kind"].values()) > 0


@pytest.mark.parametrize("batches", [(2,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_inference_is_measured_for_every_kind_of_work(batches):
    shapes = {"modse": tiny_config(), "equal": tiny_config(moe=dict(widths=(), pairs=False))}
    rows = evaluate.measure(shapes, 2, prompt=8, new=4, batches=batches)
    per_batch = [f"{what} {batch}" for batch in batches for what in ("prefill", "decode")]
    expected = ["score", "training forward", *per_batch]
    assert [row["what"] for row in rows] == expected * 2
    assert rows[0]["over_training_forward"] > 0
    assert rows[0]["over_equal_width"] > 0
    for row in rows:
        if not row["what"].startswith("decode"):  # a difference of two noisy times
            assert row["tokens_per_second"] > 0


def test_inference_shapes_have_equal_sums_of_widths():
    modse, equal = evaluate.shapes(128, 1).values()
    assert sum(modse.widths) == sum(equal.widths)
    assert len(set(modse.widths)) > 1
