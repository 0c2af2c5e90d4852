"""The paper's routing analyses of a checkpoint: report/analysis/*.png, *.csv and text.html.

The checkpoint is compared with an earlier step of the same run, and with baselines that were
trained on the same data and are dense or have equal expert widths. The numbers come from
routing_statistics.py, the figures from analysis_plots.py.

Legend: T tokens, Y layers, K choice ranks, E experts, S sources.
"""

import csv
import html
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib import pyplot as plt

from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading, scoring
from modse_jax.evaluation.model_loading import LoadedModel
from modse_jax.moe import expert_placement
from modse_jax.report import analysis_plots, plot_style, routing_statistics
from modse_jax.report.routing_statistics import Bin, Counts, Trace
from modse_jax.training import train_step

MAX_COLORED_TOKENS = 1500  # in text.html
MAX_SPECIALISTS = 40  # rows per layer of specialists.csv

# The paper does not say whether its "difficult tokens" are entries of the vocabulary or positions
# of the text. Both are analyzed.
DIFFICULTY_UNITS = {
    "entries": routing_statistics.bin_difficult_entries,
    "positions": routing_statistics.bin_difficult_positions,
}

TEXT_PAGE = """<!doctype html><meta charset="utf-8"><title>Tokens by width</title>
<style>pre{{font:15px/1.6 monospace;white-space:pre-wrap}}</style>
<p>Background: width of the first choice, mean of the layers; dark {low}, bright {high}. \
Hover for the loss and every layer.</p>
<pre>{tokens}</pre>
"""


class Baseline(NamedTuple):
    """A dense run or one with equal expert widths, with which the analyzed run is compared."""

    name: str
    trace: Trace  # loss and routing of every validation token, the same tokens in the same order


class EarlierStep(NamedTuple):
    """An earlier checkpoint of the analyzed run, with which the analyzed one is compared."""

    step: int
    trace: Trace | None  # None if there is no checkpoint before the analyzed one


def trace(model: LoadedModel, limit: int, batch_size: int) -> Trace:
    """Runs a model on the validation records; returns loss and routing of every position.

    Padding is left out. The order is that of the records, dataset after dataset.

    Args:
        model: The model.
        limit: Number of records of each dataset; 0 for all.
        batch_size: Sequences per batch.
    """
    score = train_step.jitted_score_step(model.config, model.mesh, trace=True)
    parts = []
    for source, dataset in enumerate(model.data.datasets):
        for batch in scoring.read_validation_batches(model, dataset, limit, batch_size):
            scored = jax.device_get(score(model.variables, batch))
            nll, weights, _, tokens, targets, gates, ids = scored
            is_predicted = weights > 0
            parts.append(
                Trace(
                    nll[is_predicted],
                    tokens[is_predicted],
                    targets[is_predicted],
                    np.full(is_predicted.sum(), source),
                    ids[:, is_predicted].astype(np.int32),
                    gates[:, is_predicted],
                )
            )
    return Trace(
        np.concatenate([part.nll_T for part in parts]),
        np.concatenate([part.token_T for part in parts]),
        np.concatenate([part.target_T for part in parts]),
        np.concatenate([part.source_T for part in parts]),
        np.concatenate([part.ids_YTK for part in parts], axis=1),
        np.concatenate([part.gates_YTK for part in parts], axis=1),
    )


def write(
    workdir: str, step: int, baselines: tuple[str, ...], earlier: int, limit: int, batch_size: int
) -> str:
    """Writes the routing analyses of a checkpoint into report/analysis of the run.

    Args:
        workdir: The directory of the run.
        step: A saved step; 0 for the newest.
        baselines: Directories of dense runs or of runs with equal expert widths. Their losses
            select the difficult tokens; the loss of the first one is compared with this run's.
        earlier: A saved step of the same run to compare with; 0 for the oldest.
        limit: Number of validation records of each dataset; 0 for all.
        batch_size: Sequences per batch; 0 for `evaluation.batch_size` of the config.

    Returns:
        A summary to print.

    Raises:
        UserError: The run is dense, so that it has no routing, or a baseline was trained on other
            data.
    """
    directory = pathlib.Path(workdir).expanduser().absolute()
    config = model_loading.read_config(directory)
    if config.is_dense:
        raise UserError(
            f"--suite=analysis needs experts, but {directory} is a dense model "
            f"(model.dense_width={config.model.dense_width}); use the suites loss and sample, or "
            f"compare another run with it by --baselines={directory}"
        )
    batch_size = batch_size or config.evaluation.batch_size
    model = model_loading.load_model(directory, step, batch_size)
    late = trace(model, limit, batch_size)
    before = _trace_earlier_step(directory, model.step, earlier, limit, batch_size)
    compared = [
        _trace_baseline(model, pathlib.Path(name).expanduser().absolute(), limit, batch_size)
        for name in baselines
    ]

    out = directory / "report" / "analysis"
    out.mkdir(parents=True, exist_ok=True)
    counts = routing_statistics.count_choices(late, model.config.widths)
    _write_balance(out, model, counts, late, before)
    lines = _summarize(model, counts, late, before)
    if compared:
        lines += _write_difficult_tokens(out, late, compared, counts)
    _write_specialists(out / "specialists.csv", late, model)
    lines += _write_sources(out, late, model)
    lines += _write_stragglers(out / "straggler.csv", counts)
    (out / "text.html").write_text(color_text(model, late), encoding="utf-8")
    return "\n".join([*lines, f"written: {out}"])


def _trace_earlier_step(
    workdir: pathlib.Path, step: int, earlier: int, limit: int, batch_size: int
) -> EarlierStep:
    earlier = earlier or model_loading.open_checkpoints(workdir).steps()[0]
    if earlier == step:
        return EarlierStep(earlier, None)
    model = model_loading.load_model(workdir, earlier, batch_size)
    return EarlierStep(earlier, trace(model, limit, batch_size))


def _trace_baseline(
    model: LoadedModel, workdir: pathlib.Path, limit: int, batch_size: int
) -> Baseline:
    other = model_loading.load_model(workdir, 0, batch_size)
    if other.data.fingerprint != model.data.fingerprint:
        raise UserError(
            f"the baseline {workdir} was trained on other data ({other.data.fingerprint}) than "
            f"this run ({model.data.fingerprint}); their tokens cannot be compared"
        )
    return Baseline(workdir.name, trace(other, limit, batch_size))


def _write_balance(
    out: pathlib.Path, model: LoadedModel, counts: Counts, late: Trace, before: EarlierStep
) -> None:
    """Writes how many tokens each expert gets, and which experts are chosen together.

    The files are counts_*.csv, tokens_per_expert.png, max_over_min.png and coactivation.png.
    """
    widths = model.config.widths
    counts_by_step = {}
    if before.trace is not None:
        early_counts = routing_statistics.count_choices(before.trace, widths)
        counts_by_step[f"step {before.step}"] = early_counts
    counts_by_step[f"step {model.step}"] = counts
    for name, counts_of_step in counts_by_step.items():
        path = out / f"counts_{name.replace(' ', '_')}.csv"
        routing_statistics.write_csv(path, counts_of_step)
    figures = {
        "tokens_per_expert.png": analysis_plots.plot_tokens_per_expert(counts_by_step),
        "max_over_min.png": analysis_plots.plot_max_over_min(counts_by_step, model.config.pools),
        "coactivation.png": analysis_plots.plot_coactivation(late, widths),
    }
    for name, figure in figures.items():
        plot_style.save_figure(out / name, figure)


def _summarize(model: LoadedModel, counts: Counts, late: Trace, before: EarlierStep) -> list[str]:
    """Returns lines to print: mean chosen width, balance, and how many choices have changed.

    Args:
        model: The analyzed model.
        counts: Its tokens per expert.
        late: Its loss and routing of every position.
        before: The earlier checkpoint to compare with.
    """
    widths = counts.widths
    chosen_YTK = np.array(widths)[late.ids_YTK]
    width_by_gate = (late.gates_YTK * chosen_YTK).sum() / late.gates_YTK.sum(axis=1).sum()
    by_rank = ", ".join(
        f"{routing_statistics.rank_name(rank)} {width:.1f}"
        for rank, width in enumerate(routing_statistics.mean_width(counts, (0,)))
    )
    all_choices_YE = counts.counts_YKE.sum(axis=1)
    unused_experts = int((all_choices_YE == 0).sum())
    of_pools = routing_statistics.split_pools(counts, model.config.pools)
    worst_rank = max(routing_statistics.max_over_min(pool).max() for pool in of_pools)
    all_choices = [
        Counts(pool.counts_YKE.sum(axis=1, keepdims=True), pool.widths) for pool in of_pools
    ]
    worst_layer = max(routing_statistics.max_over_min(pool).max() for pool in all_choices)
    lines = [
        f"step {model.step}, {late.nll_T.size:,} tokens, widths {', '.join(map(str, widths))}",
        f"mean width, by count: {routing_statistics.mean_width(counts):.1f} of "
        f"{np.mean(widths):.1f}; by rank: {by_rank}; by gate: {width_by_gate:.1f}",
        f"experts without a token: {unused_experts}; max/min of all choices, worst layer: "
        f"{worst_layer:.3f}; of single ranks: {worst_rank:.2f}",
    ]
    if before.trace is not None:
        moved_Y = routing_statistics.share_of_moved_choices(before.trace, late)
        lines.append(
            f"first choices that moved since step {before.step}, by layer: "
            + ", ".join(f"{share:.0%}" for share in moved_Y)
        )
    return lines


def _write_difficult_tokens(
    out: pathlib.Path, late: Trace, baselines: Sequence[Baseline], counts: Counts
) -> list[str]:
    """Writes how the experts of difficult tokens (with a high loss) differ; returns lines to print.

    The files are difficult.csv, counts_difficult.csv and difficult.png. The gain is the loss of the
    first baseline minus that of this model. If tokens are selected by the loss of that baseline,
    the gain is overestimated (regression to the mean). So they are also selected by the loss of
    each other baseline and by the model's own loss.

    Args:
        out: The folder to write into.
        late: Loss and routing of the model.
        baselines: The baselines, at least one.
        counts: Tokens per expert of the model, over all tokens.
    """
    first = baselines[0]
    base_T = first.trace.nll_T
    losses = {f"by {baseline.name}": baseline.trace.nll_T for baseline in baselines}
    losses["by the model itself"] = late.nll_T
    lines = [f"tokens by loss (nats), mean of {first.name}'s minus this model's:"]
    rows = [
        [
            "unit",
            "chosen",
            "above",
            "below",
            "tokens",
            "reduction",
            "first_choices_large",
            "first_choices_small",
            *(f"enrichment_h{width}" for width in counts.widths),
        ]
    ]
    for unit, selected_by in itertools.product(DIFFICULTY_UNITS, losses):
        make_bins = DIFFICULTY_UNITS[unit]
        bins = make_bins(losses[selected_by], base_T, late, counts.widths)
        rows += [[unit, selected_by, *_difficulty_cells(item, counts)] for item in bins]
        lines.append(
            f"  {unit + ' ' + selected_by:32} "
            + "  ".join(f">{item.above}: {item.reduction:+.3f} ({item.tokens:,})" for item in bins)
        )
    _write_csv(out / "difficult.csv", rows)
    bins = routing_statistics.bin_difficult_positions(base_T, base_T, late, counts.widths)
    hardest = bins[0].counts
    routing_statistics.write_csv(out / "counts_difficult.csv", hardest)
    figure = analysis_plots.plot_difficult_tokens(hardest, first.name)
    plot_style.save_figure(out / "difficult.png", figure)
    return lines


def _difficulty_cells(item: Bin, counts: Counts) -> list:
    """Returns the cells of difficult.csv for one bin: the tokens with a loss in one interval."""
    size = routing_statistics.count_by_size(item.counts, 0)
    enrichment_E = routing_statistics.enrichment(item.counts, counts)
    return [item.above, item.below, item.tokens, item.reduction, *size, *enrichment_E]


def _write_sources(out: pathlib.Path, late: Trace, model: LoadedModel) -> list[str]:
    """Writes which experts the tokens of each dataset go to; returns a line to print.

    The files are by_source.csv and by_source.png.
    """
    names = [dataset.name for dataset in model.data.datasets]
    widths = model.config.widths
    share_YSE = routing_statistics.share_by_source(late, len(names), len(widths))
    rows = [["layer", "source", *(f"e{expert}_h{width}" for expert, width in enumerate(widths))]]
    for layer, source in np.ndindex(share_YSE.shape[:2]):
        shares = [f"{share:.4f}" for share in share_YSE[layer, source]]
        rows.append([layer, names[source], *shares])
    _write_csv(out / "by_source.csv", rows)
    mean_SE = share_YSE.mean(axis=0)
    candidates = model.config.pools[0].num_experts
    figure = analysis_plots.plot_sources(mean_SE, names, widths, candidates)
    plot_style.save_figure(out / "by_source.png", figure)
    mean_widths = [
        f"{name} {share_E @ np.array(widths):.1f}" for name, share_E in zip(names, mean_SE)
    ]
    return ["mean width of first choices by source: " + ", ".join(mean_widths)]


def _write_stragglers(path: pathlib.Path, counts: Counts) -> list[str]:
    """Writes straggler.csv, the straggler factor of each layer; returns lines to print.

    The straggler factor is the work of the most loaded device divided by the mean over the devices,
    for several ways to place the experts on devices.
    """
    num_layers = len(counts.counts_YKE)
    lines = [f"largest over mean work of the devices, {num_layers} layers:"]
    rows = [["placement", *(f"layer_{layer}" for layer in range(num_layers))]]
    tokens_YE = counts.counts_YKE.sum(axis=1)
    placements = expert_placement.reference_placements(counts.widths)
    for name, placement in placements.items():
        factors = [
            expert_placement.straggler_factor(tokens_E.tolist(), placement)
            for tokens_E in tokens_YE
        ]
        rows.append([name, *(f"{factor:.4f}" for factor in factors)])
        label = plot_style.PLACEMENT_LABELS[name]
        lines.append(f"  {label:34} mean {np.mean(factors):.3f}, worst {max(factors):.3f}")
    _write_csv(path, rows)
    return lines


def _write_specialists(path: pathlib.Path, late: Trace, model: LoadedModel) -> None:
    """Writes specialists.csv: for each layer, the tokens that one expert specializes in.

    They are those with the largest share of occurrences whose first choice is the same expert.
    """
    widths = model.config.widths
    header = "layer", "width", "token", "share_of_first_choices", "count"
    rows: list[Sequence] = [header]
    for layer in range(len(late.ids_YTK)):
        specialists = routing_statistics.find_specialists(late, len(widths), layer)
        for found in specialists[:MAX_SPECIALISTS]:
            text = repr(_decode(model, found.token))
            rows.append(
                [layer, widths[found.expert], text, f"{found.share:.3f}", found.occurrences]
            )
    _write_csv(path, rows)


def _write_csv(path: pathlib.Path, rows: Iterable[Sequence]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _decode(model: LoadedModel, token: int) -> str:
    return model.data.tokenizer.decode([token]).decode("utf-8", "replace")


def color_text(model: LoadedModel, late: Trace) -> str:
    """Returns a web page with the first validation tokens, colored by the width of their experts.

    The color shows the width of the token's first-choice expert, as a mean over the layers. A
    tooltip shows the loss of the next token, and the width in each layer.
    """
    widths = model.config.widths
    low = min(widths)
    high = max(widths)
    width_T = routing_statistics.width_of_first_choice(late, widths)
    color_map = plt.get_cmap(plot_style.COLOR_MAP)
    spans = []
    for position in range(min(MAX_COLORED_TOKENS, len(width_T))):
        red, green, blue, _ = color_map((width_T[position] - low) / max(high - low, 1))
        text_color = "#fff" if red + green + blue < 1.5 else "#000"
        background = f"rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f})"
        listed = ", ".join(str(widths[expert]) for expert in late.ids_YTK[:, position, 0])
        tooltip = f"loss of the next {late.nll_T[position]:.2f}; widths {listed}"
        text = html.escape(_decode(model, int(late.token_T[position])))
        style = f"color:{text_color};background:{background}"
        spans.append(f'<span title="{tooltip}" style="{style}">{text}</span>')
    return TEXT_PAGE.format(low=low, high=high, tokens="".join(spans))
