"""The tables and sentences of the report of a sweep."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from modse_jax.config.loading import to_flat_dict
from modse_jax.model import accounting
from modse_jax.report.comparison import comparisons, pictures, statistics
from modse_jax.report.comparison.comparisons import BEST, SHARED, VIEWS, ComparedShape, Comparison
from modse_jax.report.comparison.law_fits import BOOTSTRAP_LEVEL, LawFit
from modse_jax.report.comparison.runs import Run, SweepRuns
from modse_jax.report.comparison.shapes import Shape
from modse_jax.report.comparison.statistics import Difference, Mean
from modse_jax.sweeps import matching, results

MAX_PAIRS = 5000  # rows of pairs.csv


class Table(NamedTuple):
    """A table of the page, and the rows of its CSV file.

    Attributes:
        note: a sentence above it.
        header: the names of the columns.
        rows: the cells as text.
        csv_rows: the numbers behind them.
        left: the number of columns, from the first one, that hold text.
    """

    note: str
    header: Sequence[str]
    rows: list[list[str]]
    csv_rows: list[dict[str, Any]]
    left: int = 1


# ---- sentences -----------------------------------------------------------------------------------


def describe_states(sweep: SweepRuns) -> str:
    """Returns how many arms are in which state, and by which code they were trained."""
    counts = collections.Counter(run.state for run in sweep.runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    revisions = sorted({run.revision for run in sweep.runs if run.revision})
    text = f"{len(sweep.runs)} arms: {states}. Code: {', '.join(revisions) or 'not known'}."
    if sweep.others:
        text += (
            f" Results of other code, data or arms: {len(sweep.others)}, kept apart at the end of "
            "this page."
        )
    return text


def describe_claims(sweep: SweepRuns) -> str:
    """Returns what the sweep holds fixed."""
    if sweep.claims is None:
        return (
            "The workdir is of an older version, which does not say what the sweep holds fixed; "
            "running `sweep` again adds it."
        )
    fixed = [
        f"{quantity.replace('_', ' ')} ({f'within {limit:.3g}' if limit else 'exactly'})"
        for quantity, limit in sweep.claims.fixed.items()
    ]
    within = ", ".join(sweep.claims.fixed_within)
    text = f"Held fixed: {', '.join(fixed) or 'nothing'}"
    return f"{text}, among arms of equal {within}." if within else f"{text}."


def count_conclusions(comparison: Comparison) -> list[str]:
    """Returns how many shapes differ from the baseline, by conclusion."""
    counts = collections.Counter(compared.conclusion for compared in comparison.others)
    if not counts:
        return []
    found = "; ".join(f"{count} {conclusion}" for conclusion, count in counts.most_common())
    others = len(comparison.others)
    return [f"Of {others} shapes compared with {comparison.group.baseline.name}: {found}."]


# ---- tables --------------------------------------------------------------------------------------


def conclusion_table(comparison: Comparison) -> Table:
    """Returns the losses of all shapes and their differences to the baseline, in both views."""
    baseline = comparison.group.baseline
    header = ["shape", "conclusion"]
    for view in VIEWS:
        header += [f"{view}: rate", "loss", "difference", "95% interval", "verdict"]
    rows = []
    for compared in _by_loss(comparison):
        is_baseline = compared.shape is baseline
        cells = [compared.shape.name, "baseline" if is_baseline else compared.conclusion]
        for view in VIEWS:
            outcome = compared.outcomes[view]
            cells += [
                "-" if outcome.rate is None else f"{outcome.rate:g}",
                format_mean(outcome.mean),
                *format_difference(outcome.difference),
                "" if is_baseline else outcome.verdict,
            ]
        rows.append(cells)
    csv_rows = [
        {
            "shape": compared.shape.name,
            "baseline": baseline.name,
            "conclusion": "" if compared.shape is baseline else compared.conclusion,
            **pictures.outcome_cells(compared, view),
        }
        for compared in comparison.shapes
        for view in VIEWS
    ]
    shared = comparison.shared_rate
    note = (
        f"Differences to {baseline.name}, paired by seed; ± is the standard deviation over seeds, "
        f"with the number of seeds. The shared rate is {'-' if shared is None else f'{shared:g}'}."
    )
    return Table(note, header, rows, csv_rows, left=2)


def _by_loss(comparison: Comparison) -> list[ComparedShape]:
    """Returns the shapes by loss at the best rates, or at the shared one; the others at the end."""
    ranked = [*comparison.ranking(BEST), *comparison.ranking(SHARED), *comparison.shapes]
    return list({id(compared): compared for compared in ranked}.values())


def format_mean(mean: Mean | None) -> str:
    """Returns a mean as text, with the standard deviation and the number of seeds."""
    if mean is None:
        return "-"
    if mean.deviation is None:
        return f"{mean.value:.4f} (1)"
    return f"{mean.value:.4f} ± {mean.deviation:.4f} ({mean.num_seeds})"


def format_difference(difference: Difference | None) -> tuple[str, str]:
    """Returns a difference and its interval as text."""
    if difference is None:
        return "-", "-"
    interval = difference.interval
    if interval is None:
        return f"{difference.value:+.4f}", "-"
    return f"{difference.value:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}"


def shape_table(comparison: Comparison) -> Table:
    """Returns the numbers n, k, g, s, parameters, costs and routing of all shapes."""
    csv_rows = [_describe_shape(compared) for compared in comparison.shapes]
    header = [
        "shape",
        "n",
        "k",
        "g",
        "s",
        "parameters",
        "active",
        "FLOPs/token",
        "realized",
        "tokens",
    ]
    header += ["seconds", "load", "dropped", "finished"]
    rows = [
        [
            row["shape"],
            *(str(row[name]) for name in ("n", "k", "g", "s")),
            f"{row['total_parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['flops_per_token']:,}",
            _format_optional(row["realized_over_nominal"], "{:.3f}"),
            f"{row['tokens']:,}",
            _format_optional(row["training_seconds"], "{:.0f}"),
            _format_optional(row["load_imbalance"], "{:.2f}"),
            _format_optional(row["dropped_share"], "{:.2%}"),
            f"{row['finished']} of {row['arms']}",
        ]
        for row in csv_rows
    ]
    note = (
        "Costs and routing of the shapes, means over finished runs: realized FLOPs over nominal "
        "ones, seconds of training steps, load of the busiest expert over the mean, share of "
        "dropped tokens."
    )
    return Table(note, header, rows, csv_rows)


def _describe_shape(compared: ComparedShape) -> dict[str, Any]:
    shape = compared.shape
    layer = shape.layer
    nominal = matching.count_flops_per_token(shape.config)
    realized = mean_metric(shape, "realized_flops_per_token")
    return {
        "shape": shape.name,
        "n": layer.experts if layer else "-",
        "k": layer.active if layer else "-",
        "g": str(layer.granularity) if layer else "-",
        "s": str(layer.sparsity) if layer else "-",
        "total_parameters": accounting.count_parameters(shape.config).total,
        "active_parameters": accounting.count_active_parameters(shape.config).total,
        "flops_per_token": nominal,
        "realized_over_nominal": None if realized is None else realized / nominal,
        "tokens": matching.count_tokens(shape.config),
        "training_seconds": mean_metric(shape, "training_seconds"),
        "load_imbalance": mean_metric(shape, "load_imbalance"),
        "dropped_share": mean_metric(shape, "dropped_share"),
        "finished": len(shape.finished()),
        "arms": len(shape.runs),
    }


def mean_metric(shape: Shape, metric: str) -> float | None:
    """Returns the mean of a metric over the finished runs that have it; None if none has."""
    found = [run.metrics.get(metric) for run in shape.finished()]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _format_optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def pair_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file with every pair of shapes in both views."""
    rows = []
    for pair in comparisons.find_pairs(comparison.shapes)[:MAX_PAIRS]:
        row: dict[str, Any] = {"first": pair.first.shape.name, "second": pair.second.shape.name}
        for view, difference in pair.differences.items():
            interval = difference.interval if difference else None
            row |= {
                f"{view}_difference": difference.value if difference else None,
                f"{view}_interval_low": interval.low if interval else None,
                f"{view}_interval_high": interval.high if interval else None,
                f"{view}_verdict": difference.verdict if difference else statistics.MISSING,
            }
        rows.append({**row, "swaps": pair.is_swapped, "reversed": pair.is_reversed})
    return rows


def fit_table(law_fit: LawFit) -> Table:
    """Returns the coefficients of a fitted law."""
    fit = law_fit.fit
    assert fit is not None
    csv_rows: list[dict[str, Any]] = [
        {
            "coefficient": name,
            "value": value,
            "interval_low": law_fit.intervals[name].low,
            "interval_high": law_fit.intervals[name].high,
        }
        for name, value in fit.coefficients.items()
    ]
    numbers = ("value", "interval_low", "interval_high")
    rows = [[row["coefficient"], *(f"{row[key]:.5g}" for key in numbers)] for row in csv_rows]
    concerns = f" Warnings: {'; '.join(fit.warnings)}." if fit.warnings else ""
    note = (
        f"Fitted to {fit.num_runs} shapes from {len(fit.starts)} starts; root mean square of "
        f"log(predicted / measured) {fit.rmse:.5f}. Intervals: {BOOTSTRAP_LEVEL:.0%}, bootstrap "
        f"over shapes.{concerns}"
    )
    return Table(note, ["coefficient", "value", "low", "high"], rows, csv_rows)


# ---- arms ----------------------------------------------------------------------------------------


def unfinished_table(sweep: SweepRuns) -> Table | None:
    """Returns the arms that failed, diverged or have no result; None if there are none."""
    found = [run for run in sweep.runs if run.state != results.FINISHED]
    if not found:
        return None
    csv_rows: list[dict[str, Any]] = [
        {
            "arm": run.arm,
            "state": run.state,
            "reason": run.reason,
            "steps_done": run.metrics.get("steps_done"),
            "output": f"runs/{run.id}/output.txt",
        }
        for run in found
    ]
    rows = [
        [row["arm"], row["state"], row["reason"], str(row["steps_done"] or "-"), row["output"]]
        for row in csv_rows
    ]
    note = "Their losses are in no mean and no picture of this page."
    return Table(note, ["arm", "state", "reason", "steps", "output"], rows, csv_rows, left=5)


def arm_rows(sweep: SweepRuns, metric: str) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file with every arm."""
    return [
        {
            "arm": run.arm,
            "state": run.state,
            "learning_rate": run.rate if run.config else None,
            "seed": str(run.seed) if run.config else None,
            metric: run.metrics.get(metric),
            "reason": run.reason,
            "revision": run.revision,
            "id": run.id,
        }
        for run in sweep.runs
    ]


def other_table(sweep: SweepRuns, metric: str) -> Table | None:
    """Returns the results that are kept apart; None if there are none.

    A result of other code or data is shown beside the loss of the current run of its arm.
    """
    if not sweep.others:
        return None
    current = {run.arm: run.metrics.get(metric) for run in sweep.runs}
    csv_rows: list[dict[str, Any]] = []
    for run in sorted(sweep.others, key=lambda run: (run.apart_because, run.revision, run.arm)):
        assert run.config is not None
        csv_rows.append(
            {
                "why": run.apart_because,
                "revision": run.revision,
                "arm": run.arm or _describe_config(run, sweep.runs),
                "state": run.state,
                "learning_rate": run.rate,
                "seed": str(run.seed),
                "loss": run.metrics.get(metric),
                "loss_of_this_sweep": current.get(run.arm),
                "id": run.id,
            }
        )
    rows = [
        [
            *(str(row[name]) for name in ("why", "revision", "arm", "state")),
            f"{row['learning_rate']:g}",
            row["seed"],
            _format_optional(row["loss"], "{:.4f}"),
            _format_optional(row["loss_of_this_sweep"], "{:.4f}"),
        ]
        for row in csv_rows
    ]
    header = ["why", "revision", "arm", "state", "rate", "seed", "loss", "loss in this sweep"]
    note = "These results are in the same workdir. No mean, difference or picture contains them."
    return Table(note, header, rows, csv_rows, left=4)


def _describe_config(run: Run, arms: Sequence[Run]) -> str:
    """Returns the options in which a config differs from that of the closest arm."""
    assert run.config is not None
    options = to_flat_dict(run.config)
    differences: list[Mapping[str, Any]] = []
    for arm in arms:
        if arm.config is not None:
            values = to_flat_dict(arm.config)
            differences.append({k: v for k, v in options.items() if values[k] != v})
    closest = min(differences, key=len, default={})
    return "no arm: " + ", ".join(f"{name}={value}" for name, value in closest.items())
