"""Compares the shapes of a group, each at its own best learning rate and all at one shared rate."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modse_jax.report.comparison import statistics
from modse_jax.report.comparison.runs import Seed
from modse_jax.report.comparison.shapes import Group, Losses, Shape
from modse_jax.report.comparison.statistics import Difference, Mean
from modse_jax.sweeps import matching

# The two views of every comparison.
BEST = "best"
SHARED = "shared"
VIEWS = (BEST, SHARED)

MAX_NAMES = 6  # in a sentence


class Outcome(NamedTuple):
    """A shape in one view.

    Attributes:
        rate: the learning rate; None if the view has none for the shape.
        note: why there is no rate, or what a reader must know of it.
        losses: the loss of every seed at the rate.
        mean: their mean; None without any.
        difference: to the baseline in the same view; None if there is none, and for the baseline.
    """

    rate: float | None
    note: str
    losses: Mapping[Seed, float]
    mean: Mean | None
    difference: Difference | None

    @property
    def verdict(self) -> str:
        """Returns what the difference to the baseline says."""
        return statistics.MISSING if self.difference is None else self.difference.verdict


class ComparedShape(NamedTuple):
    """A shape in both views."""

    shape: Shape
    outcomes: Mapping[str, Outcome]  # by view

    @property
    def conclusion(self) -> str:
        """Returns what both views together say of the difference to the baseline."""
        return statistics.conclude(self.outcomes[BEST].verdict, self.outcomes[SHARED].verdict)

    def mean_loss(self, view: str) -> float:
        """Returns the mean loss in a view that has one."""
        found = self.outcomes[view].mean
        assert found is not None
        return found.value


class Comparison(NamedTuple):
    """The shapes of a group in both views.

    Attributes:
        group: the group.
        metric: the name of the loss.
        shared_rate: the shared learning rate; None if no run of the group has finished.
        shapes: its shapes, in the order of the sweep.
    """

    group: Group
    metric: str
    shared_rate: float | None
    shapes: list[ComparedShape]

    @property
    def others(self) -> list[ComparedShape]:
        """Returns the shapes except the baseline."""
        return [compared for compared in self.shapes if compared.shape is not self.group.baseline]

    def ranking(self, view: str) -> list[ComparedShape]:
        """Returns the shapes with a loss in a view, lowest mean loss first.

        Means are over the seeds that all of these shapes have, if there are any.
        """
        found = [compared for compared in self.shapes if compared.outcomes[view].losses]
        if not found:
            return []
        common = set(found[0].outcomes[view].losses).intersection(
            *(compared.outcomes[view].losses for compared in found)
        )

        def loss(compared: ComparedShape) -> float:
            losses = compared.outcomes[view].losses
            kept = [losses[seed] for seed in losses if seed in common or not common]
            return sum(kept) / len(kept)

        return sorted(found, key=loss)


def compare(group: Group, metric: str, shared_rate: float | None = None) -> Comparison:
    """Compares the shapes of a group.

    Args:
        group: the group.
        metric: the name of the loss.
        shared_rate: the shared learning rate; by default that of `choose_shared_rate`.
    """
    losses = [shape.losses(metric) for shape in group.shapes]
    diverged = [shape.diverged_rates() for shape in group.shapes]
    if shared_rate is None and any(losses):
        shared_rate = statistics.choose_shared_rate(losses, diverged)
    plain = {
        id(shape): {
            BEST: _best_outcome(of_shape, bad),
            SHARED: _shared_outcome(of_shape, bad, shared_rate),
        }
        for shape, of_shape, bad in zip(group.shapes, losses, diverged)
    }
    baseline = plain[id(group.baseline)]
    shapes = []
    for shape in group.shapes:
        outcomes = plain[id(shape)]
        if shape is not group.baseline:
            outcomes = {view: _compare(outcomes[view], baseline[view]) for view in VIEWS}
        shapes.append(ComparedShape(shape, outcomes))
    return Comparison(group, metric, shared_rate, shapes)


def _best_outcome(losses: Losses, diverged: set[float]) -> Outcome:
    choice = statistics.choose_best_rate(losses, diverged, matching.FEWEST_RATES)
    if choice.rate is None:
        return Outcome(None, choice.note, {}, None, None)
    found = losses[choice.rate]
    return Outcome(choice.rate, choice.note, found, statistics.mean(found.values()), None)


def _shared_outcome(losses: Losses, diverged: set[float], rate: float | None) -> Outcome:
    if rate in diverged:
        return Outcome(None, "runs have diverged at this rate", {}, None, None)
    if rate is None or rate not in losses:
        return Outcome(None, "no finished run at this rate", {}, None, None)
    return Outcome(rate, "", losses[rate], statistics.mean(losses[rate].values()), None)


def _compare(outcome: Outcome, baseline: Outcome) -> Outcome:
    difference = statistics.paired_difference(outcome.losses, baseline.losses)
    return outcome._replace(difference=difference)


class Pair(NamedTuple):
    """Two shapes and the difference of the first to the second, by view."""

    first: ComparedShape
    second: ComparedShape
    differences: Mapping[str, Difference | None]

    @property
    def is_swapped(self) -> bool:
        """True if the sign of the difference is not the same in both views."""
        best, shared = self.differences[BEST], self.differences[SHARED]
        return best is not None and shared is not None and best.value * shared.value < 0

    @property
    def is_reversed(self) -> bool:
        """True if two differences have opposite signs, and both are above noise."""
        found = self.differences.values()
        is_definite = all(d is not None and d.verdict in statistics.DEFINITE for d in found)
        return self.is_swapped and is_definite


def find_pairs(shapes: Sequence[ComparedShape]) -> list[Pair]:
    """Returns every pair of shapes."""
    return [
        Pair(
            first,
            second,
            {
                view: statistics.paired_difference(
                    first.outcomes[view].losses, second.outcomes[view].losses
                )
                for view in VIEWS
            },
        )
        for first, second in itertools.combinations(shapes, 2)
    ]


def describe_order(comparison: Comparison) -> list[str]:
    """Returns sentences on which shapes are lowest, and whether both views rank them equally."""
    sentences = []
    for view, where in ((BEST, "each at its best rate"), (SHARED, "at the shared rate")):
        ranking = comparison.ranking(view)
        if len(ranking) > 1:
            lowest = ranking[0]
            sentences.append(
                f"Of {len(ranking)} shapes {where}, {lowest.shape.name} has the lowest mean loss "
                f"({lowest.mean_loss(view):.4f}){_describe_lead(ranking, view)}."
            )
        else:
            sentences.append(f"There is no ranking of shapes {where}.")
    pairs = [pair for pair in find_pairs(comparison.shapes) if all(pair.differences.values())]
    if pairs:
        swapped = sum(pair.is_swapped for pair in pairs)
        beyond = sum(pair.is_reversed for pair in pairs)
        if swapped:
            sentences.append(
                f"The ranking depends on the learning rate: {swapped} of {len(pairs)} pairs of "
                f"shapes swap places between the two views, {beyond} of them above noise in both."
            )
        else:
            sentences.append(
                f"The ranking is the same in both views: none of {len(pairs)} pairs swaps places."
            )
    return sentences


def _describe_lead(ranking: Sequence[ComparedShape], view: str) -> str:
    """Returns how the lowest shape differs from the others: from which of them within noise."""
    first = ranking[0].outcomes[view].losses
    unsure = []
    for other in ranking[1:]:
        difference = statistics.paired_difference(other.outcomes[view].losses, first)
        if difference is None or difference.verdict != statistics.HIGHER:
            unsure.append(other.shape.name)
    if not unsure:
        return ", lower than all others beyond noise"
    more = f" and {len(unsure) - MAX_NAMES} more" if len(unsure) > MAX_NAMES else ""
    return f"; not told from it beyond noise: {', '.join(unsure[:MAX_NAMES])}{more}"
