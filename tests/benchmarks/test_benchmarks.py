"""The benchmarks run, and their rows hold what they promise. Nothing here asks how fast anything is."""

import dataclasses
import json
import types

import numpy as np
import pytest

from benchmarks import evaluate, expert_ffn, scaling, timing, train_step
from modse_jax.config.options import MeshConfig
from modse_jax.moe.experts.block_sizes import Blocks
from tests.helpers.configs import tiny_config


def test_expert_layer_rows():
    rows = expert_ffn.run(["modse", "equal"], ["reference"], 8, 16, "float32", 2, Blocks(8, 4))
    assert [(r["case"], r["backend"]) for r in rows] == [
        (case, backend) for case in ("modse", "equal") for backend in ("dense", "reference")
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
    for r in rows:
        assert r["forward_seconds"] > 0 and r["compile_seconds"] > 0 and r["peak_bytes"] > 0
        assert (r["over_dense"] == 1) == (r["backend"] == "dense")
        assert (r["over_equal_width"] is not None) == (r["case"] == "modse")


def test_padded_ragged_dot_computes_the_same():
    """Else its time would say nothing."""
    widths, rows = expert_ffn.cases(8, 16)["modse"]
    x, counts, w, dy = expert_ffn.arguments(8, widths, rows, "float32")
    ours, padded = (
        expert_ffn.functions(widths, b, "cpu", Blocks(8, 4))[0] for b in ("reference", "ragged_dot")
    )
    np.testing.assert_allclose(padded(x, counts, w, dy), ours(x, counts, w, dy), atol=1e-5)


def test_cases_have_the_rows_they_are_named_for():
    cases = expert_ffn.cases(384, 4096)
    assert {k: len(w) for k, (w, _) in cases.items()} == {
        "modse": 8,
        "equal": 8,
        "64 experts top-8": 64,
        "1024 experts": 1024,
        "one empty": 8,
        "all on one": 8,
    }
    assert sum(cases["modse"][1]) == sum(cases["equal"][1]) == sum(cases["all on one"][1]) == 8192
    assert sum(cases["modse"][0]) == sum(cases["equal"][0]) == 8 * 960
    assert (cases["one empty"][1] == 0).sum() == 1 and (cases["all on one"][1] == 0).sum() == 7


def test_training_step_rows(monkeypatch):
    def interleaved(cases, *args, **options):
        seconds = run(cases, *args, **options)
        return {k: [2.0 if "tiny-modse" in k else 1.0] * len(s) for k, s in seconds.items()}

    run = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", interleaved)
    config = tiny_config()
    equal = dataclasses.replace(config, moe=dataclasses.replace(config.moe, widths=(), pairs=False))
    rows = train_step.measure({"tiny": equal, "tiny-modse": config}, 2, False)
    for row in rows:
        assert (
            row["tokens_per_second"] > 0
            and 0 < row["mfu_realised"] < 1
            and 0 < row["mfu_nominal"] < 1
        )
        assert set(row["share"]) == {"attention", "experts", "dispatch", "loss", "optimiser"}
    assert "over_equal_width" not in rows[0] and rows[0]["mfu_realised"] == rows[0]["mfu_nominal"]
    work = 2 * rows[1]["teraflops_realised"] / rows[0]["teraflops_realised"]
    assert work != 1 and rows[1]["over_equal_width"] == pytest.approx(2 / work)
    a, modse, b = (train_step.shape(s) for s in ("A", "A-modse", "B"))
    assert sum(a.widths) == sum(modse.widths) and (len(b.widths), b.moe.top_k, b.widths[0]) == (
        64,
        8,
        240,
    )


def test_results_are_written_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "JSON", types.SimpleNamespace(value=str(tmp_path / "r.json")))
    timing.write([{"a": 1}])
    assert json.loads((tmp_path / "r.json").read_text()) == [{"a": 1}]


def test_ratios_are_within_a_repeat():
    assert timing.ratio([2, 20, 6], [1, 10, 2]) == 2


def test_scaling_rows(monkeypatch):
    assert (
        scaling.small(8).training.batch_size == 8 * scaling.SEQUENCES
        and scaling.small(8).mesh.expert == 4
    )
    monkeypatch.setattr(
        scaling, "small", lambda n: tiny_config(mesh=MeshConfig(*scaling.SHARDS[n]))
    )
    one, two = scaling.on_cpu((1, 2), repeats=1)
    assert one["over_one_device"] == 1 and two["over_one_device"] > 0 and two["mesh"]["expert"] == 2
    assert not one["collective_bytes_by_kind"] and sum(two["collective_bytes_by_kind"].values()) > 0


def test_inference_rows():
    rows = evaluate.measure(
        {"modse": tiny_config(), "equal": tiny_config(moe=dict(widths=(), pairs=False))},
        2,
        prompt=8,
        new=4,
        batches=(1, 2),
    )
    assert [r["what"] for r in rows[:6]] == [
        "score",
        "training forward",
        "prefill 1",
        "decode 1",
        "prefill 2",
        "decode 2",
    ]
    assert (
        rows[0]["over_training_forward"] > 0 and rows[0]["over_equal_width"] > 0 and len(rows) == 12
    )
    assert all(r["tokens_per_second"] > 0 for r in rows if not r["what"].startswith("decode"))
    modse, equal = evaluate.shapes(128, 1).values()
    assert sum(modse.widths) == sum(equal.widths) and len(set(modse.widths)) > 1
