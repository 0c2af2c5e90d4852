"""Statistics of the sweep report: against scipy's paired t-test and values worked out by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from modse_jax.report.comparison import statistics
from modse_jax.report.comparison.runs import Seed
from modse_jax.report.comparison.statistics import (
    HIGHER,
    LOWER,
    MISSING,
    NOISE,
    ONE_SEED,
)


def by_seed(*losses: float) -> dict[Seed, float]:
    """Returns losses of the seeds 0, 1 and so on; NaN for a seed that is missing."""
    return {Seed(i, i): loss for i, loss in enumerate(losses) if not math.isnan(loss)}


def test_interval_and_p_value_are_those_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    for count in (2, 3, 8):
        first, second = rng.normal(3, 0.1, count), rng.normal(3.1, 0.1, count)
        found = statistics.paired_difference(by_seed(*first), by_seed(*second))
        expected = scipy.stats.ttest_rel(first, second)
        low, high = expected.confidence_interval(0.95)
        assert found.value == pytest.approx(np.mean(first - second), rel=1e-12)
        assert found.interval == pytest.approx((low, high), rel=1e-9)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_interval_of_two_seeds_by_hand():
    # The differences are -0.1 and -0.3: mean -0.2, deviation 0.1 * sqrt(2), error 0.1. The quantile
    # of t with one degree of freedom is tan(pi * 0.475) = 12.7062.
    found = statistics.paired_difference(by_seed(3.0, 3.1), by_seed(3.1, 3.4))
    assert found.value == pytest.approx(-0.2)
    half = 0.1 * math.tan(math.pi * 0.475)
    assert found.interval == pytest.approx((-0.2 - half, -0.2 + half))
    assert found.verdict == NOISE


def test_pairing_removes_what_seeds_have_in_common():
    """The seeds differ by 0.5, the shapes by 0.01: unpaired, this would be noise."""
    baseline = by_seed(3.0, 3.5, 4.0)
    shape = by_seed(2.99, 3.4901, 3.9899)
    found = statistics.paired_difference(shape, baseline)
    assert found.verdict == LOWER
    assert statistics.paired_difference(baseline, shape).verdict == HIGHER


def test_only_common_seeds_count_and_one_gives_no_interval():
    found = statistics.paired_difference(by_seed(3.0, 5.0), by_seed(math.nan, 4.0, 1.0))
    assert (found.value, found.interval, found.seeds) == (1.0, None, (Seed(1, 1),))
    assert found.verdict == ONE_SEED
    assert statistics.paired_difference(by_seed(3.0), by_seed(math.nan, 4.0)) is None


def test_equal_differences_have_an_interval_of_no_width():
    found = statistics.paired_difference(by_seed(1.0, 2.0), by_seed(1.5, 2.5))
    assert found.interval == (-0.5, -0.5) and found.p_value == 0 and found.verdict == LOWER
    same = statistics.paired_difference(by_seed(1.0, 2.0), by_seed(1.0, 2.0))
    assert same.verdict == NOISE and same.p_value == 1


def test_verdict_changes_where_the_interval_reaches_zero():
    """By hand: three differences of mean m and deviation 1 have the half-width 4.3027 / sqrt(3)."""
    half = 4.302652729911275 / math.sqrt(3)
    for factor, verdict in ((0.999, NOISE), (1.001, HIGHER)):
        center = factor * half
        shape = by_seed(center - 1, center, center + 1)
        found = statistics.paired_difference(shape, by_seed(0.0, 0.0, 0.0))
        assert found.verdict == verdict


def test_mean_has_the_sample_deviation():
    assert statistics.mean([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert statistics.mean([4.0]) == (4.0, None, 1)
    assert statistics.mean([]) is None


def test_best_rate_has_the_lowest_mean_of_common_seeds():
    # Seed 1 is hard, and has not run at 0.1: only seed 0 may decide.
    losses = {0.01: by_seed(3.0, 5.0), 0.1: by_seed(3.2), 1.0: by_seed(3.5, 4.0)}
    assert statistics.choose_best_rate(losses, (), 3).rate == 0.01
    # Without a seed that all rates have, each rate's own mean decides.
    losses[1.0] = by_seed(math.nan, 4.0)
    assert statistics.choose_best_rate(losses, (), 3).rate == 0.1


def test_best_rate_at_the_end_is_noted_unless_runs_diverge_beyond_it():
    losses = {0.01: by_seed(3.0), 0.1: by_seed(2.9), 1.0: by_seed(2.8)}
    choice = statistics.choose_best_rate(losses, (), 3)
    assert choice.rate == 1.0 and "highest rate that was tried" in choice.note
    assert statistics.choose_best_rate(losses, (10.0,), 3) == (1.0, "")
    losses[0.01] = by_seed(1.0)
    assert "lowest rate that was tried" in statistics.choose_best_rate(losses, (), 3).note


def test_rate_at_which_a_seed_diverged_is_not_the_best():
    losses = {0.01: by_seed(3.0, 3.0), 0.1: by_seed(2.5), 1.0: by_seed(3.2, 3.2)}
    assert statistics.choose_best_rate(losses, (0.1,), 3).rate == 0.01
    assert statistics.choose_best_rate({}, (0.1, 1.0, 2.0), 3).note == (
        "runs have diverged at every learning rate"
    )


def test_too_few_rates_have_no_best():
    choice = statistics.choose_best_rate({0.01: by_seed(3.0), 0.1: by_seed(2.9)}, (), 3)
    assert choice == (None, "2 of at least 3 learning rates have results")


def test_shared_rate_has_most_shapes_then_the_lowest_mean():
    shapes = [
        {0.01: by_seed(3.0), 0.1: by_seed(2.0), 1.0: by_seed(2.8)},
        {0.01: by_seed(3.0), 1.0: by_seed(2.8)},
    ]
    assert statistics.choose_shared_rate(shapes, [(), ()]) == 1.0
    assert statistics.choose_shared_rate(shapes, [(), (1.0,)]) == 0.01


@pytest.mark.parametrize(
    "best, shared, conclusion",
    [
        (LOWER, LOWER, "lower at both"),
        (NOISE, NOISE, "below noise at both"),
        (LOWER, HIGHER, "reversed: lower at the best rates, higher at the shared rate"),
        (NOISE, HIGHER, "below noise at the best rates, higher at the shared rate"),
        (MISSING, LOWER, "lower at the shared rate; the best rates are not known"),
        (LOWER, MISSING, "lower at the best rates; no shared rate"),
        (ONE_SEED, ONE_SEED, "one seed: noise is not known"),
    ],
)
def test_conclusions(best, shared, conclusion):
    assert statistics.conclude(best, shared) == conclusion
