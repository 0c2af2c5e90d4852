"""The paper's routing analyses of a checkpoint, drawn and as tables: report/analysis/*.png, *.csv, text.html.

Compares, where they are given or there, with an earlier step of the same run and with baselines (equal widths) that
were trained on the same data. Computes nothing itself: see routing.py.
"""

import csv
import html
import itertools
import pathlib

import jax
import numpy as np
from matplotlib import pyplot as plt

from modse_jax.data import batching
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading
from modse_jax.moe import expert_placement
from modse_jax.report import pages, routing_statistics
from modse_jax.runtime import sharding
from modse_jax.training import train_step

SHOWN_TOKENS = 1500  # of a text in colours


UNITS = {
    "entries": routing_statistics.difficult_entries,
    "positions": routing_statistics.difficult,
}  # what a difficult token may be


def trace(run: model_loading.LoadedModel, limit: int, batch_size: int) -> routing_statistics.Trace:
    """Of every held-out token that is predicted, in order. limit: records, 0 for all."""
    score = train_step.jitted_score_step(run.config, run.mesh, trace=True)
    parts = []
    for source, dataset in enumerate(run.data.datasets):
        for batch in batching.validation_batches(
            dataset,
            batch_size,
            run.config.model.vocab_size,
            limit,
            sharding.local_rows(run.mesh, batch_size),
        ):
            nll, weights, _, tokens, targets, gates, ids = jax.device_get(
                score(run.params, sharding.shard_batch(run.mesh, batch, batch_size))
            )
            mine = weights > 0
            parts.append(
                (
                    nll[mine],
                    tokens[mine],
                    targets[mine],
                    np.full(mine.sum(), source),
                    ids[:, mine].astype(np.int32),
                    gates[:, mine],
                )
            )
    *flat, ids, gates = zip(*parts)
    return routing_statistics.Trace(
        *(np.concatenate(a) for a in flat), *(np.concatenate(a, 1) for a in (ids, gates))
    )


def write(
    workdir: str, step: int, baselines: tuple[str, ...], earlier: int, limit: int, batch_size: int
) -> str:
    """Writes the analysis of a step (0: the newest) into the report; returns its summary.

    Args: baselines: workdirs of equal-width runs, whose losses choose the difficult tokens; the first is subtracted.
    earlier: a step to compare with; 0: the oldest that is saved.
    Raises UserError where a baseline was trained on other data.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    config = model_loading.read_config(workdir)
    size = batch_size or config.evaluation.batch_size
    run = model_loading.load_model(workdir, step, size)
    before = earlier or model_loading.open_checkpoints(workdir).steps()[0]
    late = trace(run, limit, size)
    early = (
        trace(model_loading.load_model(workdir, before, size), limit, size)
        if before != run.step
        else None
    )
    others = [
        _baseline(run, pathlib.Path(name).expanduser().absolute(), limit, size)
        for name in baselines
    ]

    out = workdir / "report" / "analysis"
    out.mkdir(parents=True, exist_ok=True)
    widths, counts = run.config.widths, routing_statistics.counts_of(late, run.config.widths)
    all_counts = {f"step {run.step}": counts}
    if early is not None:
        all_counts = {f"step {before}": routing_statistics.counts_of(early, widths), **all_counts}
    for name, c in all_counts.items():
        routing_statistics.write_csv(out / f"counts_{name.replace(' ', '_')}.csv", c)
    pages.save(out / "tokens_per_expert.png", _tokens_per_expert(all_counts))
    pages.save(out / "max_over_min.png", _max_over_min(all_counts))
    pages.save(out / "coactivation.png", _coactivation(late, widths))
    lines = _summary(run, counts, late, early, before)
    if others:
        lines += _difficult(out, late, others, counts)
    _specialists(out / "specialists.csv", late, run)
    lines += _by_source(out, late, run) + _stragglers(out / "straggler.csv", counts)
    (out / "text.html").write_text(coloured(run, late))
    return "\n".join([*lines, f"written: {out}"])


def _baseline(run, workdir, limit, size):
    other = model_loading.load_model(workdir, 0, size)
    if other.data.fingerprint != run.data.fingerprint:
        raise UserError(
            f"the baseline {workdir} was trained on other data ({other.data.fingerprint}) than this run "
            f"({run.data.fingerprint}); their tokens cannot be compared"
        )
    return workdir.name, trace(other, limit, size)


def _summary(run, counts, late, early, before):
    per_rank = routing_statistics.mean_width(counts, (0,))
    gates = late.gates_YTK.sum(axis=1)
    chosen = np.array(counts.widths)[late.ids_YTK]
    lines = [
        f"step {run.step}, {late.nll_T.size:,} tokens, widths {', '.join(map(str, counts.widths))}",
        f"mean width, by count: {routing_statistics.mean_width(counts):.1f} of {np.mean(counts.widths):.1f}; by rank: "
        + ", ".join(f"{routing_statistics.rank_name(k)} {w:.1f}" for k, w in enumerate(per_rank))
        + f"; by gate: {(late.gates_YTK * chosen).sum() / gates.sum():.1f}",
    ]
    dead = int((counts.counts_YKE.sum(axis=1) == 0).sum())
    worst = routing_statistics.max_over_min(
        routing_statistics.Counts(counts.counts_YKE.sum(axis=1, keepdims=True), counts.widths)
    ).max()
    lines.append(
        f"experts without a token: {dead}; max/min of all choices, worst layer: {worst:.3f}; of single ranks: "
        f"{routing_statistics.max_over_min(counts).max():.2f}"
    )
    if early is not None:
        lines.append(
            f"first choices that moved since step {before}, by layer: "
            + ", ".join(f"{share:.0%}" for share in routing_statistics.moved(early, late))
        )
    return lines


def _difficult(out, late, others, counts):
    """difficult.csv, difficult.png; lines for the console."""
    (first, base), *_ = others
    choosers = {f"by {name}": t.nll_T for name, t in others} | {"by the model itself": late.nll_T}
    lines, rows = [f"tokens by loss (nats), mean of {first}'s minus this model's:"], []
    for (unit, split), (chooser, losses) in itertools.product(UNITS.items(), choosers.items()):
        bins = split(losses, base.nll_T, late, counts.widths)
        for b in bins:
            rows.append(
                [
                    unit,
                    chooser,
                    b["above"],
                    b["below"],
                    b["tokens"],
                    b["reduction"],
                    *routing_statistics.by_size(b["counts"], 0),
                    *routing_statistics.enrichment(b["counts"], counts),
                ]
            )
        lines.append(
            f"  {unit + ' ' + chooser:32} "
            + "  ".join(f">{b['above']}: {b['reduction']:+.3f} ({b['tokens']:,})" for b in bins)
        )
    with open(out / "difficult.csv", "w", newline="") as file:
        head = [
            "unit",
            "chosen",
            "above",
            "below",
            "tokens",
            "reduction",
            "first_choices_large",
            "first_choices_small",
        ]
        csv.writer(file).writerows([[*head, *(f"enrichment_h{w}" for w in counts.widths)], *rows])
    hardest = routing_statistics.difficult(base.nll_T, base.nll_T, late, counts.widths)[0]["counts"]
    routing_statistics.write_csv(out / "counts_difficult.csv", hardest)
    pages.save(out / "difficult.png", _heat(hardest, counts, first))
    return lines


def _by_source(out, late, run):
    """by_source.csv, by_source.png; a line for the console."""
    names, widths = [d.name for d in run.data.datasets], run.config.widths
    share = routing_statistics.by_source(late, len(names), len(widths))
    with open(out / "by_source.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", "source", *(f"e{i}_h{w}" for i, w in enumerate(widths))])
        for layer, source in np.ndindex(share.shape[:2]):
            table.writerow([layer, names[source], *(f"{x:.4f}" for x in share[layer, source])])
    mean = share.mean(axis=0)
    pages.save(out / "by_source.png", _source_bars(mean, names, widths))
    return [
        "mean width of first choices by source: "
        + ", ".join(f"{name} {m @ np.array(widths):.1f}" for name, m in zip(names, mean))
    ]


def _source_bars(mean, names, widths):
    order = np.argsort([-w for w in widths], kind="stable")
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    for i, (name, row) in enumerate(zip(names, mean)):
        axes.bar(
            np.arange(len(order)) + 0.8 * i / len(names),
            100 * row[order],
            width=0.8 / len(names),
            label=name,
            color=plt.get_cmap("cividis")(i / max(len(names) - 1, 1)),
            align="edge",
        )
    axes.axhline(100 / len(order), color=pages.INK, linewidth=0.8, linestyle="--")
    axes.set_xticks(
        np.arange(len(order)) + 0.4,
        [str(widths[e]) for e in order],
        rotation=90 if len(order) > 12 else 0,
    )
    axes.set(
        xlabel="expert, by hidden width",
        ylabel="share of first choices, %",
        title="Which source goes to which expert, mean of layers",
    )
    axes.legend(frameon=False, fontsize=8)
    return figure, ""


def _stragglers(path, counts):
    """straggler.csv; lines for the console: largest over mean work of the devices, as experts might be placed."""
    placements = expert_placement.reference_placements(counts.widths)
    lines = [f"largest over mean work of the devices, {len(counts.counts_YKE)} layers:"]
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["placement", *(f"layer_{y}" for y in range(len(counts.counts_YKE)))])
        for name, placement in placements.items():
            factors = [
                expert_placement.straggler_factor(c.sum(axis=0).tolist(), placement)
                for c in counts.counts_YKE
            ]
            table.writerow([name, *(f"{f:.4f}" for f in factors)])
            lines.append(
                f"  {pages.PLACEMENTS[name]:34} mean {np.mean(factors):.3f}, worst {max(factors):.3f}"
            )
    return lines


def _tokens_per_expert(all_counts):
    figure, axes = plt.subplots(
        1, len(all_counts), figsize=(5.2 * len(all_counts), 3.8), squeeze=False
    )
    for a, (name, counts) in zip(axes[0], all_counts.items()):
        order = np.argsort([-w for w in counts.widths], kind="stable")
        tokens = routing_statistics.tokens_per_expert(counts)[order]
        colours = np.array([pages.TRAIN] * len(order))
        colours[tokens.argmax()], colours[tokens.argmin()] = pages.VALIDATION, pages.INK
        a.bar(range(len(order)), tokens, color=colours)
        a.set_xticks(
            range(len(order)),
            [str(counts.widths[e]) for e in order],
            rotation=90 if len(order) > 12 else 0,
        )
        a.set(
            xlabel="expert, by hidden width",
            ylabel="tokens, all layers and choices",
            title=f"{name}: max/min {tokens.max() / max(tokens.min(), 1):.3f}",
        )
    return figure, ""


def _max_over_min(all_counts):
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    for (name, counts), style in zip(all_counts.items(), ("--", "-")):
        for rank, column in enumerate(routing_statistics.max_over_min(counts).T):
            axes.plot(
                range(len(column)),
                column,
                style,
                marker="os^D"[rank % 4],
                color=(pages.TRAIN, pages.VALIDATION, pages.INK, "#009E73")[rank % 4],
                label=f"{name}, {routing_statistics.rank_name(rank)} choice",
            )
    axes.set(
        xlabel="layer",
        ylabel="most over fewest tokens",
        title="Imbalance of each choice rank (1 = even)",
    )
    axes.set_xticks(range(len(column)))
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)
    return figure, ""


def _coactivation(late, widths):
    order = np.argsort([-w for w in widths], kind="stable")
    share = routing_statistics.coactivation(late, len(widths)).mean(axis=0)[np.ix_(order, order)]
    figure, axes = plt.subplots(figsize=(6, 5))
    image = axes.imshow(share, cmap="cividis", vmin=0)
    if len(widths) <= 20:
        axes.set_xticks(range(len(widths)), [str(widths[e]) for e in order], rotation=90)
        axes.set_yticks(range(len(widths)), [str(widths[e]) for e in order])
    axes.set(
        xlabel="... also chose the expert of width",
        ylabel="tokens that chose the expert of width ...",
        title="Experts chosen together, mean of layers",
    )
    figure.colorbar(image, ax=axes, label="share of the row's tokens")
    return figure, ""


def _heat(hardest, counts, name):
    order = np.argsort([-w for w in counts.widths], kind="stable")
    first = hardest.counts_YKE[:, 0][:, order]
    share = 100 * first / np.maximum(first.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(
        figsize=(max(5.5, 0.75 * min(len(order), 20) + 2), 0.45 * len(share) + 2.2)
    )
    image = axes.imshow(share, cmap="cividis", aspect="auto", vmin=0)
    if len(order) <= 20:
        axes.set_xticks(range(len(order)), [str(counts.widths[e]) for e in order])
    axes.set_yticks(range(len(share)))
    axes.set(
        xlabel="expert, by hidden width",
        ylabel="layer",
        title=f"First choices of the {int(first[0].sum()):,} tokens with a loss above 2 nats in {name}",
    )
    figure.colorbar(image, ax=axes, label="share of the layer, %")
    return figure, ""


def _specialists(path, late, run):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["layer", "width", "token", "share_of_first_choices", "count"])
        for layer in range(len(late.ids_YTK)):
            for expert, token, share, count in routing_statistics.specialists(
                late, len(run.config.widths), layer
            )[:40]:
                text = run.data.tokenizer.decode([token]).decode("utf-8", "replace")
                out.writerow([layer, run.config.widths[expert], repr(text), f"{share:.3f}", count])


def coloured(run: model_loading.LoadedModel, late: routing_statistics.Trace) -> str:
    """The first held-out tokens, each on the colour of the mean width of its first choices over the layers, with its
    loss and its experts in a tooltip."""
    chosen = routing_statistics.width_of_first_choice(late, run.config.widths)
    low, high = min(run.config.widths), max(run.config.widths)
    spans = []
    for i in range(min(SHOWN_TOKENS, len(chosen))):
        red, green, blue, _ = plt.get_cmap("cividis")((chosen[i] - low) / max(high - low, 1))
        ink = "#fff" if red + green + blue < 1.5 else "#000"
        text = html.escape(
            run.data.tokenizer.decode([int(late.token_T[i])]).decode("utf-8", "replace")
        )
        widths = ", ".join(str(run.config.widths[e]) for e in late.ids_YTK[:, i, 0])
        tip = f"loss of the next {late.nll_T[i]:.2f}; widths {widths}"
        spans.append(
            f'<span title="{tip}" style="color:{ink};background:rgb({255 * red:.0f},{255 * green:.0f},'
            f'{255 * blue:.0f})">{text}</span>'
        )
    return (
        '<!doctype html><meta charset="utf-8"><title>Tokens by width</title>\n<style>pre{font:15px/1.6 monospace;'
        "white-space:pre-wrap}</style>\n<p>Background: width of the first choice, mean of the layers; dark "
        f"{low}, bright {high}. Hover for the loss and every layer.</p>\n<pre>{''.join(spans)}</pre>\n"
    )
