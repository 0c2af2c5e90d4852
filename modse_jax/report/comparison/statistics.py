"""Means, paired differences and verdicts for losses of a few seeds, and the choice of rates.

The rule for noise: a difference is below noise if the 95% t interval of the mean of its paired
differences includes zero. Without two common seeds, nothing is said about noise.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from modse_jax.report.comparison.runs import Seed
from modse_jax.report.comparison.shapes import Losses
from modse_jax.study.fits import Interval

CONFIDENCE = 0.95

# What a paired difference says of a shape.
LOWER = "lower"
HIGHER = "higher"
NOISE = "below noise"
ONE_SEED = "one seed"  # a difference without an interval
MISSING = "not known"  # no difference

DEFINITE = (LOWER, HIGHER)


class Mean(NamedTuple):
    """The mean of a few values.

    Attributes:
        value: the mean.
        deviation: their sample standard deviation; None for one value.
        num_seeds: their number.
    """

    value: float
    deviation: float | None
    num_seeds: int


class Difference(NamedTuple):
    """The mean of paired differences.

    Attributes:
        value: the mean.
        interval: its t interval; None for one pair.
        p_value: the two-sided p-value of the paired t-test; None for one pair.
        seeds: the seeds that both sides have.
    """

    value: float
    interval: Interval | None
    p_value: float | None
    seeds: tuple[Seed, ...]

    @property
    def verdict(self) -> str:
        """Returns LOWER, HIGHER, NOISE or ONE_SEED."""
        if self.interval is None:
            return ONE_SEED
        if self.interval.low <= 0 <= self.interval.high:
            return NOISE
        return LOWER if self.value < 0 else HIGHER


class RateChoice(NamedTuple):
    """The learning rate at which the runs of a shape are compared.

    Attributes:
        rate: the rate; None if there is none.
        note: why there is none, or what a reader must know of it; "" if nothing.
    """

    rate: float | None
    note: str = ""


def mean(values: Collection[float]) -> Mean | None:
    """Returns the mean of values; None without any."""
    array = np.array(list(values))
    if not len(array):
        return None
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    return Mean(float(array.mean()), deviation, len(array))


def paired_difference(
    losses: Mapping[Seed, float], baseline: Mapping[Seed, float]
) -> Difference | None:
    """Returns losses minus those of the baseline with the same seed; None without a common seed."""
    seeds = tuple(seed for seed in losses if seed in baseline)
    summary = mean([losses[seed] - baseline[seed] for seed in seeds])
    if summary is None:
        return None
    if summary.deviation is None:
        return Difference(summary.value, None, None, seeds)
    error = summary.deviation / math.sqrt(summary.num_seeds)
    freedom = summary.num_seeds - 1
    if error == 0:  # the differences are equal, so t is not a number
        same = Interval(summary.value, summary.value)
        return Difference(summary.value, same, float(summary.value == 0), seeds)
    low, high = scipy.stats.t.interval(CONFIDENCE, freedom, loc=summary.value, scale=error)
    p_value = 2 * scipy.stats.t.sf(abs(summary.value) / error, freedom)
    return Difference(summary.value, Interval(float(low), float(high)), float(p_value), seeds)


def choose_best_rate(losses: Losses, diverged: Collection[float], fewest: int) -> RateChoice:
    """Returns the learning rate with the lowest mean loss.

    Rates at which a run has diverged count as tried, and are not chosen. Means are over the seeds
    that have finished at all other rates, or if there is no such seed, over those of each rate.

    Args:
        losses: the losses of finished runs.
        diverged: the rates at which a run has diverged.
        fewest: the number of tried rates below which no rate is called the best.
    """
    candidates = [rate for rate in losses if rate not in diverged]
    tried = sorted({*losses, *diverged})
    if len(tried) < fewest:
        return RateChoice(None, f"{len(tried)} of at least {fewest} learning rates have results")
    if not candidates:
        return RateChoice(None, "runs have diverged at every learning rate")
    best = min(candidates, key=lambda rate: np.mean(_comparable(losses, candidates, rate)))
    if best in (tried[0], tried[-1]):
        end = "lowest" if best == tried[0] else "highest"
        return RateChoice(best, f"the {end} rate that was tried: a better one may lie beyond it")
    return RateChoice(best)


def _comparable(losses: Losses, rates: Sequence[float], rate: float) -> list[float]:
    """Returns the losses at a rate of the seeds that all rates have, or else of all its seeds."""
    common = set(losses[rate]).intersection(*(losses[other] for other in rates))
    return [loss for seed, loss in losses[rate].items() if seed in common or not common]


def choose_shared_rate(shapes: Sequence[Losses], diverged: Sequence[Collection[float]]) -> float:
    """Returns the learning rate at which most shapes have finished runs and none that diverged.

    Of several, it is the one with the lowest mean loss over the shapes.

    Args:
        shapes: the losses of every shape, of which one at least has some.
        diverged: the rates at which runs of the shape have diverged, for every shape.
    """
    rates = sorted({rate for losses in shapes for rate in losses})

    def rank(rate: float) -> tuple[int, float]:
        means = [
            np.mean(list(losses[rate].values()))
            for losses, bad in zip(shapes, diverged)
            if rate in losses and rate not in bad
        ]
        return -len(means), float(np.mean(means)) if means else math.inf

    return min(rates, key=rank)


def conclude(best: str, shared: str) -> str:
    """Returns what two verdicts say together, at the best and at the shared learning rate."""
    if best == shared:
        return {
            LOWER: "lower at both",
            HIGHER: "higher at both",
            NOISE: "below noise at both",
            ONE_SEED: "one seed: noise is not known",
            MISSING: "not known",
        }[best]
    if best in DEFINITE and shared in DEFINITE:
        return f"reversed: {best} at the best rates, {shared} at the shared rate"
    if best == MISSING:
        return f"{_describe(shared)} at the shared rate; the best rates are not known"
    if shared == MISSING:
        return f"{_describe(best)} at the best rates; no shared rate"
    return f"{_describe(best)} at the best rates, {_describe(shared)} at the shared rate"


def _describe(verdict: str) -> str:
    return "one seed, so noise is not known," if verdict == ONE_SEED else verdict
