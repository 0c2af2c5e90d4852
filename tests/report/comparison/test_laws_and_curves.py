"""Fits of laws to shapes, and losses against costs, from synthetic runs with known answers."""

import numpy as np
import pytest

from modse_jax.model import accounting
from modse_jax.report.comparison import comparisons, law_fits, run_curves, runs, shapes, tables
from modse_jax.report.comparison.comparisons import BEST, SHARED
from modse_jax.report.comparison.run_curves import Curve
from modse_jax.study.laws import RoutedLaw
from modse_jax.sweeps import results
from modse_jax.sweeps.definition import axis, choices, product
from tests.helpers import sweep_results
from tests.helpers.configs import tiny_config
from tests.helpers.sweep_results import Outcome

EXPERTS = {"dense": sweep_results.dense()} | {
    f"n{n}": sweep_results.experts(n, 1) for n in (2, 4, 16)
}


def dense_parameters(config) -> int:
    active = accounting.count_active_parameters(config)
    return active.total - active.router


def test_laws_take_the_numbers_that_their_papers_count(tmp_path):
    forms = {
        "dense": sweep_results.dense(),
        "n4 g1": sweep_results.experts(4, 1),
        "n8 g1/4": sweep_results.experts(8, 4),
    }
    directory = sweep_results.write_sweep(
        tmp_path / "s", choices(forms), lambda *_: Outcome(None, results.FINISHED)
    )
    found = shapes.find_shapes(runs.read_sweep(directory).runs)
    chinchilla, granularity, joint, routed = [law.inputs for law in law_fits.choose_laws()]
    # By hand: dim 16, two layers, two heads, 300 pieces, FFNs of width 48, no QK-norm, tied or not.
    embeddings = accounting.count_parameters(found[0].config).embeddings
    attention, norms, ffn = 2 * 4 * 16 * 16, 5 * 16, 2 * 3 * 16 * 48
    dense = embeddings + attention + norms + ffn
    tokens = 100 * 8 * 32
    assert [chinchilla(shape) for shape in found] == [
        {"parameters": dense, "tokens": tokens},
        None,
        None,
    ]
    assert [routed(shape) for shape in found] == [
        {"parameters": dense, "experts": 1},
        {"parameters": dense, "experts": 4},
        None,
    ]
    assert joint(found[1]) == {
        "parameters": dense + 2 * 4 * 16,
        "tokens": tokens,
        "experts": 4,
    }
    assert joint(found[2]) is None and granularity(found[0]) is None
    assert granularity(found[2]) == {
        "parameters": attention + norms + 2 * ffn + 2 * 8 * 16,
        "tokens": tokens,
        "granularity": 4,
    }


@pytest.mark.slow
def test_law_behind_the_losses_is_found_in_the_view_that_has_them(tmp_path):
    law = RoutedLaw()

    def outcome(arm, config):
        number = 1 if config.is_dense else config.moe.num_experts
        return Outcome(float(law.evaluate(1e4 * dense_parameters(config), number)))

    arms = product(axis("model.dim", (16, 32, 64)), choices(EXPERTS), sweep_results.rates(1e-2))
    directory = sweep_results.write_sweep(tmp_path / "s", arms, outcome)
    sweep = runs.read_sweep(directory)
    (group,) = shapes.find_groups(sweep, shapes.find_shapes(sweep.runs))
    compared = comparisons.compare(group, "validation_loss").shapes
    (choice,) = [law for law in law_fits.choose_laws() if law.name.startswith("Routed")]
    assert "has 0 with a loss here" in law_fits.fit_law(choice, compared, BEST).reason
    found = law_fits.fit_law(choice, compared, SHARED)
    assert not found.reason and found.fit.num_runs == 12
    measured = [c.mean_loss(SHARED) for c in compared]
    np.testing.assert_allclose(found.predicted, measured, rtol=2e-3)
    # a is the slope in log10 N; c log10 E is zero for dense models only with E_start = 1.
    slope = found.fit.coefficients["a"]
    assert slope == pytest.approx(law.a, abs=0.01)
    low, high = found.intervals["a"]
    assert low - 1e-3 <= slope <= high + 1e-3
    assert "Fitted to 12 shapes" in tables.fit_table(found).note


def test_costs_are_cumulative_and_realized_flops_follow_the_chosen_widths(tmp_path):
    """The first logged step chooses only the widest expert, the second one only the narrowest."""
    config = tiny_config(moe=dict(top_k=1), training=dict(steps=5))
    tokens = 8 * 32
    metrics = [
        {"step": 2, "split": "train", "loss": 5.0, "step_seconds": 1.0},
        {"step": 4, "split": "train", "loss": None, "step_seconds": 3.0},
        {"step": 5, "split": "validation", "loss": 4.5},
    ]
    routing = [
        {"step": step, "split": "train", "layer": layer, "dropped": 0, "tokens_per_expert": counts}
        for step, counts in ((2, [tokens, 0, 0, 0]), (4, [0, tokens, 0, 0]))
        for layer in (0, 1)
    ]
    sweep_results.write_lines(tmp_path / "metrics.jsonl", metrics)
    sweep_results.write_lines(tmp_path / "routing.jsonl", routing)
    log = run_curves.read_routing(config, tmp_path)
    curves = run_curves.read_curves(config, tmp_path, log, "validation_loss")
    train, validation = curves["train"], curves["validation"]
    assert train.losses[0] == 5.0 and np.isnan(train.losses[1])
    assert train.costs["seconds"].tolist() == [2.0, 8.0]
    assert validation.costs["seconds"].tolist() == [11.0]  # the last step took as long
    assert validation.costs["tokens"].tolist() == [5 * tokens]
    nominal = accounting.nominal_flops_per_token(config, 32)
    assert train.costs["nominal_flops"].tolist() == [2 * tokens * nominal, 4 * tokens * nominal]
    # Widths are 20 and 4, and their mean is 12: two layers, dim 16, three matrices, 6 FLOPs each.
    more = 2 * 3 * 16 * 8 * 6
    realized = train.costs["realized_flops"]
    assert realized.tolist() == [2 * tokens * (nominal + more), 4 * tokens * nominal]
    assert log.load_WL.tolist() == [[4.0, 4.0]] * 2 and log.validation_dropped is None


def test_load_of_pools_is_that_of_the_least_balanced_pool():
    """Both pools are even, but a token uses two experts of the first and one of the second."""
    pools = ((2, 12, 2), (4, 12, 1))
    config = tiny_config(moe=dict(widths=(), pairs=False, pools=pools))
    even = np.array([100, 100, 25, 25, 25, 25])
    assert results.load_imbalance(config, even) == 1.0
    assert results.load_imbalance(config, even + [0, 0, 20, 0, -20, 0]) == 1.8
    assert results.load_imbalance(config, 0 * even) == 0


def test_mean_curve_has_the_steps_of_all_seeds():
    def curve(steps, losses):
        costs = {name: np.array(steps, float) for name in run_curves.COSTS}
        return Curve(np.array(steps), np.array(losses, float), costs)

    found = run_curves.mean_curve([curve([1, 2, 3], [4, 5, 6]), curve([2, 3, 4], [7, 8, 9])])
    assert found.steps.tolist() == [2, 3] and found.losses.tolist() == [6, 7]


def test_smoothing_leaves_out_what_is_not_a_number():
    smoothed = run_curves.smooth(np.array([1.0, np.nan, 3.0, 5.0]), 2)
    assert smoothed.tolist() == [1.0, 1.0, 3.0, 4.0]


def test_dense_model_has_no_routing(tmp_path):
    assert run_curves.read_routing(tiny_config(model=dict(dense_width=48)), tmp_path) is None


def test_logged_routing_gives_the_numbers_of_the_table(tmp_path):
    arms = choices({"n8": sweep_results.experts(8, 4)})
    directory = sweep_results.write_sweep(tmp_path / "s", arms, lambda *_: Outcome(3.0))
    (run,) = runs.read_sweep(directory).runs
    log = run_curves.read_routing(run.config, directory.training(run.id))
    result = results.read_result(directory, run.id)["metrics"]
    assert log.flops_per_token_S.mean() == pytest.approx(result["realized_flops_per_token"])
    assert len(log.tokens_W) == run_curves.NUM_WINDOWS and log.load_WL.shape == (10, 2)
