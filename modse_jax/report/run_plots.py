"""Figures drawn from the logs of a run: loss, load of the experts, balance and stragglers.

See analysis_plots.py for the figures that need a checkpoint.
"""

from collections.abc import Iterable

import numpy as np
from matplotlib import pyplot as plt

from modse_jax.moe.layer_options import Pool
from modse_jax.report import plot_style
from modse_jax.report.plot_style import CaptionedFigure

MAX_LABELED_EXPERTS = 20  # in a heat map
MAX_LABELED_BARS = 32
MAX_LABELED_LAYERS = 12


def plot_loss(rows: list[dict]) -> CaptionedFigure:
    """Plots the cross-entropy of training and validation over the steps.

    Args:
        rows: The lines of metrics.jsonl.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    train = [r for r in rows if r["split"] == "train" and r["bits_per_byte"] is not None]
    validation = [r for r in rows if r["split"] == "validation" and r["bits_per_byte"] is not None]
    train_bits = [row["bits_per_byte"] for row in train]
    validation_bits = [row["bits_per_byte"] for row in validation]
    axes.plot(
        [row["step"] for row in train],
        train_bits,
        color=plot_style.COLOR_TRAIN,
        lw=1.5,
        label="training",
    )
    if validation:
        axes.plot(
            [row["step"] for row in validation],
            validation_bits,
            "o",
            ls="-" if len(validation) > 1 else "",
            color=plot_style.COLOR_VALIDATION,
            label=f"validation, last {validation_bits[-1]:.3f}",
        )
    if train_bits + validation_bits:
        axes.set_ylim(0.9 * min(train_bits + validation_bits), None)
    axes.set(
        xlabel="step", ylabel="bits per byte", title="Cross-entropy, auxiliary losses left out"
    )
    axes.legend(frameon=False)
    caption = "Cross-entropy in bits per byte of text, which does not depend on the tokenizer."
    return CaptionedFigure(figure, caption)


def plot_validation_sets(rows: list[dict]) -> CaptionedFigure:
    """Plots the loss of every validation set, and their macro-average.

    Args:
        rows: Lines of metrics.jsonl that have "sets".
    """
    last = rows[-1]
    steps = [row["step"] for row in rows]
    line_style = "-" if len(rows) > 1 else ""
    figure, axes = plt.subplots(figsize=(8.5, 0.22 * len(last["sets"]) + 3.6))
    for name, color in zip(last["sets"], plot_style.shades(len(last["sets"]))):
        losses = _known_values(row["sets"][name]["loss"] for row in rows)
        label = f"{name} {losses[-1]:.3f}"
        axes.plot(steps, losses, ".", ls=line_style, color=color, lw=1.2, label=label)
    macro_losses = _known_values(row["macro_loss"] for row in rows)
    axes.plot(
        steps,
        macro_losses,
        "o",
        ls=line_style,
        color=plot_style.COLOR_VALIDATION,
        lw=2.4,
        label=f"macro-average {macro_losses[-1]:.3f}",
    )
    axes.set(xlabel="step", ylabel="nats per token", title="Loss of every validation set")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    caption = (
        "Cross-entropy of every validation set, and its unweighted mean over the sets (the "
        "macro-average); the last values are in the legend."
    )
    return CaptionedFigure(figure, caption)


def _known_values(values: Iterable[float | None]) -> np.ndarray:
    """Returns numbers of a log as floats. None becomes NaN, which is not drawn."""
    return np.array(list(values), float)


def plot_load_heatmap(
    layers: list[dict], widths: tuple[int, ...], pools: tuple[Pool, ...], when: str
) -> CaptionedFigure:
    """Plots the load of every expert in every layer: its tokens over an even share of its pool's.

    Args:
        layers: The lines of routing.jsonl of one step, one per layer.
        widths: Hidden widths of the experts.
        pools: The pools of experts.
        when: Split and step, such as "validation, step 100", for the title.
    """
    order = plot_style.order_by_width(widths)
    counts = np.array([layer["tokens_per_expert"] for layer in layers], float)[:, order]
    even = counts.sum(axis=1, keepdims=True) * even_shares(pools)[order]
    load = counts / even
    brightest = max(2.0, load.max())
    width = max(5.5, 0.75 * min(len(widths), MAX_LABELED_EXPERTS) + 2)
    height = 0.5 * len(layers) + 2.2
    figure, axes = plt.subplots(figsize=(width, height))
    image = axes.imshow(load, cmap=plot_style.COLOR_MAP, aspect="auto", vmin=0, vmax=brightest)
    if len(widths) <= MAX_LABELED_EXPERTS:
        for (layer, expert), value in np.ndenumerate(load):
            axes.text(
                expert,
                layer,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 0.55 * brightest else "black",
            )
        axes.set_xticks(range(len(widths)), plot_style.width_labels(widths, order))
    axes.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set(
        xlabel=plot_style.EXPERT_LABEL,
        ylabel="layer",
        title=f"Tokens per expert over the even share ({when})",
    )
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    caption = (
        "Load of every expert in every layer; 1 is an even share of the tokens of its pool. "
        "Experts from the widest to the narrowest."
    )
    return CaptionedFigure(figure, caption)


def even_shares(pools: tuple[Pool, ...]) -> np.ndarray:
    """Returns each expert's share of the routed tokens if every pool is evenly loaded, [E]."""
    top_k = sum(pool.top_k for pool in pools)
    shares = [np.full(pool.num_experts, pool.top_k / pool.num_experts / top_k) for pool in pools]
    return np.concatenate(shares)


def plot_load_by_width(
    layers: list[dict], widths: tuple[int, ...], pools: tuple[Pool, ...], when: str
) -> CaptionedFigure:
    """Plots the share of routed tokens of each expert, summed over the layers.

    See `plot_load_heatmap` for the arguments.
    """
    order = plot_style.order_by_width(widths)
    counts = [layer["tokens_per_expert_by_choice"] for layer in layers]
    counts_KE = np.array(counts, float).sum(axis=0)[:, order]
    percent_KE = 100 * counts_KE / counts_KE.sum()
    figure, axes = plt.subplots(figsize=(7.5, 4.0))
    bottom_E = np.zeros(len(widths))
    for choice, color in enumerate(plot_style.shades(len(percent_KE), 0.15)):
        axes.bar(
            range(len(widths)),
            percent_KE[choice],
            bottom=bottom_E,
            color=color,
            width=0.8,
            label=f"choice {choice + 1}",
        )
        bottom_E += percent_KE[choice]
    axes.stairs(
        100 * even_shares(pools)[order],
        np.arange(len(widths) + 1) - 0.5,
        baseline=None,
        color=plot_style.COLOR_TEXT,
        lw=1,
        ls="--",
        label="even share of a pool" if len(pools) > 1 else "even share",
    )
    if len(widths) <= MAX_LABELED_BARS:
        axes.set_xticks(range(len(widths)), plot_style.width_labels(widths, order))
    axes.set(
        xlabel=plot_style.EXPERT_LABEL,
        ylabel="share of routed tokens, %",
        title=f"Expert load by width, all layers ({when})",
    )
    axes.set_ylim(0, 1.25 * bottom_E.max())
    axes.legend(frameon=False, ncols=min(4, len(percent_KE) + 1))
    caption = "Share of routed tokens per expert, summed over layers, split by choice rank."
    return CaptionedFigure(figure, caption)


def plot_balance(layers: list[dict]) -> CaptionedFigure:
    """Plots the load imbalance (max/mean) of each layer over training.

    Args:
        layers: All lines of routing.jsonl.
    """
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    train = [layer for layer in layers if layer["split"] == "train"]
    numbers = sorted({layer["layer"] for layer in train})
    is_labeled = 0 < len(numbers) <= MAX_LABELED_LAYERS
    for number, color in zip(numbers, plot_style.shades(max(len(numbers), 1))):
        of_layer = [layer for layer in train if layer["layer"] == number]
        axes.plot(
            [layer["step"] for layer in of_layer],
            [layer["max_over_mean"] for layer in of_layer],
            color=color,
            lw=1.3,
            label=f"layer {number}" if is_labeled else None,
        )
    axes.axhline(1, color=plot_style.COLOR_TEXT, lw=1, ls="--")
    axes.set(
        xlabel="step", ylabel="busiest expert over mean", title="Imbalance of each layer (1 = even)"
    )
    if is_labeled:
        axes.legend(frameon=False, ncols=2)
    caption = "Tokens of the busiest expert over the mean, per layer, in the logged steps."
    return CaptionedFigure(figure, caption)


def plot_straggler(layers: list[dict]) -> CaptionedFigure:
    """Plots the straggler factor of each placement over training, as a mean over the layers.

    A straggler factor is the work of the most loaded device over the mean, for one way to place
    the experts on devices.

    Args:
        layers: All lines of routing.jsonl.
    """
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    train = [layer for layer in layers if layer["split"] == "train"]
    steps = sorted({layer["step"] for layer in train})
    by_step = [
        list_straggler_factors([layer for layer in train if layer["step"] == step])
        for step in steps
    ]
    placements = list(by_step[0]) if by_step else []
    colors = plot_style.shades(len(plot_style.PLACEMENT_LABELS))
    for placement, color in zip(placements, colors):
        axes.plot(
            steps,
            [np.mean(factors[placement]) for factors in by_step],
            color=color,
            lw=1.3,
            label=plot_style.PLACEMENT_LABELS[placement],
        )
    axes.set(
        xlabel="step",
        ylabel="busiest device over mean",
        title="Straggler factor along an expert axis: tokens x width",
    )
    axes.set_ylim(0.95, None)
    if placements:
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3
        )
    caption = (
        "Work of the busiest device of an expert axis over the mean, were the whole batch its own; "
        "mean of the layers."
    )
    return CaptionedFigure(figure, caption)


def list_straggler_factors(layers: list[dict]) -> dict[str, list[float]]:
    """Returns {placement: straggler factor of each layer} of one step.

    Args:
        layers: The lines of routing.jsonl of the step, one per layer.
    """
    known = layers[0]["straggler"]
    return {
        placement: [layer["straggler"][placement] for layer in layers]
        for placement in plot_style.PLACEMENT_LABELS
        if placement in known
    }
