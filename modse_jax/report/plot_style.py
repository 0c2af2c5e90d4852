"""The common style of all figures, and helpers for axes that show experts."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")  # figures are only saved, so no display is needed

# Colors that can be distinguished with color blindness (Okabe and Ito).
COLOR_TEXT = "#222222"
COLOR_TRAIN = "#0072B2"
COLOR_VALIDATION = "#D55E00"
COLOR_EXTRA = "#009E73"
COLOR_FAINT = "#B8B8B8"
COLOR_MAP = "cividis"

# For up to six series that have no order. Each also has its own marker and line.
SERIES_COLORS = (COLOR_TRAIN, COLOR_VALIDATION, COLOR_EXTRA, "#CC79A7", "#E69F00", "#56B4E9")
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P")
SERIES_LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))

DPI = 130
EXPERT_LABEL = "expert, by hidden width"

PLACEMENT_LABELS = {
    "in_use": "as this run placed them",
    "pairs": "pairs, E/2 devices",
    "sorted": "neighbours in size, E/2 devices",
    "one_per_device": "one expert per device",
    "columns": "a slice of every expert",
}


class CaptionedFigure(NamedTuple):
    """A figure, and the sentence that the report prints above it."""

    figure: Figure
    caption: str


def save_figure(path: pathlib.Path, figure: Figure) -> None:
    """Saves a figure in the common style, and frees its memory."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def shades(count: int, darkest: float = 0.05, brightest: float = 0.9) -> np.ndarray:
    """Returns evenly spaced colors of the color map, [count, 4]."""
    return plt.get_cmap(COLOR_MAP)(np.linspace(darkest, brightest, count))


def order_by_width(widths: Sequence[int]) -> np.ndarray:
    """Returns the numbers of the experts, from the widest to the narrowest."""
    return np.argsort([-width for width in widths], kind="stable")


def width_labels(widths: Sequence[int], order: np.ndarray) -> list[str]:
    """Returns the tick labels of an axis of experts: their widths, in the given order."""
    return [str(widths[expert]) for expert in order]


def label_experts(axes: Axes, positions: Sequence[float] | np.ndarray, labels: list[str]) -> None:
    """Labels the bars of experts on the horizontal axis; more than 12 labels vertically."""
    axes.set_xticks(positions, labels, rotation=90 if len(labels) > 12 else 0)
