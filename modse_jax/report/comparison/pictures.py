"""Pictures of paired differences, of the grid n x g, and of losses by learning rate.

Every picture has the rows of a CSV file with its numbers.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colors as matplotlib_colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from modse_jax.config.loading import to_flat_dict
from modse_jax.report import plot_style
from modse_jax.report.comparison import statistics
from modse_jax.report.comparison.comparisons import BEST, SHARED, VIEWS, ComparedShape, Comparison
from modse_jax.report.comparison.law_fits import LawFit
from modse_jax.report.comparison.metrics import METRICS
from modse_jax.report.comparison.shapes import Shape
from modse_jax.sweeps import matching

MAX_ROWS = 60  # shapes in a picture that has a row for each
MAX_PANELS = 24  # shapes in a picture that has a panel for each
PANEL_COLUMNS = 4

VIEW_LABELS = {BEST: "each at its best rate", SHARED: "all at the shared rate"}
VIEW_COLORS = {BEST: plot_style.COLOR_TRAIN, SHARED: plot_style.COLOR_VALIDATION}
VIEW_MARKERS = {BEST: "o", SHARED: "s"}

# Options that say which cell of the grid n x g a shape is.
CELL_OPTIONS = ("moe.num_experts", "moe.top_k", "moe.width")


class Picture(NamedTuple):
    """A picture of the report.

    Attributes:
        name: the name of its files, without the end.
        title: the heading above it.
        caption: what it shows, and how to read it.
        figure: the picture.
        rows: the numbers behind it; the names of the columns are those of the first row.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    rows: list[dict[str, Any]]


class Style(NamedTuple):
    """The color, marker and line of a shape in all pictures."""

    color: str
    marker: str
    line: Any


UNNAMED = Style("#777777", "o", "-")  # of a shape with a panel of its own that has no style


def style_shapes(comparison: Comparison) -> dict[str, Style]:
    """Returns styles for the shapes that pictures name: the baseline and the six lowest ones.

    If the group has no more than seven shapes, these are all. The others are drawn in gray.
    """
    baseline = comparison.group.baseline
    ranked = comparison.ranking(SHARED) or comparison.ranking(BEST)
    order = [c.shape for c in ranked] + [c.shape for c in comparison.shapes]
    names = list(dict.fromkeys(shape.name for shape in order if shape is not baseline))
    chosen = set(names[: len(plot_style.SERIES_COLORS)])
    styles = {baseline.name: Style(plot_style.COLOR_TEXT, "X", "-")}
    series = zip(
        [c.shape.name for c in comparison.shapes if c.shape.name in chosen],
        plot_style.SERIES_COLORS,
        plot_style.SERIES_MARKERS,
        plot_style.SERIES_LINES,
    )
    return styles | {name: Style(color, marker, line) for name, color, marker, line in series}


def title_of(comparison: Comparison, text: str) -> str:
    """Returns a title with the label of the group, if the sweep has several."""
    label = comparison.group.label
    return f"{text} ({label})" if label else text


def short_numbers() -> FuncFormatter:
    """Returns a formatter of ticks: 2, 0.5, 2e9."""

    def format_tick(value: float, _: Any) -> str:
        if value == 0 or 0.01 <= abs(value) < 1e4:
            return f"{value:g}"
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"

    return FuncFormatter(format_tick)


def outcome_cells(compared: ComparedShape, view: str) -> dict[str, Any]:
    """Returns the columns of a CSV file for a shape in a view."""
    outcome = compared.outcomes[view]
    mean, difference = outcome.mean, outcome.difference
    interval = difference.interval if difference else None
    return {
        "view": view,
        "learning_rate": outcome.rate,
        "mean_loss": mean.value if mean else None,
        "standard_deviation": mean.deviation if mean else None,
        "seeds": mean.num_seeds if mean else 0,
        "difference": difference.value if difference else None,
        "interval_low": interval.low if interval else None,
        "interval_high": interval.high if interval else None,
        "p_value": difference.p_value if difference else None,
        "paired_seeds": len(difference.seeds) if difference else 0,
        "verdict": outcome.verdict,
        "note": outcome.note,
    }


# ---- paired differences --------------------------------------------------------------------------


def plot_differences(comparison: Comparison, name: str) -> Picture | None:
    """Plots the paired differences to the baseline with their intervals, in both views."""
    found = [c for c in comparison.others if any(c.outcomes[view].difference for view in VIEWS)]
    if not found:
        return None
    found.sort(key=_difference_to_sort_by)
    shown = found[:MAX_ROWS]
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(shown) + 2.2))
    largest = 0.0
    for view, offset in ((BEST, 0.15), (SHARED, -0.15)):
        for row, compared in enumerate(reversed(shown)):
            difference = compared.outcomes[view].difference
            if difference is None:
                continue
            largest = max(largest, abs(difference.value))
            color = VIEW_COLORS[view]
            if difference.interval is not None:
                ends = [difference.interval.low, difference.interval.high]
                axes.plot(ends, [row + offset] * 2, color=color, lw=1.6, solid_capstyle="butt")
            is_definite = difference.verdict in statistics.DEFINITE
            axes.plot(
                difference.value,
                row + offset,
                VIEW_MARKERS[view],
                color=color,
                markerfacecolor=color if is_definite else "white",
                ms=7,
                zorder=3,
            )
    axes.axvline(0, color=plot_style.COLOR_TEXT, lw=1)
    limit = 3 * largest or 1.0
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -limit), min(high, limit))
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_yticks(range(len(shown)), [c.shape.name for c in reversed(shown)])
    axes.grid(axis="y", color=plot_style.COLOR_FAINT, lw=0.4)
    axes.set_axisbelow(True)
    axes.set(xlabel=f"difference to {comparison.group.baseline.name}, {METRICS[comparison.metric]}")
    axes.set_title(title_of(comparison, "Paired differences, lower is better"))
    _add_view_legend(axes, shown)
    rows = [
        {
            "shape": c.shape.name,
            "baseline": comparison.group.baseline.name,
            **outcome_cells(c, view),
        }
        for c in found
        for view in VIEWS
    ]
    hidden = f" The {len(found) - MAX_ROWS} with the highest loss are left out."
    caption = (
        f"Loss minus that of {comparison.group.baseline.name} with the same seed, mean over seeds. "
        f"Bars are {statistics.CONFIDENCE:.0%} t intervals; markers are filled if the interval "
        "excludes zero. Points without a bar have one seed. Bars may be cut off at the edge."
        f"{hidden if len(found) > MAX_ROWS else ''}"
    )
    return Picture(name, axes.get_title(), caption, figure, rows)


def _difference_to_sort_by(compared: ComparedShape) -> float:
    for view in (SHARED, BEST):
        difference = compared.outcomes[view].difference
        if difference is not None:
            return difference.value
    raise AssertionError("the shape has no difference")


def _add_view_legend(axes: Axes, shown: Sequence[ComparedShape]) -> None:
    handles = []
    for view in VIEWS:
        if any(c.outcomes[view].difference for c in shown):
            handle = axes.plot(
                [], [], VIEW_MARKERS[view], color=VIEW_COLORS[view], label=VIEW_LABELS[view]
            )
            handles += handle
    handles += axes.plot(
        [], [], "o", color="gray", markerfacecolor="white", label="not above noise"
    )
    axes.legend(
        handles=handles,
        frameon=False,
        ncols=3,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.4, -0.65 / (0.42 * len(shown) + 0.5)),
    )


# ---- the grid n x g ------------------------------------------------------------------------------


@dataclasses.dataclass
class Grid:
    """Shapes that differ only in the number of experts and in granularity.

    Attributes:
        options: the options, of those that differ between grids, that this one has.
        cells: {(n, g): shape}.
    """

    options: str
    cells: dict[tuple[int, Fraction], ComparedShape]

    @property
    def experts(self) -> list[int]:
        """Returns the values of n, in order."""
        return sorted({n for n, _ in self.cells})

    @property
    def granularities(self) -> list[Fraction]:
        """Returns the values of g, from the coarsest to the finest."""
        return sorted({g for _, g in self.cells}, reverse=True)


def find_grids(comparison: Comparison) -> list[Grid]:
    """Returns the grids of a group with at least two values of n and of g."""
    by_rest: dict[tuple[tuple[str, Any], ...], list[ComparedShape]] = collections.defaultdict(list)
    for compared in comparison.shapes:
        if compared.shape.layer is not None and len(compared.shape.layer.pools) == 1:
            options = to_flat_dict(matching.without_rates(compared.shape.config))
            rest = tuple((k, v) for k, v in options.items() if k not in CELL_OPTIONS)
            by_rest[rest].append(compared)
    found = []
    for rest, members in by_rest.items():
        grid = Grid("", {_cell_of(c.shape): c for c in members})
        if len(grid.experts) > 1 and len(grid.granularities) > 1:
            found.append((dict(rest), grid))
    for options, grid in found:
        others = [other for other, _ in found]
        names = [k for k in options if any(other[k] != options[k] for other in others)]
        grid.options = ", ".join(f"{name}={options[name]}" for name in names)
    return [grid for _, grid in found]


def _cell_of(shape: Shape) -> tuple[int, Fraction]:
    assert shape.layer is not None
    return shape.layer.experts, shape.layer.granularity


def plot_grid(comparison: Comparison, grid: Grid, name: str) -> Picture | None:
    """Plots the mean loss of every cell of a grid, in both views."""
    views = [v for v in VIEWS if any(c.outcomes[v].mean for c in grid.cells.values())]
    if not views:
        return None
    experts, granularities = grid.experts, grid.granularities
    losses = {view: _losses_of_cells(grid, view) for view in views}
    known = np.concatenate([values[np.isfinite(values)] for values in losses.values()])
    norm = matplotlib_colors.Normalize(known.min(), known.max())
    width = max(6.0, 0.95 * len(experts) + 2.6)
    height = 0.62 * len(granularities) + 1.5
    figure, axes_of_views = plt.subplots(
        len(views), 1, figsize=(width, height * len(views)), squeeze=False
    )
    for view, axes in zip(views, axes_of_views[:, 0]):
        image = axes.imshow(losses[view], cmap=plot_style.COLOR_MAP, aspect="auto", norm=norm)
        for (row, column), loss in np.ndenumerate(losses[view]):
            compared = grid.cells.get((experts[column], granularities[row]))
            _label_cell(axes, row, column, loss, compared, view, norm)
        axes.set_xticks(range(len(experts)), [str(n) for n in experts])
        axes.set_yticks(range(len(granularities)), [str(g) for g in granularities])
        axes.set(xlabel="n, experts", ylabel="g, width over dense", title=VIEW_LABELS[view])
        figure.colorbar(image, ax=axes, label=METRICS[comparison.metric].split(",")[0], pad=0.02)
    title = title_of(comparison, "Grid n x g" + (f": {grid.options}" if grid.options else ""))
    rows = [
        {"n": n, "g": str(g), "shape": c.shape.name, **outcome_cells(c, view)}
        for view in views
        for (n, g), c in grid.cells.items()
    ]
    caption = (
        f"Mean {METRICS[comparison.metric]}, by number of experts n and granularity g. The second "
        f"line is the paired difference to {comparison.group.baseline.name}: with * if it is above "
        "noise, with ? if one seed leaves noise unknown. Empty cells are not in the sweep or have "
        "no finished run."
    )
    missing = [VIEW_LABELS[view] for view in VIEWS if view not in views]
    if missing:
        caption += f" There is no picture of the cells {missing[0]}: no cell has one."
    return Picture(name, title, caption, figure, rows)


def _losses_of_cells(grid: Grid, view: str) -> np.ndarray:
    losses = np.full((len(grid.granularities), len(grid.experts)), np.nan)
    for (n, g), compared in grid.cells.items():
        mean = compared.outcomes[view].mean
        if mean is not None:
            losses[grid.granularities.index(g), grid.experts.index(n)] = mean.value
    return losses


def _label_cell(
    axes: Axes,
    row: int,
    column: int,
    loss: float,
    compared: ComparedShape | None,
    view: str,
    norm: matplotlib_colors.Normalize,
) -> None:
    if compared is None or not np.isfinite(loss):
        return
    text = f"{loss:.3f}"
    difference = compared.outcomes[view].difference
    if difference is not None:
        mark = {statistics.NOISE: "", statistics.ONE_SEED: "?"}.get(difference.verdict, "*")
        text += f"\n{difference.value:+.3f}{mark}"
    color = "black" if norm(loss) > 0.5 else "white"
    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


# ---- learning rates ------------------------------------------------------------------------------


def plot_rates(comparison: Comparison, name: str) -> Picture | None:
    """Plots the loss of every shape by learning rate, a panel for each shape.

    Returns:
        The picture; None if no shape has finished runs at two rates.
    """
    metric = comparison.metric
    by_shape = {c.shape.name: c.shape.losses(metric) for c in comparison.shapes}
    if all(len(losses) < 2 for losses in by_shape.values()):
        return None
    found = [c for c in comparison.shapes if by_shape[c.shape.name]]
    shown = found[:MAX_PANELS]
    styles = style_shapes(comparison)
    columns = min(PANEL_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(max(3.1 * columns, 6.5), 2.7 * lines + 0.7),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    means = {
        shape: {rate: float(np.mean(list(of_rate.values()))) for rate, of_rate in losses.items()}
        for shape, losses in by_shape.items()
    }
    every_loss = [
        loss for losses in by_shape.values() for r in losses.values() for loss in r.values()
    ]
    limits = _loss_limits(every_loss)
    for axes, compared in zip(grid.flat, shown):
        for other in means.values():
            axes.plot(list(other), list(other.values()), color=plot_style.COLOR_FAINT, lw=0.8)
        style = styles.get(compared.shape.name, UNNAMED)
        _draw_rates(axes, compared, by_shape[compared.shape.name], style, limits)
        if comparison.shared_rate is not None:
            axes.axvline(comparison.shared_rate, color=plot_style.COLOR_TEXT, lw=0.8, ls=":")
        axes.set_title(compared.shape.name, fontsize=9)
        axes.set_ylim(*limits)
    _label_rates(grid, by_shape)
    unit = METRICS[metric]
    label_panels(grid, len(shown), "peak learning rate", unit)
    rows = [
        {"shape": c.shape.name, "arm": run.arm, "learning_rate": run.rate, "seed": str(run.seed),
         "state": run.state, "loss": run.metrics.get(metric)}
        for c in found
        for run in c.shape.runs
    ]  # fmt: skip
    hidden = f" Only the first {MAX_PANELS} of {len(found)} shapes are drawn."
    caption = (
        f"{unit[0].upper()}{unit[1:]}, by learning rate: dots are seeds, the line joins their "
        "means, bars are standard deviations. A ring marks the best rate where at least three were "
        "tried, a cross a rate at which a run diverged, the dotted line the shared rate. Gray "
        "lines are the other shapes. Losses far above the others may lie outside."
        f"{hidden if len(found) > MAX_PANELS else ''}"
    )
    title = title_of(comparison, "Learning rates")
    return Picture(name, title, caption, figure, rows)


def _draw_rates(
    axes: Axes,
    compared: ComparedShape,
    losses: Mapping[float, Mapping[Any, float]],
    style: Style,
    limits: tuple[float, float],
) -> None:
    means = {rate: statistics.mean(of_rate.values()) for rate, of_rate in losses.items()}
    values = {rate: found.value for rate, found in means.items() if found is not None}
    axes.plot(list(values), list(values.values()), color=style.color, ls=style.line, lw=1.6)
    for rate, found in means.items():
        if found is not None and found.deviation is not None:
            axes.errorbar(
                rate, found.value, found.deviation, color=style.color, capsize=3, lw=1.2, zorder=2
            )
        for loss in losses[rate].values():
            axes.plot(rate, loss, style.marker, color=style.color, ms=4, alpha=0.8, zorder=3)
    best = compared.outcomes[BEST].rate
    if best in values:
        axes.plot(
            best, values[best], "o", ms=13, markerfacecolor="none", color=plot_style.COLOR_TEXT
        )
    for rate in sorted(compared.shape.diverged_rates()):
        height = limits[0] + 0.95 * (limits[1] - limits[0])
        axes.plot(rate, height, "x", color=plot_style.COLOR_TEXT, ms=8, mew=2)


def _loss_limits(losses: Sequence[float]) -> tuple[float, float]:
    """Returns limits of an axis that has all losses but those far above most of them."""
    low = min(losses)
    spread = float(np.quantile(losses, 0.75)) - low
    high = min(max(losses), low + 4 * spread) if spread else max(losses)
    margin = 0.08 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + 2 * margin


def label_panels(grid: np.ndarray, shown: int, horizontal: str, vertical: str) -> None:
    """Labels the outer axes of panels that share their axes, and hides the panels that are empty.

    Args:
        grid: the panels, in rows.
        shown: the number of panels that are not empty.
        horizontal: the label of the horizontal axes.
        vertical: the label of the vertical axes.
    """
    columns = grid.shape[1]
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < shown)
        if index + columns >= shown:  # the lowest panel of its column
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel(horizontal, fontsize=9)
        if index % columns == 0:
            axes.set_ylabel(vertical, fontsize=9)


def _label_rates(grid: np.ndarray, by_shape: Mapping) -> None:
    """Makes the axis of rates logarithmic and labels every rate."""
    rates = sorted({rate for losses in by_shape.values() for rate in losses})
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45, fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
        axes.tick_params(axis="y", labelsize=8)


# ---- fits of laws --------------------------------------------------------------------------------


def plot_fits(fitted: Sequence[LawFit], view: str, name: str) -> Picture:
    """Plots the losses that fitted laws predict against the measured ones, a panel for each law."""
    figure, grid = plt.subplots(1, len(fitted), figsize=(4.6 * len(fitted), 4.4), squeeze=False)
    rows = []
    for axes, law_fit in zip(grid[0], fitted):
        measured = [compared.mean_loss(view) for compared in law_fit.shapes]
        axes.plot(measured, law_fit.predicted, "o", color=plot_style.COLOR_TRAIN, ms=5)
        ends = [min(*measured, *law_fit.predicted), max(*measured, *law_fit.predicted)]
        axes.plot(ends, ends, color=plot_style.COLOR_TEXT, lw=1, ls="--")
        axes.set(xlabel="measured loss", ylabel="predicted loss")
        axes.set_title(law_fit.name, fontsize=10)
        rows += [
            {"law": law_fit.name, "shape": c.shape.name, "measured": loss, "predicted": predicted}
            for c, loss, predicted in zip(law_fit.shapes, measured, law_fit.predicted)
        ]
    caption = "A dot for each shape that was fitted; on the dashed line, the law is exact."
    title = f"Predicted and measured losses, {VIEW_LABELS[view]}"
    return Picture(name, title, caption, figure, rows)
