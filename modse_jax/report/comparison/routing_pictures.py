"""Pictures of the load of experts and of dropped tokens, for every shape with experts.

Legend: W windows of steps, L layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from modse_jax.report import plot_style
from modse_jax.report.comparison import pictures
from modse_jax.report.comparison.comparisons import BEST, SHARED, ComparedShape, Comparison
from modse_jax.report.comparison.pictures import MAX_PANELS, MAX_ROWS, PANEL_COLUMNS, Picture
from modse_jax.report.comparison.run_curves import Routing
from modse_jax.report.comparison.runs import Run

MAX_LABELED_LAYERS = 8


class RoutedShape(NamedTuple):
    """A shape with experts, and its runs with routing logs at one learning rate."""

    name: str
    rate: float
    runs: list[tuple[Run, Routing]]


def find_routed_shapes(
    comparison: Comparison, routing: Mapping[str, Routing | None]
) -> list[RoutedShape]:
    """Returns the shapes with routing logs: at the shared rate, or else at their best rate.

    Args:
        comparison: the shapes of a group.
        routing: {id of a run: its routing}.
    """
    found = []
    for compared in comparison.shapes:
        rate = _choose_rate(compared)
        if rate is None:
            continue
        runs = [(run, routing.get(run.id)) for run in compared.shape.finished(rate)]
        logged = [(run, log) for run, log in runs if log is not None]
        if logged:
            found.append(RoutedShape(compared.shape.name, rate, logged))
    return found


def _choose_rate(compared: ComparedShape) -> float | None:
    shared = compared.outcomes[SHARED].rate
    return compared.outcomes[BEST].rate if shared is None else shared


def plot_load(comparison: Comparison, shapes: Sequence[RoutedShape], name: str) -> Picture | None:
    """Plots the load imbalance and the dropped share of whole runs, a row for each shape."""
    if not shapes:
        return None
    shown = shapes[:MAX_ROWS]
    figure, (load, drops) = plt.subplots(1, 2, figsize=(10.5, 0.36 * len(shown) + 2.3), sharey=True)
    for row, shape in enumerate(reversed(shown)):
        for run, log in shape.runs:
            load.plot(run.metrics["load_imbalance"], row, "o", color=plot_style.COLOR_TRAIN)
            drops.plot(
                100 * run.metrics["dropped_share"], row + 0.12, "o", color=plot_style.COLOR_TRAIN
            )
            if log.validation_dropped is not None:
                drops.plot(
                    100 * log.validation_dropped, row - 0.12, "D", color=plot_style.COLOR_VALIDATION
                )
    load.axvline(1, color=plot_style.COLOR_TEXT, lw=1, ls="--")
    load.set_xlim(0.98, None)
    drops.set_xlim(-0.5, max(5.0, drops.get_xlim()[1]))
    load.set_ylim(-0.6, len(shown) - 0.4)
    load.set_yticks(range(len(shown)), [shape.name for shape in reversed(shown)])
    for axes in (load, drops):
        axes.grid(axis="y", color=plot_style.COLOR_FAINT, lw=0.4)
        axes.set_axisbelow(True)
    load.set(xlabel="busiest expert over mean (1 = even)", title="Load imbalance, training")
    drops.set(xlabel="routed tokens over capacity, %", title="Dropped tokens")
    drops.plot([], [], "o", color=plot_style.COLOR_TRAIN, label="training")
    drops.plot([], [], "D", color=plot_style.COLOR_VALIDATION, label="last validation")
    below = -0.7 / (0.36 * len(shown) + 0.6)
    drops.legend(
        frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, below)
    )
    rows = [
        {
            "shape": shape.name,
            "arm": run.arm,
            "learning_rate": shape.rate,
            "seed": str(run.seed),
            "load_imbalance": run.metrics["load_imbalance"],
            "dropped_share": run.metrics["dropped_share"],
            "validation_dropped_share": log.validation_dropped,
        }
        for shape in shapes
        for run, log in shape.runs
    ]
    hidden = f" Only the first {MAX_ROWS} of {len(shapes)} shapes are drawn."
    caption = (
        "A dot for each seed. Left: tokens of the busiest expert over the mean, summed over all "
        "logged steps, of the layer where it is largest. Right: share of routed tokens over the "
        "capacity; without a capacity it is zero. Runs are those at the shared rate, or at the "
        f"best rate of the shape.{hidden if len(shapes) > MAX_ROWS else ''}"
    )
    title = pictures.title_of(comparison, "Load of the experts and dropped tokens")
    return Picture(name, title, caption, figure, rows)


def plot_load_over_training(
    comparison: Comparison, shapes: Sequence[RoutedShape], name: str
) -> Picture | None:
    """Plots the load imbalance of every layer over training, a panel for each shape."""
    return _plot_panels(
        comparison,
        shapes,
        name,
        title="Load over training",
        label="busiest expert over mean",
        values=lambda log: log.load_WL,
        even=1.0,
        caption=(
            "Tokens of the busiest expert over the mean of its pool, by layer, mean over seeds; 1 "
            "is even. "
            "Each point sums the logged steps of a tenth of training, so few logged tokens make it "
            "larger: even random routing of few tokens is uneven."
        ),
    )


def plot_drops_over_training(
    comparison: Comparison, shapes: Sequence[RoutedShape], name: str
) -> Picture | None:
    """Plots the dropped share over training of the shapes that drop tokens."""
    dropping = [s for s in shapes if any(log.dropped_W.any() for _, log in s.runs)]
    return _plot_panels(
        comparison,
        dropping,
        name,
        title="Dropped tokens over training",
        label="routed tokens over capacity, %",
        values=lambda log: 100 * log.dropped_W[:, None],
        even=0.0,
        caption=(
            "Share of routed tokens over the capacity, of all layers, mean over seeds. Each point "
            "sums the logged steps of a tenth of training. Shapes that drop nothing are left out."
        ),
    )


def _plot_panels(
    comparison: Comparison,
    shapes: Sequence[RoutedShape],
    name: str,
    *,
    title: str,
    label: str,
    values: Callable[[Routing], np.ndarray],
    even: float,
    caption: str,
) -> Picture | None:
    """Plots values by window over training, a panel for each shape.

    Args:
        comparison: the shapes of a group.
        shapes: the shapes to plot.
        name: the name of the picture.
        title: its title.
        label: the label of the vertical axis.
        values: returns the values of a run, [windows, lines].
        even: the value to mark by a dashed line.
        caption: the caption.
    """
    if not shapes:
        return None
    shown = shapes[:MAX_PANELS]
    columns = min(PANEL_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(max(3.1 * columns, 6.5), 2.4 * lines + 0.9),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    rows = []
    for index, shape in enumerate(shapes):
        axes = grid.flat[index] if index < len(shown) else None
        rows += _draw_panel(axes, shape, values, label)
    for axes in grid.flat:
        axes.axhline(even, color=plot_style.COLOR_TEXT, lw=0.8, ls="--")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(pictures.short_numbers())
    pictures.label_panels(grid, len(shown), "tokens", label)
    hidden = f" Only the first {MAX_PANELS} of {len(shapes)} shapes are drawn."
    caption += hidden if len(shapes) > MAX_PANELS else ""
    return Picture(name, pictures.title_of(comparison, title), caption, figure, rows)


def _draw_panel(
    axes: Axes | None, shape: RoutedShape, values: Callable[[Routing], np.ndarray], label: str
) -> list[dict[str, Any]]:
    """Draws the lines of a shape, if there is a panel for it, and returns their numbers."""
    shortest = min(len(log.tokens_W) for _, log in shape.runs)
    tokens = shape.runs[0][1].tokens_W[:shortest]
    means = np.mean([values(log)[:shortest] for _, log in shape.runs], axis=0)
    num_lines = means.shape[1]
    if axes is not None:
        for line, color in enumerate(plot_style.shades(num_lines)):
            is_labeled = 1 < num_lines <= MAX_LABELED_LAYERS
            text = f"layer {line}" if is_labeled else None
            axes.plot(tokens, means[:, line], color=color, lw=1.5, marker=".", label=text)
        if 1 < num_lines <= MAX_LABELED_LAYERS:
            axes.legend(frameon=False, fontsize=7, ncols=2)
        axes.set_title(shape.name, fontsize=9)
    return [
        {
            "shape": shape.name,
            "learning_rate": shape.rate,
            "tokens": int(count),
            "layer": line if num_lines > 1 else "all",
            label: float(means[window, line]),
        }
        for window, count in enumerate(tokens)
        for line in range(num_lines)
    ]
