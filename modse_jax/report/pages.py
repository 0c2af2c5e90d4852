"""Pictures of a run: report/*.png, and report/index.html that shows them. Redrawn from the logs at any time."""

import html
import json
import pathlib

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from modse_jax.evaluation import model_loading, scoring
from modse_jax.training import run_logs

matplotlib.use("Agg")


INK, TRAIN, VALIDATION = "#222222", "#0072B2", "#D55E00"  # colour-blind safe (Okabe and Ito)


def write(workdir: str) -> None:
    """Draws what the workdir's logs hold. A run without a line in metrics.jsonl leaves nothing to draw."""
    workdir = pathlib.Path(workdir).expanduser().absolute()
    rows, layers = (run_logs.read_log(workdir / f"{name}.jsonl") for name in ("metrics", "routing"))
    if not rows:
        return
    out = workdir / "report"
    out.mkdir(exist_ok=True)
    config = model_loading.read_config(workdir)
    split = "validation" if any(layer["split"] == "validation" for layer in layers) else "train"
    newest = max(layer["step"] for layer in layers if layer["split"] == split)
    last = sorted(
        (x for x in layers if x["split"] == split and x["step"] == newest), key=lambda x: x["layer"]
    )
    captions = {
        "loss.png": save(out / "loss.png", _loss(rows)),
        "expert_load.png": save(
            out / "expert_load.png", _load_map(last, config.widths, f"{split}, step {newest}")
        ),
        "load_by_width.png": save(
            out / "load_by_width.png",
            _load_by_width(last, config.widths, f"{split}, step {newest}"),
        ),
        "balance.png": save(out / "balance.png", _balance(layers)),
        "straggler.png": save(out / "straggler.png", _straggler(layers)),
    }
    _index(out / "index.html", workdir, rows, captions, straggler_table(last))


PLACEMENTS = {
    "in_use": "as this run placed them",
    "pairs": "pairs, E/2 devices",
    "sorted": "neighbours in size, E/2 devices",
    "one_per_device": "one expert per device",
    "columns": "every expert's columns cut",
}


def straggler_table(last: list[dict]) -> str:
    """Straggler factor by placement: mean and worst of the layers. last: a line of routing.jsonl per layer."""
    lines = [f"{'experts on devices':34} {'mean':>7} {'worst':>7}   of {len(last)} layers"]
    for name, factors in _factors(last).items():
        lines.append(f"{PLACEMENTS[name]:34} {np.mean(factors):7.3f} {max(factors):7.3f}")
    return "\n".join(lines)


def _factors(layers):
    return {
        name: [x["straggler"][name] for x in layers]
        for name in PLACEMENTS
        if name in layers[0]["straggler"]
    }


def _straggler(layers):
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    train = [x for x in layers if x["split"] == "train"]
    steps = sorted({x["step"] for x in train})
    by_step = [_factors([x for x in train if x["step"] == step]) for step in steps]
    names = by_step[0] if by_step else ()
    for name, shade in zip(names, plt.get_cmap("cividis")(np.linspace(0.05, 0.9, len(PLACEMENTS)))):
        axes.plot(
            steps,
            [np.mean(factors[name]) for factors in by_step],
            color=shade,
            lw=1.3,
            label=PLACEMENTS[name],
        )
    axes.set(
        xlabel="step",
        ylabel="busiest device over mean",
        title="Straggler factor along an expert axis: tokens x width",
    )
    axes.set_ylim(0.95, None)
    if names:
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3
        )
    return figure, (
        "Work of the busiest device of an expert axis over the mean, were the whole batch its own; mean of "
        "the layers."
    )


def _loss(rows):
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    train = [r for r in rows if r["split"] == "train" and r["bits_per_byte"] is not None]
    held = [r for r in rows if r["split"] == "validation"]
    axes.plot(
        [r["step"] for r in train],
        [r["bits_per_byte"] for r in train],
        color=TRAIN,
        lw=1.5,
        label="training",
    )
    if held:
        axes.plot(
            [r["step"] for r in held],
            [r["bits_per_byte"] for r in held],
            "o",
            ls="-" if len(held) > 1 else "",
            color=VALIDATION,
            label=f"validation, last {held[-1]['bits_per_byte']:.3f}",
        )
    if train:
        best = min(r["bits_per_byte"] for r in train)
        axes.set_ylim(0.9 * min(best, *(r["bits_per_byte"] for r in held), best), None)
    axes.set(
        xlabel="step", ylabel="bits per byte", title="Cross-entropy, auxiliary losses left out"
    )
    axes.legend(frameon=False)
    return figure, "Cross-entropy in bits per byte of text, which does not depend on the tokenizer."


def _load_map(last, widths, when):
    """Layers x experts, widest expert first."""
    order = np.argsort([-w for w in widths], kind="stable")
    share = np.array([x["tokens_per_expert"] for x in last], float)[:, order]
    share = share / share.mean(axis=1, keepdims=True)
    figure, axes = plt.subplots(
        figsize=(max(5.5, 0.75 * min(len(widths), 20) + 2), 0.5 * len(last) + 2.2)
    )
    image = axes.imshow(share, cmap="cividis", aspect="auto", vmin=0, vmax=max(2.0, share.max()))
    if len(widths) <= 20:
        for (layer, expert), value in np.ndenumerate(share):
            axes.text(
                expert,
                layer,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 0.55 * max(2.0, share.max()) else "black",
            )
        axes.set_xticks(range(len(widths)), [str(widths[e]) for e in order])
    axes.set_yticks(range(len(last)), [str(x["layer"]) for x in last])
    axes.set(
        xlabel="expert, by hidden width",
        ylabel="layer",
        title=f"Tokens per expert over the even share ({when})",
    )
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    return (
        figure,
        "Load of every expert in every layer; 1 is an even share, experts from the widest to the narrowest.",
    )


def _load_by_width(last, widths, when):
    order = np.argsort([-w for w in widths], kind="stable")
    counts = np.array([x["tokens_per_expert_by_choice"] for x in last], float).sum(axis=0)[:, order]
    counts = 100 * counts / counts.sum()
    figure, axes = plt.subplots(figsize=(7.5, 4.0))
    bottom = np.zeros(len(widths))
    shades = plt.get_cmap("cividis")(np.linspace(0.15, 0.9, len(counts)))
    for choice, (share, shade) in enumerate(zip(counts, shades)):
        axes.bar(
            range(len(widths)),
            share,
            bottom=bottom,
            color=shade,
            width=0.8,
            label=f"choice {choice + 1}",
        )
        bottom += share
    axes.axhline(100 / len(widths), color=INK, lw=1, ls="--", label="even share")
    if len(widths) <= 32:
        axes.set_xticks(range(len(widths)), [str(widths[e]) for e in order])
    axes.set(
        xlabel="expert, by hidden width",
        ylabel="share of routed tokens, %",
        title=f"Expert load by width, all layers ({when})",
    )
    axes.set_ylim(0, 1.25 * bottom.max())
    axes.legend(frameon=False, ncols=min(4, len(counts) + 1))
    return figure, "Share of routed tokens per expert, summed over layers, split by choice rank."


def _balance(layers):
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    train = [x for x in layers if x["split"] == "train"]
    numbers = sorted({x["layer"] for x in train})
    for number, shade in zip(
        numbers, plt.get_cmap("cividis")(np.linspace(0.05, 0.9, max(len(numbers), 1)))
    ):
        mine = [x for x in train if x["layer"] == number]
        axes.plot(
            [x["step"] for x in mine],
            [x["max_over_mean"] for x in mine],
            color=shade,
            lw=1.3,
            label=f"layer {number}" if len(numbers) <= 12 else None,
        )
    axes.axhline(1, color=INK, lw=1, ls="--")
    axes.set(
        xlabel="step", ylabel="busiest expert over mean", title="Imbalance of each layer (1 = even)"
    )
    if 0 < len(numbers) <= 12:
        axes.legend(frameon=False, ncols=2)
    return figure, "Tokens of the busiest expert over the mean, per layer, in the logged steps."


def save(path, figure_and_caption):
    figure, caption = figure_and_caption
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return caption


def _index(path, workdir, rows, captions, stragglers):
    last = rows[-1]
    facts = ", ".join(
        f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in last.items()
    )
    pictures = "\n".join(
        f'<h2>{html.escape(name)}</h2><p>{html.escape(caption)}</p><img src="{name}" alt="{name}">'
        for name, caption in captions.items()
    )
    drawn = sorted((workdir / "report" / "analysis").glob("*.png"))
    pictures += "".join(
        f'<h2>analysis: {p.stem}</h2><img src="analysis/{p.name}" alt="{p.stem}">' for p in drawn
    )
    pictures += (
        '<p><a href="analysis/text.html">A text, every token on the width that saw it</a></p>'
        if drawn
        else ""
    )
    tables = "".join(
        f"<h2>eval of step {file.stem}</h2><pre>{html.escape(scoring.format_results(result))}</pre>"
        for file, result in _evaluations(workdir)
    )
    path.write_text(f"""<!doctype html><meta charset="utf-8"><title>{html.escape(workdir.name)}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:{INK}}}
img{{max-width:100%}}pre{{overflow-x:auto;background:#f4f4f4;padding:1em}}</style>
<h1>Run {html.escape(workdir.name)}</h1><p>{html.escape(facts)}</p>
{pictures}
<pre>{html.escape(stragglers)}</pre>
{tables}
""")


def _evaluations(workdir):
    files = [file for file in (workdir / "eval").glob("*.json") if file.stem.isdigit()]
    return [
        (file, json.loads(file.read_text()))
        for file in sorted(files, key=lambda file: int(file.stem))
    ]
