"""Groups the runs of a sweep by shape: all runs that differ only in seeds and learning rates."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from modse_jax.config.loading import to_flat_dict
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.report.comparison.runs import Run, Seed, SweepRuns
from modse_jax.study import notation
from modse_jax.study.notation import LayerShape
from modse_jax.sweeps import matching, results

Losses = dict[float, dict[Seed, float]]  # {learning rate: {seed: loss}}


@dataclasses.dataclass(frozen=True)
class Shape:
    """All runs of a sweep that differ only in seeds and learning rates.

    Attributes:
        name: what the names of its arms have in common.
        runs: its runs, in the order of the sweep.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        """Returns the config of its first run."""
        assert self.runs[0].config is not None
        return self.runs[0].config

    @property
    def layer(self) -> LayerShape | None:
        """Returns n, k, g and s of its layers; None for a dense model."""
        return notation.from_config(self.config)

    @property
    def rates(self) -> list[float]:
        """Returns the learning rates that the sweep has for it, in order."""
        return sorted({run.rate for run in self.runs})

    def losses(self, metric: str) -> Losses:
        """Returns the losses of finished runs that have the metric."""
        found: Losses = collections.defaultdict(dict)
        for run in self.finished():
            loss = run.metrics.get(metric)
            if loss is not None:
                found[run.rate][run.seed] = loss
        return dict(sorted(found.items()))

    def finished(self, rate: float | None = None) -> list[Run]:
        """Returns the finished runs, of all learning rates or of one."""
        return [
            run
            for run in self.runs
            if run.state == results.FINISHED and (rate is None or run.rate == rate)
        ]

    def diverged_rates(self) -> set[float]:
        """Returns the learning rates at which a run has diverged."""
        return {run.rate for run in self.runs if run.state == results.DIVERGED}


class Group(NamedTuple):
    """Shapes that the sweep holds comparable, and the one that the others are compared with.

    Attributes:
        label: the options that the group has in common, such as "model.dim=240"; "" if the sweep
            has only one group.
        shapes: its shapes, in the order of the sweep.
        baseline: one of them.
    """

    label: str
    shapes: list[Shape]
    baseline: Shape


def find_shapes(runs: Sequence[Run]) -> list[Shape]:
    """Returns the shapes of runs; runs whose config is not known are left out."""
    known = [run for run in runs if run.config is not None]
    grouped = _group(known, lambda run: matching.without_rates(_config(run)))
    if any(_has_repetition(group) for group in grouped):
        # Two schedules have the same peak, so the ends of the schedules are a part of the shape.
        # Each end is a rate or a ratio to the peak, whichever leaves more runs to a shape.
        candidates = [
            _group(known, functools.partial(_key_with_ends, ratios=ratios))
            for ratios in itertools.product((False, True), repeat=2)
        ]
        grouped = min(candidates, key=len)
    names = _name_shapes([[run.arm for run in group] for group in grouped])
    return [Shape(name, tuple(group)) for name, group in zip(names, grouped)]


def find_groups(sweep: SweepRuns, shapes: Sequence[Shape], baseline: str = "") -> list[Group]:
    """Returns the groups within which the sweep holds its arms comparable.

    Args:
        sweep: the sweep.
        shapes: its shapes.
        baseline: the name of the shape that the others are compared with. By default, it is the
            dense shape of each group, or its first shape if none or several are dense.

    Raises:
        UserError: there is no shape of this name.
    """
    if baseline and baseline not in [shape.name for shape in shapes]:
        known = ", ".join(repr(shape.name) for shape in shapes)
        raise UserError(f"--baseline={baseline} is not a shape of this sweep; shapes: {known}")
    within = sweep.claims.fixed_within if sweep.claims is not None else ()
    by_key: dict[tuple, list[Shape]] = collections.defaultdict(list)
    for shape in shapes:
        options = to_flat_dict(shape.config)
        by_key[tuple(options[option] for option in within)].append(shape)
    groups = []
    for key, members in by_key.items():
        names = [f"{option}={value}" for option, value in zip(within, key)]
        label = ", ".join(names) if len(by_key) > 1 else ""
        groups.append(Group(label, members, _choose_baseline(members, baseline)))
    return groups


def _choose_baseline(shapes: Sequence[Shape], name: str) -> Shape:
    named = [shape for shape in shapes if shape.name == name]
    dense = [shape for shape in shapes if shape.config.is_dense]
    if named:
        return named[0]
    return dense[0] if len(dense) == 1 else shapes[0]


def _config(run: Run) -> Config:
    assert run.config is not None
    return run.config


def _group(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> list[list[Run]]:
    found: dict[Hashable, list[Run]] = collections.defaultdict(list)
    for run in runs:
        found[key(run)].append(run)
    return list(found.values())


def _has_repetition(runs: Sequence[Run]) -> bool:
    """Tests whether two runs have the same peak of the learning rate and the same seeds."""
    return len({(run.rate, run.seed) for run in runs}) < len(runs)


def _key_with_ends(run: Run, ratios: Sequence[bool]) -> Hashable:
    """Returns the shape of a run with the first and the last learning rate of its schedule.

    Args:
        run: the run.
        ratios: for either end, True to take its ratio to the peak.
    """
    optimizer = _config(run).optimizer
    ends = (optimizer.initial_learning_rate, optimizer.final_learning_rate)
    # Rounded, so that 0.1 * 3e-3 over 3e-3 is 0.1.
    values = [round(end / run.rate, 9) if ratio else end for end, ratio in zip(ends, ratios)]
    return matching.without_rates(_config(run)), *values


def _name_shapes(arms_of_shapes: Sequence[Sequence[str]]) -> list[str]:
    """Returns a name for every shape: the words of its arms' names that say what the shape is.

    Words that differ between the arms of any shape are seeds and rates. Words of all arms of the
    sweep say nothing. If the rest does not tell the shapes apart, the first arm names each.
    """
    split = [[name.split() for name in arms] for arms in arms_of_shapes]
    varying: set[str] = set()
    for names in split:
        words = [set(name) for name in names]
        varying |= words[0].union(*words) - words[0].intersection(*words)
    everywhere = set(split[0][0]).intersection(*(name for names in split for name in names))
    without_seeds = [[word for word in names[0] if word not in varying] for names in split]
    short = [[word for word in words if word not in everywhere] for words in without_seeds]
    for candidates in (short, without_seeds):
        joined = [" ".join(words) for words in candidates]
        if all(joined) and len(set(joined)) == len(joined):
            return joined
    return [arms[0] for arms in arms_of_shapes]
