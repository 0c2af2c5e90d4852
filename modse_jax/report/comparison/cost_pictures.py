"""Pictures of the loss against tokens, nominal FLOPs, realized FLOPs and wall clock."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from modse_jax.report import plot_style
from modse_jax.report.comparison import pictures, run_curves
from modse_jax.report.comparison.comparisons import ComparedShape, Comparison
from modse_jax.report.comparison.metrics import METRICS
from modse_jax.report.comparison.pictures import Picture, Style
from modse_jax.report.comparison.run_curves import COSTS, Curve
from modse_jax.report.comparison.runs import Run

SMOOTHED_SHARE = 0.2  # of the logged steps of a run, over which training losses are averaged
FIRST_SHARE = 0.2  # of training, which is left out

GRAY = Style(plot_style.COLOR_FAINT, "", "-")


class ShapeCurves(NamedTuple):
    """The losses of a shape at one learning rate, as means over seeds.

    Attributes:
        training: training losses, smoothed.
        validation: validation losses; None if there are none.
        extremes: (lowest, highest) validation loss of any seed; None for one seed.
    """

    training: Curve
    validation: Curve | None
    extremes: tuple[np.ndarray, np.ndarray] | None


def plot_costs(
    comparison: Comparison, view: str, curves: Mapping[str, Mapping[str, Curve]], name: str
) -> Picture | None:
    """Plots the losses of shapes in a view against all costs.

    Args:
        comparison: the shapes of a group.
        view: the view, which decides the learning rate of each shape.
        curves: {id of a run: its curves}.
        name: the name of the picture.
    """
    found = {}
    for compared in comparison.shapes:
        runs = _runs_with_curves(compared, view, curves)
        if runs:
            found[compared.shape.name] = _mean_over_seeds([curves[run.id] for run in runs])
    if not found:
        return None
    styles = pictures.style_shapes(comparison)
    order = sorted(found, key=lambda shape: shape in styles)  # gray ones first, below the others
    panels: list[Any] = [
        ["legend", "legend"],
        ["tokens", "nominal_flops"],
        ["realized_flops", "seconds"],
    ]
    figure, axes_by_name = plt.subplot_mosaic(
        panels, figsize=(11, 9), gridspec_kw={"height_ratios": [0.1, 1, 1]}
    )
    limits = _limits(list(found.values()))
    unit = METRICS[comparison.metric].replace("validation loss", "loss")
    for cost, label in COSTS.items():
        axes = axes_by_name[cost]
        for shape in order:
            _draw(axes, found[shape], cost, styles.get(shape, GRAY))
        axes.set(xlabel=label, ylabel=unit, xscale="log", ylim=limits)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(pictures.short_numbers())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=plot_style.COLOR_FAINT, lw=0.4)
    named = [shape for shape in found if shape in styles]
    _add_legend(axes_by_name["legend"], named, styles, len(found))
    title = pictures.title_of(comparison, f"Loss against four costs, {pictures.VIEW_LABELS[view]}")
    rows = [
        row
        for compared in comparison.shapes
        for run in _runs_with_curves(compared, view, curves)
        for row in _rows_of_run(compared.shape.name, run, curves[run.id])
    ]
    caption = (
        f"Lines are training losses, each point the mean over the last {SMOOTHED_SHARE:.0%} of the "
        "logged steps and over seeds; markers are validation losses, with bars from the lowest to "
        f"the highest seed. The first {FIRST_SHARE:.0%} of training is left out. Realized FLOPs "
        "count the widths of the experts that were chosen; wall clock is that of training steps on "
        "the machine of the sweep, without compilation, validation and saving."
    )
    return Picture(name, title, caption, figure, rows)


def _runs_with_curves(
    compared: ComparedShape, view: str, curves: Mapping[str, Mapping[str, Curve]]
) -> list[Run]:
    rate = compared.outcomes[view].rate
    if rate is None:
        return []
    return [run for run in compared.shape.finished(rate) if curves.get(run.id)]


def _mean_over_seeds(curves: Sequence[Mapping[str, Curve]]) -> ShapeCurves:
    smoothed = []
    for of_run in curves:
        training = of_run["train"]
        width = max(1, round(SMOOTHED_SHARE * len(training.losses)))
        losses = run_curves.smooth(training.losses, width)
        smoothed.append(training._replace(losses=losses))
    validations = [of_run["validation"] for of_run in curves if len(of_run["validation"].steps)]
    validation = run_curves.mean_curve(validations) if validations else None
    extremes = None
    if validation is not None and len(validations) > 1:
        losses = np.array(
            [c.losses[np.searchsorted(c.steps, validation.steps)] for c in validations]
        )
        extremes = losses.min(axis=0), losses.max(axis=0)
    return ShapeCurves(run_curves.mean_curve(smoothed), validation, extremes)


def _draw(axes: Axes, curves: ShapeCurves, cost: str, style: Style) -> None:
    training, validation, extremes = curves
    kept = training.steps >= FIRST_SHARE * training.steps[-1]
    axes.plot(
        training.costs[cost][kept],
        training.losses[kept],
        color=style.color,
        ls=style.line,
        lw=1.6 if style is not GRAY else 0.8,
    )
    if validation is None or style is GRAY:
        return
    axes.plot(
        validation.costs[cost],
        validation.losses,
        style.marker,
        color=style.color,
        ms=7,
        mec="white",
    )
    if extremes is not None:
        axes.vlines(validation.costs[cost], *extremes, color=style.color, lw=1.2)


def _limits(found: Sequence[ShapeCurves]) -> tuple[float, float]:
    """Returns limits of the loss without its fast fall at the start."""
    losses, early = [], []
    for training, validation, _ in found:
        kept = training.losses[training.steps >= FIRST_SHARE * training.steps[-1]]
        known = kept[np.isfinite(kept)]
        losses += known.tolist()
        early += known[:1].tolist()
        if validation is not None:
            losses += validation.losses[np.isfinite(validation.losses)].tolist()
    if not losses:
        return 0.0, 1.0
    low, high = min(losses), float(np.median(early)) if early else max(losses)
    high = max(high, low + 1e-3)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _add_legend(axes: Axes, shapes: Sequence[str], styles: Mapping[str, Style], count: int) -> None:
    """Fills a panel with the legend of all others.

    Args:
        axes: the panel.
        shapes: the shapes that have a style.
        styles: the styles.
        count: the number of all shapes that are drawn.
    """
    handles = []
    for shape in shapes:
        color, marker, line = styles[shape]
        handles.append(Line2D([], [], color=color, ls=line, marker=marker, label=shape, lw=1.6))
    if count > len(shapes):
        label = f"{count - len(shapes)} other shapes"
        handles.append(Line2D([], [], color=GRAY.color, lw=0.8, label=label))
    axes.axis("off")
    axes.legend(handles=handles, frameon=False, ncols=4, loc="center", handlelength=3.5)


def _rows_of_run(shape: str, run: Run, curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    return [
        {
            "shape": shape,
            "arm": run.arm,
            "learning_rate": run.rate,
            "seed": str(run.seed),
            "split": split,
            "step": int(step),
            "loss": float(loss),
            **{cost: float(curve.costs[cost][i]) for cost in COSTS},
        }
        for split, curve in curves.items()
        for i, (step, loss) in enumerate(zip(curve.steps, curve.losses))
    ]
