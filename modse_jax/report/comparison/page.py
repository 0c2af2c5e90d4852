"""Writes the report of a sweep: report/index.html in its workdir, with pictures and CSV files.

The report is drawn from results and logs only, so it can be written again at any time.
"""

import dataclasses
import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from modse_jax.errors import UserError
from modse_jax.report import html_page, plot_style
from modse_jax.report.comparison import (
    comparisons,
    cost_pictures,
    law_fits,
    pictures,
    routing_pictures,
    run_curves,
    runs,
    shapes,
    tables,
    warning_checks,
)
from modse_jax.report.comparison.comparisons import VIEWS, Comparison
from modse_jax.report.comparison.law_fits import LawFit
from modse_jax.report.comparison.metrics import METRICS
from modse_jax.report.comparison.pictures import VIEW_LABELS, Picture
from modse_jax.report.comparison.run_curves import Curve, Routing
from modse_jax.report.comparison.runs import SweepRuns
from modse_jax.report.comparison.tables import Table
from modse_jax.runtime import files
from modse_jax.sweeps import results
from modse_jax.sweeps.results import SweepDirectory

RULES = """<h2>How to read this page</h2>
<ul>
<li>A <b>shape</b> is all arms that differ only in seeds and learning rates. Each is compared with a
baseline: the dense shape, or the one that --baseline names.</li>
<li>Every comparison is made twice. <b>Best</b>: each shape at the learning rate where its mean loss
is lowest, if at least three rates were tried. <b>Shared</b>: all shapes at one rate. A conclusion
that holds in only one of them may be about learning rates, not about shapes.</li>
<li>Losses are <b>paired by seed</b>: runs with the same seed read the same data in the same order.
A difference is the mean over the seeds that both shapes have; its interval is the 95% t interval of
paired differences.</li>
<li>A difference is <b>below noise</b> if its interval includes zero. With one seed, nothing is said
about noise. Of 20 comparisons without any difference, about one is expected above noise by chance.
</li>
<li>The best rate is chosen by the losses that are then compared, which flatters shapes with more
rates. A best rate at the end of the tried rates may not be the best.</li>
<li>After ±, there is the standard deviation over seeds.</li>
</ul>"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """The choices of a user on what a report compares.

    Attributes:
        metric: a loss of `metrics.METRICS`.
        baseline: the name of the shape that others are compared with; "" for the dense one.
        shared_rate: the shared learning rate; 0 for the one that `choose_shared_rate` returns.
    """

    metric: str = "validation_loss"
    baseline: str = ""
    shared_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """A report that has been written.

    Attributes:
        page: its page.
        warnings: what a reader must know before believing a comparison.
    """

    page: pathlib.Path
    warnings: list[str]


def write_report(directory: SweepDirectory, options: ReportOptions) -> Report:
    """Writes the report of a sweep.

    Raises:
        UserError: the workdir is not that of a sweep, no run has finished, or an option does not
            fit the sweep. Nothing has been written.
    """
    sweep = runs.read_sweep(directory)
    found = shapes.find_shapes(sweep.runs)
    _check_options(found, options)
    groups = shapes.find_groups(sweep, found, options.baseline)
    compared = [
        comparisons.compare(group, options.metric, options.shared_rate or None) for group in groups
    ]
    out = directory.root / "report"
    out.mkdir(exist_ok=True)
    writer = _Writer(out)
    concerns = warning_checks.find_warnings(sweep, found, compared)
    body = [
        _format_head(sweep, options, concerns, compared),
        RULES,
        *_format_comparisons(writer, directory, compared),
        *_format_fits(writer, compared),
        *_format_arms(writer, sweep, options.metric),
    ]
    writer.remove_old_files()
    page = out / "index.html"
    files.write_atomically(page, html_page.format_page(f"Sweep {sweep.name}", "\n".join(body)))
    return Report(page, concerns)


def _check_options(found: Sequence[shapes.Shape], options: ReportOptions) -> None:
    known = [shape.losses(options.metric) for shape in found]
    if not any(known):
        finished = [run for shape in found for run in shape.finished()]
        have = [name for name in METRICS if any(r.metrics.get(name) for r in finished)]
        raise UserError(
            f"--metric={options.metric}: no finished run has it; known: {', '.join(have) or 'none'}"
        )
    rates = sorted({rate for losses in known for rate in losses})
    if options.shared_rate and options.shared_rate not in rates:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        raise UserError(
            f"--shared_rate={options.shared_rate:g}: no run has finished at it; rates: {listed}"
        )


class _Writer:
    """Writes pictures and tables into the folder of a report, and returns HTML that shows them."""

    def __init__(self, out: pathlib.Path) -> None:
        self._out = out
        self._names = {"index.html"}

    def add_picture(self, picture: Picture) -> str:
        """Writes a picture and its CSV file."""
        plot_style.save_figure(self._out / f"{picture.name}.png", picture.figure)
        results.write_csv(self._out / f"{picture.name}.csv", picture.rows)
        self._names |= {f"{picture.name}.png", f"{picture.name}.csv"}
        title = html.escape(picture.title)
        return (
            f"<h3>{title}</h3><p>{html.escape(picture.caption)} "
            f'<a href="{picture.name}.csv">CSV</a></p>'
            f'<img src="{picture.name}.png" alt="{title}">'
        )

    def add_table(self, table: Table, name: str) -> str:
        """Writes the CSV file of a table."""
        results.write_csv(self._out / f"{name}.csv", table.csv_rows)
        self._names.add(f"{name}.csv")
        shown = html_page.format_table(table.header, table.rows, table.left)
        note = html.escape(table.note)
        return f'<p>{note} <a href="{name}.csv">CSV</a></p>{shown}'

    def add_rows(self, rows: list[dict[str, Any]], name: str) -> str:
        """Writes a CSV file alone, and returns a link to it."""
        results.write_csv(self._out / f"{name}.csv", rows)
        self._names.add(f"{name}.csv")
        return f'<a href="{name}.csv">CSV</a>'

    def remove_old_files(self) -> None:
        """Removes pictures and CSV files of earlier reports that this one does not have."""
        for path in [*self._out.glob("*.png"), *self._out.glob("*.csv")]:
            if path.name not in self._names:
                path.unlink()


def _format_head(
    sweep: SweepRuns,
    options: ReportOptions,
    concerns: Sequence[str],
    compared: Sequence[Comparison],
) -> str:
    facts = [
        tables.describe_states(sweep),
        f"Loss: {METRICS[options.metric]}.",
        tables.describe_claims(sweep),
    ]
    lines = [
        f"<h1>Sweep {html.escape(sweep.name)}</h1>",
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
    ]
    if concerns:
        items = "".join(f"<li>{html.escape(concern)}</li>" for concern in concerns)
        lines.append(f'<div class="warning"><h2>Warnings</h2><ul>{items}</ul></div>')
    lines.append("<h2>In short</h2>")
    for comparison in compared:
        if comparison.group.label:
            lines.append(f"<h3>{html.escape(comparison.group.label)}</h3>")
        sentences = [*comparisons.describe_order(comparison), *tables.count_conclusions(comparison)]
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        lines.append(f"<ul>{items}</ul>")
    return "\n".join(lines)


def _format_comparisons(
    writer: _Writer, directory: SweepDirectory, compared: Sequence[Comparison]
) -> Iterator[str]:
    for number, comparison in enumerate(compared, 1):
        suffix = f"_{number}" if len(compared) > 1 else ""
        yield f"<h2>{html.escape(pictures.title_of(comparison, 'Shapes'))}</h2>"
        yield writer.add_table(tables.conclusion_table(comparison), f"conclusions{suffix}")
        yield writer.add_table(tables.shape_table(comparison), f"shapes{suffix}")
        pairs = tables.pair_rows(comparison)
        if pairs:
            yield f"<p>All pairs of shapes: {writer.add_rows(pairs, f'pairs{suffix}')}</p>"
        for picture in _draw_pictures(directory, comparison, suffix):
            yield picture if isinstance(picture, str) else writer.add_picture(picture)


def _draw_pictures(
    directory: SweepDirectory, comparison: Comparison, suffix: str
) -> Iterator[Picture | str]:
    """Yields the pictures of a group, and a paragraph for each one that cannot be drawn."""
    yield pictures.plot_differences(comparison, f"differences{suffix}") or _absent(
        "no picture of differences: no shape has a seed in common with the baseline"
    )
    grids = pictures.find_grids(comparison)
    for number, grid in enumerate(grids, 1):
        name = f"grid{suffix}" + (f"_{number}" if len(grids) > 1 else "")
        picture = pictures.plot_grid(comparison, grid, name)
        if picture is not None:
            yield picture
    if not grids:
        yield _absent("no grid n x g: the shapes do not vary both, with all else equal")
    yield pictures.plot_rates(comparison, f"rates{suffix}") or _absent(
        "no curves of learning rates: no shape has finished runs at two rates"
    )
    routing, curves = _read_logs(directory, comparison)
    for view in VIEWS:
        name = f"costs_{view}{suffix}"
        yield cost_pictures.plot_costs(comparison, view, curves, name) or _absent(
            f"no losses against costs, {VIEW_LABELS[view]}: no shape has such a rate and logs"
        )
    routed = routing_pictures.find_routed_shapes(comparison, routing)
    if not routed:
        yield _absent("no pictures of load: no shape with experts has routing logs")
        return
    load = routing_pictures.plot_load(comparison, routed, f"load{suffix}")
    over_training = routing_pictures.plot_load_over_training(
        comparison, routed, f"load_over_training{suffix}"
    )
    drops = routing_pictures.plot_drops_over_training(
        comparison, routed, f"drops_over_training{suffix}"
    )
    yield from (picture for picture in (load, over_training) if picture is not None)
    yield drops or _absent("no picture of drops over training: no shape dropped a token")


def _absent(reason: str) -> str:
    return f"<p>{html.escape(reason[0].upper() + reason[1:])}.</p>"


def _read_logs(
    directory: SweepDirectory, comparison: Comparison
) -> tuple[dict[str, Routing | None], dict[str, dict[str, Curve]]]:
    """Returns ({id: routing}, {id: curves by split}) of the runs at the rates of both views."""
    routing: dict[str, Routing | None] = {}
    curves = {}
    for compared in comparison.shapes:
        rates = {compared.outcomes[view].rate for view in VIEWS}
        for run in compared.shape.finished():
            if run.config is None or run.rate not in rates:
                continue
            training = directory.training(run.id)
            routing[run.id] = run_curves.read_routing(run.config, training)
            curves[run.id] = run_curves.read_curves(
                run.config, training, routing[run.id], comparison.metric
            )
    return routing, curves


def _format_fits(writer: _Writer, compared: Sequence[Comparison]) -> Iterator[str]:
    yield "<h2>Scaling laws</h2>"
    every_shape = [c for comparison in compared for c in comparison.shapes]
    fitted: dict[str, list[LawFit]] = {view: [] for view in VIEWS}
    for number, choice in enumerate(law_fits.choose_laws(), 1):
        yield f"<h3>{html.escape(choice.name)}</h3>"
        for view in VIEWS:
            law_fit = law_fits.fit_law(choice, every_shape, view)
            where = VIEW_LABELS[view]
            if law_fit.reason:
                yield _absent(f"not fitted to losses {where}: {law_fit.reason}")
                continue
            fitted[view].append(law_fit)
            yield f"<h4>Losses {where}</h4>"
            yield writer.add_table(tables.fit_table(law_fit), f"fit_{number}_{view}")
    for view, found in fitted.items():
        if found:
            yield writer.add_picture(pictures.plot_fits(found, view, f"fits_{view}"))


def _format_arms(writer: _Writer, sweep: SweepRuns, metric: str) -> Iterator[str]:
    yield "<h2>Arms without a result that counts</h2>"
    table = tables.unfinished_table(sweep)
    yield writer.add_table(table, "unfinished") if table else "<p>All arms have finished.</p>"
    yield "<h2>All arms</h2>"
    yield f"<p>Every run: {writer.add_rows(tables.arm_rows(sweep, metric), 'arms')}</p>"
    yield "<h2>Results that are kept apart</h2>"
    others = tables.other_table(sweep, metric)
    if others is None:
        yield "<p>There are no results of other code or data, or of arms that are gone.</p>"
    else:
        yield writer.add_table(others, "apart")
