"""Finds what weakens the comparisons of a sweep, for the warnings at the top of its report."""

from collections.abc import Callable, Iterable, Sequence

from modse_jax.config.loading import to_flat_dict
from modse_jax.report.comparison import statistics, tables
from modse_jax.report.comparison.comparisons import BEST, VIEWS, Comparison
from modse_jax.report.comparison.runs import SweepRuns
from modse_jax.report.comparison.shapes import Shape
from modse_jax.sweeps import matching, results
from modse_jax.sweeps.definition import ResolvedArm

MAX_NAMES = 6
LARGEST_FLOPS_DIFFERENCE = 0.05  # of realized FLOPs to nominal ones

# Options that change which losses can be compared.
LOSS_OPTIONS = ("model.vocab_size",)
DATA_PREFIX = "data."


def find_warnings(
    sweep: SweepRuns, shapes: Sequence[Shape], compared: Sequence[Comparison]
) -> list[str]:
    """Returns sentences on what weakens the comparisons of a sweep.

    Args:
        sweep: the sweep.
        shapes: all of its shapes.
        compared: the comparisons of its groups.
    """
    checks: tuple[Callable[[], str], ...] = (
        lambda: _check_planned_rates(sweep),
        lambda: _check_finished_rates(sweep, shapes),
        lambda: _check_edges(compared),
        lambda: _check_seeds(compared),
        lambda: _check_missing_seeds(compared),
        lambda: _check_states(sweep),
        lambda: _check_unknown(sweep),
        lambda: _check_losses(compared),
        lambda: _check_tokens(compared),
        lambda: _check_realized_flops(shapes),
        lambda: _check_skipped_steps(shapes),
    )
    return [warning for check in checks if (warning := check())]


def _compares_shapes(sweep: SweepRuns) -> bool:
    return sweep.claims is None or sweep.claims.compares_shapes


def _check_planned_rates(sweep: SweepRuns) -> str:
    arms = [ResolvedArm(run.arm, run.config) for run in sweep.runs if run.config is not None]
    warning = matching.find_missing_rates(_compares_shapes(sweep), arms)
    return warning[:1].upper() + warning[1:] + "." if warning else ""


def _check_finished_rates(sweep: SweepRuns, shapes: Sequence[Shape]) -> str:
    """Warns of shapes whose arms have enough learning rates, too few of which have results."""
    if not _compares_shapes(sweep) or len(shapes) == 1:
        return ""
    few = [
        shape.name
        for shape in shapes
        if len(shape.rates) >= matching.FEWEST_RATES
        and len(
            {run.rate for run in shape.runs if run.state in (results.FINISHED, results.DIVERGED)}
        )
        < matching.FEWEST_RATES
    ]
    if not few:
        return ""
    return (
        f"These shapes have results at fewer than {matching.FEWEST_RATES} learning rates so far, "
        f"so they have no best rate: {_join(few)}."
    )


def _check_edges(compared: Sequence[Comparison]) -> str:
    found = [
        f"{c.shape.name} ({c.outcomes[BEST].rate:g})"
        for comparison in compared
        for c in comparison.shapes
        if c.outcomes[BEST].rate is not None and c.outcomes[BEST].note
    ]
    if not found:
        return ""
    return (
        "The best learning rate of these shapes is the lowest or highest that was tried, so a "
        f"better one may lie beyond it: {_join(found)}. Add rates there."
    )


def _check_seeds(compared: Sequence[Comparison]) -> str:
    verdicts = [
        outcome.verdict
        for comparison in compared
        for c in comparison.others
        for outcome in c.outcomes.values()
    ]
    known = [verdict for verdict in verdicts if verdict != statistics.MISSING]
    if statistics.ONE_SEED not in known:
        return ""
    count = known.count(statistics.ONE_SEED)
    return (
        f"{count} of {len(known)} differences are of one seed, so nothing is known about their "
        "noise; add seeds before you conclude from them."
    )


def _check_missing_seeds(compared: Sequence[Comparison]) -> str:
    """Warns of shapes that have fewer seeds than others in the same view."""
    found = []
    for comparison in compared:
        for view in VIEWS:
            counts = {
                c.shape.name: len(c.outcomes[view].losses)
                for c in comparison.shapes
                if c.outcomes[view].losses
            }
            most = max(counts.values(), default=0)
            found += [
                f"{name} ({count} of {most}, {view} rate)"
                for name, count in counts.items()
                if count < most
            ]
    if not found:
        return ""
    return (
        "These shapes have fewer seeds than others; differences are over the seeds that both sides "
        f"have: {_join(found)}."
    )


def _check_states(sweep: SweepRuns) -> str:
    states = [run.state for run in sweep.runs if run.state != results.FINISHED]
    if not states:
        return ""
    listed = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return (
        f"{len(states)} of {len(sweep.runs)} arms have not finished: {listed}; see the list below."
    )


def _check_unknown(sweep: SweepRuns) -> str:
    unknown = [run.arm for run in sweep.runs if run.config is None]
    if not unknown:
        return ""
    return (
        "The workdir is of an older version, so the shapes of arms without a result are not known "
        f"and may be missing from tables and warnings: {_join(unknown)}."
    )


def _check_losses(compared: Sequence[Comparison]) -> str:
    """Warns if shapes of a group have other data or another vocabulary."""
    options = []
    for comparison in compared:
        values = [to_flat_dict(matching.without_rates(c.shape.config)) for c in comparison.shapes]
        options += [
            name
            for name in values[0]
            if (name in LOSS_OPTIONS or name.startswith(DATA_PREFIX))
            and any(other[name] != values[0][name] for other in values)
        ]
    if not options:
        return ""
    return (
        f"Shapes that are compared differ in {_join(dict.fromkeys(options))}, so their losses may "
        "not be of the same text or unit; with other tokenizers, compare --metric=bits_per_byte."
    )


def _check_tokens(compared: Sequence[Comparison]) -> str:
    for comparison in compared:
        counts = [matching.count_tokens(c.shape.config) for c in comparison.shapes]
        if min(counts) < max(counts):
            return (
                f"Shapes that are compared train on {min(counts):,} to {max(counts):,} tokens: a "
                "lower loss may be due to more training."
            )
    return ""


def _check_realized_flops(shapes: Sequence[Shape]) -> str:
    found = []
    for shape in shapes:
        realized = tables.mean_metric(shape, "realized_flops_per_token")
        if realized is None:
            continue
        difference = realized / matching.count_flops_per_token(shape.config) - 1
        if abs(difference) > LARGEST_FLOPS_DIFFERENCE:
            found.append(f"{shape.name} ({difference:+.1%})")
    if not found:
        return ""
    return (
        f"Realized FLOPs differ from nominal ones by more than {LARGEST_FLOPS_DIFFERENCE:.0%}, so "
        f"equal nominal FLOPs are not equal work: {_join(found)}."
    )


def _check_skipped_steps(shapes: Sequence[Shape]) -> str:
    found = [
        f"{run.arm} ({run.metrics['skipped_steps']})"
        for shape in shapes
        for run in shape.finished()
        if run.metrics.get("skipped_steps")
    ]
    if not found:
        return ""
    return f"Finished runs skipped steps that were not finite: {_join(found)}."


def _join(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MAX_NAMES
    text = ", ".join(listed[:MAX_NAMES])
    return f"{text} and {more} more" if more > 0 else text
