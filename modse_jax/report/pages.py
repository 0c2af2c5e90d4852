"""Writes the report of a run: figures in report/*.png, and report/index.html that shows them.

The report is drawn from the logs only, so it can be written again at any time.
"""

import html
import pathlib

import numpy as np

from modse_jax.evaluation import model_loading, result_files, scoring, text_table
from modse_jax.evaluation.text_table import Column
from modse_jax.moe.layer_options import Pool
from modse_jax.report import html_page, plot_style, run_plots
from modse_jax.report.plot_style import CaptionedFigure
from modse_jax.runtime import files
from modse_jax.training import run_logs

STRAGGLER_COLUMNS = (
    Column(34, "left", gap=0),  # placement
    Column(7),  # mean
    Column(7),  # worst
    Column(0, "left", gap=3),  # number of layers
)

BODY = """<h1>Run {title}</h1><p>{facts}</p>
{figures}
<pre>{stragglers}</pre>
{results}"""


def write(workdir: str) -> None:
    """Writes the report of a run. Does nothing if the run has not logged a step yet."""
    directory = pathlib.Path(workdir).expanduser().absolute()
    rows = run_logs.read_log(directory / "metrics.jsonl")
    layers = run_logs.read_log(directory / "routing.jsonl")
    if not rows:
        return
    config = model_loading.read_config(directory)
    widths = config.widths
    figures = {"loss.png": run_plots.plot_loss(rows), **_plot_sets(rows)}
    stragglers = "no experts: the model is dense"
    if widths:
        newest = _newest_layers(layers)
        figures |= _plot_routing(layers, newest, widths, config.pools)
        stragglers = straggler_table(newest)
    out = directory / "report"
    out.mkdir(exist_ok=True)
    for name, captioned in figures.items():
        plot_style.save_figure(out / name, captioned.figure)
    captions = {name: captioned.caption for name, captioned in figures.items()}
    page = _format_page(directory, rows[-1], captions, stragglers)
    (out / "index.html").write_text(page, encoding="utf-8", errors="surrogateescape")


def _newest_layers(layers: list[dict]) -> list[dict]:
    """Returns the lines of routing.jsonl of the newest validation, or step if there is none."""
    has_validation = any(layer["split"] == "validation" for layer in layers)
    split = "validation" if has_validation else "train"
    newest_step = max(layer["step"] for layer in layers if layer["split"] == split)
    newest = [x for x in layers if x["split"] == split and x["step"] == newest_step]
    return sorted(newest, key=lambda layer: layer["layer"])


def _plot_routing(
    layers: list[dict], newest: list[dict], widths: tuple[int, ...], pools: tuple[Pool, ...]
) -> dict[str, CaptionedFigure]:
    """Returns the pictures of how many tokens the experts receive.

    Args:
        layers: All lines of routing.jsonl.
        newest: The last lines of it, one for each layer.
        widths: Hidden widths of the experts.
        pools: The groups of experts that have a router of their own.
    """
    when = f"{newest[0]['split']}, step {newest[0]['step']}"
    return {
        "expert_load.png": run_plots.plot_load_heatmap(newest, widths, pools, when),
        "load_by_width.png": run_plots.plot_load_by_width(newest, widths, pools, when),
        "balance.png": run_plots.plot_balance(layers),
        "straggler.png": run_plots.plot_straggler(layers),
    }


def _plot_sets(rows: list[dict]) -> dict[str, CaptionedFigure]:
    """Returns the figure of the validation sets; nothing if the run has none."""
    validations = [row for row in rows if "sets" in row]
    if not validations:
        return {}
    return {"validation_sets.png": run_plots.plot_validation_sets(validations)}


def straggler_table(layers: list[dict]) -> str:
    """Returns the table of straggler factors: mean and worst layer for each placement.

    A straggler factor is the work of the most loaded device over the mean, for one way to place
    the experts on devices.

    Args:
        layers: The lines of routing.jsonl of one step, one per layer.
    """
    rows = [["experts on devices", "mean", "worst", f"of {len(layers)} layers"]]
    for placement, factors in run_plots.list_straggler_factors(layers).items():
        label = plot_style.PLACEMENT_LABELS[placement]
        rows.append([label, f"{np.mean(factors):.3f}", f"{max(factors):.3f}"])
    return text_table.text_table(STRAGGLER_COLUMNS, rows)


def _format_page(
    workdir: pathlib.Path, last_row: dict, captions: dict[str, str], stragglers: str
) -> str:
    facts = ", ".join(
        f"{name} {_format_value(value)}"
        for name, value in last_row.items()
        if name != "sets"  # they have a figure, and a table in the results of an evaluation
    )
    results = "".join(
        f"<h2>eval of step {file.stem}</h2>"
        f"<pre>{html.escape(scoring.format_results(files.read_json(file)))}</pre>"
        for file in result_files.find_full_results(workdir)
    )
    body = BODY.format(
        title=html.escape(workdir.name),
        facts=html.escape(facts),
        figures=_format_figures(captions) + _format_analysis(workdir),
        stragglers=html.escape(stragglers),
        results=results,
    )
    return html_page.format_page(workdir.name, body)


def _format_value(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _format_figures(captions: dict[str, str]) -> str:
    return "\n".join(
        f'<h2>{html.escape(name)}</h2><p>{html.escape(caption)}</p><img src="{name}" alt="{name}">'
        for name, caption in captions.items()
    )


def _format_analysis(workdir: pathlib.Path) -> str:
    """Returns HTML that shows the figures of report/analysis, or "" if there are none."""
    paths = sorted((workdir / "report" / "analysis").glob("*.png"))
    if not paths:
        return ""
    figures = "".join(
        f'<h2>analysis: {path.stem}</h2><img src="analysis/{path.name}" alt="{path.stem}">'
        for path in paths
    )
    link = '<p><a href="analysis/text.html">A text, every token on the width that saw it</a></p>'
    return figures + link
