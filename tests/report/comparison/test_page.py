"""The report of a synthetic sweep: its page, pictures and tables, and what it refuses."""

import csv
import html.parser
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from matplotlib import image

from modse_jax.errors import UserError
from modse_jax.report.comparison import page
from modse_jax.report.comparison.page import ReportOptions
from modse_jax.sweeps import results
from modse_jax.sweeps.definition import choices, product, seeds
from modse_jax.sweeps.description import Claims
from modse_jax.sweeps.results import SweepDirectory
from tests.helpers import sweep_results
from tests.helpers.runs import ROOT, environment
from tests.helpers.sweep_results import OPTIMA, SHAPES, Outcome

TWO = choices({"dense": SHAPES["dense"], "n4 g1": SHAPES["n4 g1"]})


class PageReader(html.parser.HTMLParser):
    """Collects the text, links and tags of a page, and that its tags are closed."""

    VOID = ("meta", "img")

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.text, self.links, self.pictures, self.open = "", [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.pictures += [values["src"]] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns (workdir, report, page) of the sweep that has everything."""
    directory = sweep_results.everything(tmp_path_factory.mktemp("report") / "everything")
    report = page.write_report(directory, ReportOptions())
    return directory, report, PageReader(report.page)


def read_csv(directory: SweepDirectory, name: str) -> list[dict[str, str]]:
    with open(directory.root / "report" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def find_row(rows, **values):
    (found,) = [row for row in rows if all(row[k] == v for k, v in values.items())]
    return found


def test_page_is_complete_and_needs_no_network(written):
    directory, report, reader = written
    assert reader.open == []
    for link in reader.links:
        assert ":" not in link and (report.page.parent / link).is_file(), link
    names = [pathlib.Path(picture).stem for picture in reader.pictures]
    assert names == [
        "differences",
        "grid",
        "rates",
        "costs_best",
        "costs_shared",
        "load",
        "load_over_training",
        "drops_over_training",
    ]
    for name in names:
        assert f"{name}.csv" in reader.links
        pixels = image.imread(report.page.parent / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02, name


def test_conclusions_are_paired_differences_at_both_rates(written):
    directory, _, reader = written
    rows = read_csv(directory, "conclusions")
    for shape, (rate, _) in OPTIMA.items():
        best = find_row(rows, shape=shape, view="best")
        assert float(best["learning_rate"]) == rate, shape
    # At the best rates of both, by hand from the losses of the helper.
    losses = [
        [sweep_results.loss_of(shape, OPTIMA[shape][0], seed) for seed in (0, 1, 2)]
        for shape in ("n8 g1/4", "dense")
    ]
    expected = scipy.stats.ttest_rel(*losses)
    found = find_row(rows, shape="n8 g1/4", view="best")
    interval = [float(found[name]) for name in ("interval_low", "interval_high")]
    assert interval == pytest.approx(list(expected.confidence_interval(0.95)))
    assert float(found["difference"]) == pytest.approx(np.mean(np.subtract(*losses)))
    assert found["conclusion"] == "lower at both" and "lower at both" in reader.text
    # "n8 g1" has lost a seed at its best rate.
    assert find_row(rows, shape="n8 g1", view="best")["paired_seeds"] == "2"


def test_failed_diverged_and_unfinished_arms_are_stated(written):
    directory, report, reader = written
    assert "72 arms: 64 finished, 1 failed, 3 diverged, 1 unfinished, 3 waiting." in reader.text
    rows = read_csv(directory, "unfinished")
    states = [row["state"] for row in rows]
    assert {state: states.count(state) for state in set(states)} == {
        "failed": 1,
        "diverged": 3,
        "unfinished": 1,
        "waiting": 3,
    }
    assert "8 of 72 arms have not finished: 1 failed, 3 diverged" in " ".join(report.warnings)
    assert find_row(rows, state="failed")["reason"] == "the process died"
    assert "the process died" in reader.text
    arms = read_csv(directory, "arms")
    assert len(arms) == 72 and find_row(arms, arm="n8 g1 rate=0.01 seed=2")["state"] == "failed"


def test_results_of_other_code_are_shown_apart_and_in_no_other_file(written):
    directory, _, reader = written
    (row,) = read_csv(directory, "apart")
    assert row["why"] == "other code" and float(row["loss"]) == 9.9
    assert row["arm"] == "dense rate=0.001 seed=0"
    now = sweep_results.loss_of("dense", 1e-3, 0)
    assert float(row["loss_of_this_sweep"]) == pytest.approx(now)
    assert "Results of other code, data or arms: 1, kept apart" in reader.text
    for path in (directory.root / "report").glob("*.csv"):
        if path.name != "apart.csv":
            assert row["id"] not in path.read_text() and "9.9," not in path.read_text()


def test_pictures_have_their_numbers_beside_them(written):
    directory, _, _ = written
    grid = read_csv(directory, "grid")
    assert {(row["n"], row["g"]) for row in grid} == {
        (n, g) for n in ("4", "8") for g in ("1", "1/4")
    }
    rates = read_csv(directory, "rates")
    assert len(rates) == 72
    assert {row["state"] for row in rates if row["loss"] == "8.0"} == {"diverged"}
    costs = read_csv(directory, "costs_shared")
    last = find_row(costs, arm="n4 g1 rate=0.01 seed=1", split="validation", step="100")
    assert float(last["tokens"]) == 100 * 8 * 32
    assert float(last["seconds"]) == pytest.approx(100 * 0.01 * 1.05)
    assert float(last["loss"]) == pytest.approx(sweep_results.loss_of("n4 g1", 1e-2, 1))
    # Experts of one width: what was computed is what was planned, except dropped tokens.
    assert float(last["realized_flops"]) == pytest.approx(float(last["nominal_flops"]))
    load = read_csv(directory, "load")
    drop = find_row(load, arm="capacity rate=0.01 seed=0")
    assert float(drop["dropped_share"]) == pytest.approx(0.04, abs=1e-3)
    assert float(drop["validation_dropped_share"]) == pytest.approx(0.08, abs=1e-3)
    drops = read_csv(directory, "drops_over_training")
    assert {row["shape"] for row in drops} == {"capacity"}


def test_laws_without_enough_shapes_say_why(written):
    _, _, reader = written
    assert (
        "Not fitted to losses each at its best rate: it has 6 coefficients and needs 12 shapes; "
        "the sweep has 3 with a loss here" in reader.text
    )


def test_report_can_be_written_again_and_forgets_old_pictures(tmp_path):
    directory = sweep_results.write_sweep(tmp_path / "s", TWO, lambda *_: Outcome(3.0))
    (directory.root / "report").mkdir()
    old = directory.root / "report" / "grid.png"
    old.write_text("of an earlier report")
    first = page.write_report(directory, ReportOptions()).page.read_text()
    assert not old.exists()
    assert page.write_report(directory, ReportOptions()).page.read_text() == first


@pytest.mark.parametrize("claim", [True, False])
def test_missing_learning_rates_give_a_warning_where_shapes_are_compared(tmp_path, claim):
    arms = product(TWO, sweep_results.rates(1e-2), seeds(0, 1))
    claims = Claims(compares_shapes=claim)

    def outcome(_, config):
        return Outcome(3.0 + config.seed)

    directory = sweep_results.write_sweep(tmp_path / "s", arms, outcome, claims)
    report = page.write_report(directory, ReportOptions())
    warned = [text for text in report.warnings if "2 of 2 shapes are trained at fewer" in text]
    assert len(warned) == claim
    text = PageReader(report.page).text
    assert ("2 of 2 shapes are trained at fewer" in text) == claim
    assert "below noise at the shared rate; the best rates are not known" in text
    assert "No curves of learning rates: no shape has finished runs at two rates." in text


def test_workdir_of_an_older_version_is_readable(written, tmp_path):
    """Format 1 of sweep.json has names alone; the ids are in results.csv."""
    arms = product(TWO, seeds(0, 1))

    def outcome(arm, config):
        state = results.WAITING if arm.name == "dense seed=1" else results.FINISHED
        return Outcome(3.0, state)

    directory = sweep_results.write_sweep(tmp_path / "s", arms, outcome)
    names = [arm.name for arm in arms]
    directory.description.write_text(json.dumps({"sweep": "synthetic", "arms": names}))
    report = page.write_report(directory, ReportOptions())
    text = PageReader(report.page).text
    assert "The workdir is of an older version, which does not say what the sweep holds" in text
    assert any("are not known" in w and "dense seed=1" in w for w in report.warnings)
    table = (directory.root / "results.csv").read_text().replace("dense seed=1", "other")
    (directory.root / "results.csv").write_text(table)
    with pytest.raises(UserError, match="results.csv has other arms than .*sweep.json"):
        page.write_report(directory, ReportOptions())


def spoil_table(directory):
    results.rebuild_tables(directory, "another", {"a": sweep_results.identify(
        sweep_results.resolve(TWO[:1])[0])})  # fmt: skip


BAD = {
    "no directory": (lambda d: os.rename(d.root, f"{d.root}_moved"), "is not a directory"),
    "no sweep": (lambda d: d.description.unlink(), "holds no sweep (no sweep.json)"),
    "damaged": (lambda d: d.description.write_text("{"), "sweep.json is damaged"),
    "newer": (lambda d: d.description.write_text('{"sweep": "a", "format": 9}'), "has format 9"),
    "other table": (spoil_table, "is the table of the sweep 'another'"),
    "none finished": (
        lambda d: [d.result(path.name).unlink() for path in d.runs.iterdir()],
        "has finished (2 unfinished)",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_workdir_is_refused_in_one_sentence_and_nothing_is_written(tmp_path, case):
    directory = sweep_results.write_sweep(tmp_path / "s", TWO, lambda *_: Outcome(3.0))
    spoil, message = BAD[case]
    spoil(directory)
    with pytest.raises(UserError) as caught:
        page.write_report(directory, ReportOptions())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (directory.root / "report").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (ReportOptions(metric="macro_loss"), "--metric=macro_loss: no finished run has it; known:"),
        (ReportOptions(baseline="none"), "--baseline=none is not a shape of this sweep"),
        (ReportOptions(shared_rate=0.5), "no run has finished at it; rates: 0.01"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    directory = sweep_results.write_sweep(tmp_path / "s", TWO, lambda *_: Outcome(3.0))
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        page.write_report(directory, options)
    assert not (directory.root / "report").exists()


@pytest.mark.slow
def test_command_prints_where_the_page_is_and_refuses_a_run(tmp_path):
    def call(workdir):
        return subprocess.run(
            [sys.executable, "-m", "modse_jax", "report", f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment(devices=1),
            capture_output=True,
            text=True,
        )

    (tmp_path / "metrics.jsonl").write_text("")
    done = call(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "holds one run, not a sweep" in done.stderr
    sweep_results.write_sweep(tmp_path / "s", TWO, lambda *_: Outcome(3.0))
    done = call(tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 's' / 'report' / 'index.html'}\n"
    assert "warning: 2 of 2 differences" not in done.stderr and "one seed" in done.stderr
