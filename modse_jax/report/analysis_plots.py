"""Figures of the paper's routing analyses of a checkpoint.

See routing_statistics.py for the numbers, and run_plots.py for figures from the logs of a run.

Legend: Y layers, K choice ranks (0 is the largest gate), E experts, S sources (datasets).
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from modse_jax.moe.layer_options import Pool
from modse_jax.report import plot_style, routing_statistics
from modse_jax.report.routing_statistics import Counts, Trace

MAX_LABELED_EXPERTS = 20
RANK_COLORS = (
    plot_style.COLOR_TRAIN,
    plot_style.COLOR_VALIDATION,
    plot_style.COLOR_TEXT,
    plot_style.COLOR_EXTRA,
)
RANK_MARKERS = "os^D"
STEP_LINES = ("--", "-")  # line styles of the earlier and of the analyzed checkpoint


def plot_tokens_per_expert(counts_by_step: dict[str, Counts]) -> Figure:
    """Plots the number of tokens of each expert (MoDSE, Figure 3), in one chart per step.

    The experts with the most and the fewest tokens have their own colors.

    Args:
        counts_by_step: {title of the chart, such as "step 100": tokens per expert}.
    """
    num_steps = len(counts_by_step)
    figure, axes_grid = plt.subplots(1, num_steps, figsize=(5.2 * num_steps, 3.8), squeeze=False)
    for axes, (name, counts) in zip(axes_grid[0], counts_by_step.items()):
        order = plot_style.order_by_width(counts.widths)
        tokens_E = routing_statistics.tokens_per_expert(counts)[order]
        colors = np.array([plot_style.COLOR_TRAIN] * len(order))
        colors[tokens_E.argmax()] = plot_style.COLOR_VALIDATION
        colors[tokens_E.argmin()] = plot_style.COLOR_TEXT
        axes.bar(range(len(order)), tokens_E, color=colors)
        labels = plot_style.width_labels(counts.widths, order)
        plot_style.label_experts(axes, range(len(order)), labels)
        imbalance = tokens_E.max() / max(tokens_E.min(), 1)
        axes.set(
            xlabel=plot_style.EXPERT_LABEL,
            ylabel="tokens, all layers and choices",
            title=f"{name}: max/min {imbalance:.3f}",
        )
    return figure


def plot_max_over_min(counts_by_step: dict[str, Counts], pools: Sequence[Pool]) -> Figure:
    """Plots the most over the fewest tokens of an expert of a pool, by layer and choice rank.

    These are the numbers of MoDSE, Tables 7 and 8.

    Args:
        counts_by_step: {label, such as "step 100": tokens per expert}, at most two.
        pools: the pools of experts.
    """
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    num_layers = 0
    for (name, counts), line in zip(counts_by_step.items(), STEP_LINES):
        of_pools = routing_statistics.split_pools(counts, pools)
        imbalance_YK = np.concatenate(
            [routing_statistics.max_over_min(of_pool) for of_pool in of_pools], axis=1
        )
        num_layers = len(imbalance_YK)
        for rank, imbalance_Y in enumerate(imbalance_YK.T):
            axes.plot(
                range(num_layers),
                imbalance_Y,
                line,
                marker=RANK_MARKERS[rank % len(RANK_MARKERS)],
                color=RANK_COLORS[rank % len(RANK_COLORS)],
                label=f"{name}, {routing_statistics.rank_name(rank)} choice",
            )
    axes.set(
        xlabel="layer",
        ylabel="most over fewest tokens",
        title="Imbalance of each choice rank (1 = even)",
    )
    axes.set_xticks(range(num_layers))
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_coactivation(trace: Trace, widths: tuple[int, ...]) -> Figure:
    """Plots which experts are chosen by the same tokens, as a mean over the layers."""
    order = plot_style.order_by_width(widths)
    mean_EE = routing_statistics.coactivation(trace, len(widths)).mean(axis=0)
    figure, axes = plt.subplots(figsize=(6, 5))
    image = axes.imshow(mean_EE[np.ix_(order, order)], cmap=plot_style.COLOR_MAP, vmin=0)
    if len(widths) <= MAX_LABELED_EXPERTS:
        labels = plot_style.width_labels(widths, order)
        axes.set_xticks(range(len(widths)), labels, rotation=90)
        axes.set_yticks(range(len(widths)), labels)
    axes.set(
        xlabel="... also chose the expert of width",
        ylabel="tokens that chose the expert of width ...",
        title="Experts chosen together, mean of layers",
    )
    figure.colorbar(image, ax=axes, label="share of the row's tokens")
    return figure


def plot_difficult_tokens(difficult: Counts, baseline: str) -> Figure:
    """Plots which experts the tokens with a high loss choose first (MoDSE, Figure 4).

    Args:
        difficult: Tokens per expert, of the tokens whose loss in the baseline is above 2 nats.
        baseline: Name of the baseline, for the title.
    """
    order = plot_style.order_by_width(difficult.widths)
    first_YE = difficult.counts_YKE[:, 0][:, order]
    percent_YE = 100 * first_YE / np.maximum(first_YE.sum(axis=1, keepdims=True), 1)
    width = max(5.5, 0.75 * min(len(order), MAX_LABELED_EXPERTS) + 2)
    figure, axes = plt.subplots(figsize=(width, 0.45 * len(percent_YE) + 2.2))
    image = axes.imshow(percent_YE, cmap=plot_style.COLOR_MAP, aspect="auto", vmin=0)
    if len(order) <= MAX_LABELED_EXPERTS:
        axes.set_xticks(range(len(order)), plot_style.width_labels(difficult.widths, order))
    axes.set_yticks(range(len(percent_YE)))
    num_tokens = int(first_YE[0].sum())
    axes.set(
        xlabel=plot_style.EXPERT_LABEL,
        ylabel="layer",
        title=f"First choices of the {num_tokens:,} tokens with a loss above 2 nats in {baseline}",
    )
    figure.colorbar(image, ax=axes, label="share of the layer, %")
    return figure


def plot_sources(
    share_SE: np.ndarray, names: list[str], widths: tuple[int, ...], candidates: int
) -> Figure:
    """Plots which experts the tokens of each source (dataset) choose first.

    Args:
        share_SE: Share of each expert among the first choices of a source.
        names: Names of the sources.
        widths: Hidden widths of the experts.
        candidates: Number of experts that can be a first choice, those of the first pool.
    """
    order = plot_style.order_by_width(widths)
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    color_map = plt.get_cmap(plot_style.COLOR_MAP)
    bar_width = 0.8 / len(names)
    for number, (name, share_E) in enumerate(zip(names, share_SE)):
        axes.bar(
            np.arange(len(order)) + 0.8 * number / len(names),
            100 * share_E[order],
            width=bar_width,
            label=name,
            color=color_map(number / max(len(names) - 1, 1)),
            align="edge",
        )
    even_share = 100 / candidates
    axes.axhline(even_share, color=plot_style.COLOR_TEXT, linewidth=0.8, linestyle="--")
    labels = plot_style.width_labels(widths, order)
    plot_style.label_experts(axes, np.arange(len(order)) + 0.4, labels)
    axes.set(
        xlabel=plot_style.EXPERT_LABEL,
        ylabel="share of first choices, %",
        title="Which source goes to which expert, mean of layers",
    )
    axes.legend(frameon=False, fontsize=8)
    return figure
