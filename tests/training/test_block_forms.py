"""Every form of a block trains, resumes, evaluates, samples and reports."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import Config, MeshConfig
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import scoring
from modse_jax.model import accounting, kernel_selection
from modse_jax.moe import expert_placement
from modse_jax.planning import planner
from modse_jax.report import analysis, pages
from modse_jax.runtime import sharding
from modse_jax.training import loop, metrics, run_logs, state_arrays, train_step
from modse_jax.training.checkpointing import Checkpoints
from tests.helpers.block_forms import config_of
from tests.helpers.configs import tiny_config
from tests.helpers.steps import assert_close, batch


def config_on(
    kind: str, norm_position: str, sizes: tuple[int, int, int], remat: str = "none", **sections
) -> Config:
    """Returns the config of a form on a mesh, with two experts, which compile fast."""
    moe = dict(num_experts=2, top_k=1, width=16, widths=(), pairs=False, placement="split")
    moe |= sections.pop("moe", {})
    config = config_of(kind, norm_position, model=dict(remat=remat), moe=moe, **sections)
    return dataclasses.replace(config, mesh=MeshConfig(*sizes))


# ---- meshes and checkpoints ----------------------------------------------------------------------


def list_order(config):
    """Returns the canonical index of each stored hidden unit of the experts."""
    placement = device_mesh.place_experts_on_mesh(config, device_mesh.build_mesh(config))
    return expert_placement.hidden_unit_order(config.widths, placement)


def train(config, state, first_step, count):
    """Runs steps on the config's mesh; returns (state, losses)."""
    mesh = device_mesh.build_mesh(config)
    step = train_step.compile_train_step(config, mesh)
    state = jax.device_put(state, train_step.state_shardings(config, mesh))
    losses = []
    for number in range(first_step, first_step + count):
        rows = jax.device_put(batch(config, number), sharding.batch_sharding(mesh))
        state, metrics = step(state, rows)
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize("kind", [pytest.param("parallel", marks=pytest.mark.slow), "dense"])
def test_a_form_trains_and_resumes_like_one_device_on_every_mesh(kind, tmp_path):
    """Saved on 1 x 1 x 8 devices, resumed on 2 x 2 x 2 with rematerialization."""
    batch_of_16 = dict(training=dict(batch_size=16))
    alone = config_on(kind, "post", (1, 1, 1), **batch_of_16)
    sharded = config_on(kind, "post", (1, 1, 8), **batch_of_16)
    mixed = config_on(kind, "post", (2, 2, 2), remat="full", **batch_of_16)
    first = train_step.init_sharded_state(sharded, device_mesh.build_mesh(sharded))
    canonical = state_arrays.to_canonical_order(first, list_order(sharded))
    expected, expected_losses = train(alone, jax.device_get(canonical), 0, 3)

    state, losses = train(sharded, jax.device_get(first), 0, 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if "w_ffn" in path[-1].key:
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
    saved = Checkpoints(tmp_path / "c", order=list_order(sharded))
    saved.save(state, {"validation_loss": None})
    saved.close()

    restored = Checkpoints(tmp_path / "c", read_only=True, order=list_order(mixed))
    shapes = train_step.state_shapes(mixed, device_mesh.build_mesh(mixed))
    state, reason = restored.restore(2, shapes)
    restored.close()
    assert not reason
    state, last_losses = train(mixed, state, 2, 1)
    np.testing.assert_allclose(losses + last_losses, expected_losses, atol=1e-5)
    state = state_arrays.to_canonical_order(state, list_order(mixed))
    assert_close(jax.device_get(state.opt_state), jax.device_get(expected.opt_state), 2e-4)


# ---- runs ----------------------------------------------------------------------------------------

RUNS = {
    "in_layer": config_on("in_layer", "pre", (2, 2, 2), remat="full"),
    "parallel": config_on("parallel", "post", (1, 1, 8)),
    # Options of the router have no effect without one.
    "dense": config_on("dense", "post", (1, 1, 8), moe=dict(bias_rule="sign")),
}


@pytest.fixture(scope="module")
def workdir_of(tmp_path_factory) -> Callable[[str], pathlib.Path]:
    """Returns a function that trains a run of a form, once, and returns its workdir."""
    root = tmp_path_factory.mktemp("forms")
    (root / "corpus").mkdir()
    for number in range(16):
        line = f"line {number} of some text, said again and again\n"
        (root / "corpus" / f"{number}.txt").write_text(line * 40)

    @functools.cache
    def train_form(kind: str) -> pathlib.Path:
        data = dataclasses.replace(RUNS[kind].data, source=f"text:{root / 'corpus'}")
        config = dataclasses.replace(RUNS[kind], data=data)
        assert loop.train(config, str(root / kind)) == ExitCode.FINISHED
        return root / kind

    return train_form


@pytest.mark.parametrize(
    "kind", [pytest.param("in_layer", marks=pytest.mark.slow), "parallel", "dense"]
)
def test_a_run_of_every_form_evaluates_samples_and_reports(kind, workdir_of):
    """The checkpoint has the same loss on the mesh of training and on that of evaluation."""
    workdir = workdir_of(kind)
    shown = []
    result = scoring.evaluate(
        str(workdir), 0, ("loss", "routing", "sample"), 0, 0, ("line",), shown.append
    )
    rows = run_logs.read_log(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 6]
    assert result["loss"]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-5)
    assert result["loss"]["loss"] < rows[0]["loss"]
    assert result["samples"][0]["text"]
    pages.write(str(workdir))
    pictures = {path.stem for path in (workdir / "report").glob("*.png")}
    page = (workdir / "report" / "index.html").read_text()
    layers = run_logs.read_log(workdir / "routing.jsonl")
    if kind == "dense":
        assert pictures == {"loss"} and layers == []
        assert "no experts: the model is dense" in page
        assert "no routing: the model is dense" in "".join(shown)
        assert result["routing"] == {"widths": [], "layers": []}
    else:
        assert pictures == {"loss", "expert_load", "load_by_width", "balance", "straggler"}
        assert len(layers) == 2 * len(rows)
        assert "share of tokens per expert" in "".join(shown)


def test_a_dense_run_logs_and_prints_no_routing(workdir_of):
    rows = run_logs.read_log(workdir_of("dense") / "metrics.jsonl")
    training = [row for row in rows if row["split"] == "train"]
    for row in training:
        assert row["balance_loss"] == row["z_loss"] == 0
        assert row["mfu_nominal"] == row["mfu_realised"]
        assert "router_bias_min" not in row
        line = metrics.console_line(row, [], 6)
        assert "bits/byte  grad" in line
        assert "balance" not in line and "load" not in line


def test_a_dense_run_is_a_baseline_but_has_no_analysis(workdir_of):
    text = analysis.write(str(workdir_of("parallel")), 0, (str(workdir_of("dense")),), 6, 4, 0)
    assert "by dense" in text
    with pytest.raises(UserError, match="--suite=analysis needs experts, but .* is a dense model"):
        analysis.write(str(workdir_of("dense")), 0, (), 0, 4, 0)


def test_a_plan_of_a_dense_step_has_no_experts():
    config = RUNS["dense"]
    mesh = device_mesh.build_mesh(config)
    assert (
        kernel_selection.select_kernels(config, mesh).line() == "experts: none; attention: blocks"
    )
    flops = planner.count_flops(config, mesh)
    assert flops.max_over_mean == 1
    tokens_per_device = 8 * 32 / 8
    assert flops.per_device == accounting.nominal_flops_per_token(config, 32) * tokens_per_device


def test_a_plan_of_pools_has_the_load_of_each_pool():
    """A device with the second pool has 3/4 of the routed tokens, not 1/2."""
    moe = dict(pools=((4, 12, 1), (4, 12, 3)), widths=(), pairs=False)
    config = dataclasses.replace(tiny_config(moe=moe), mesh=MeshConfig(4, 1, 2))
    flops = planner.count_flops(config, device_mesh.build_mesh(config))
    tokens_per_device = 8 * 32 / 8
    experts = accounting.nominal_expert_flops_per_token(config) * tokens_per_device
    expected = 1 + experts * (6 / 4 - 1) / flops.per_device
    assert flops.max_over_mean == pytest.approx(expected, rel=1e-12)
