"""Compares the benchmark results of several runs, document by document."""

import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
import scipy.stats

from modse_jax.errors import UserError
from modse_jax.evaluation import result_files, text_table
from modse_jax.evaluation.benchmarks import task_runner
from modse_jax.evaluation.text_table import Column

# A perplexity is not a mean over documents, so it cannot be compared document by document. For
# these metrics the log-probabilities of the documents are compared instead.
LOG_PROBABILITY_METRICS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")

MAX_NAME_CHARACTERS = 12  # a column is headed by this many last characters of the run's name

Metric = tuple[str, str]  # metric, filter of the answers
DocumentScores = dict[tuple[str, int], tuple[str, float]]  # {(task, document): (hash, score)}


class RunResults(NamedTuple):
    """The benchmark results of a run.

    Attributes:
        path: The directory of the run.
        step: The evaluated step.
        records: {name of a benchmark: its entry in eval/STEP.json}.
    """

    path: pathlib.Path
    step: int
    records: dict[str, dict]


class PairedTest(NamedTuple):
    """The difference between two runs on the same documents.

    Attributes:
        difference: Mean score of the other run minus that of the first run.
        stderr: Standard error of the difference.
        p: Two-sided p-value of the hypothesis that the runs do not differ.
    """

    difference: float
    stderr: float
    p: float


def compare_runs(workdirs: tuple[str, ...], step: int, names: tuple[str, ...], limit: int) -> str:
    """Returns tables that compare every run with the first one on the same documents.

    Args:
        workdirs: Directories of runs.
        step: An evaluated step; 0 for each run's newest with benchmark results.
        names: Names of benchmarks; empty for those that all runs have.
        limit: The --limit with which the benchmarks were run; 0 for all documents.

    Raises:
        UserError: A result is missing, or the runs have different documents or shots.
    """
    paths = [pathlib.Path(workdir).expanduser().absolute() for workdir in workdirs]
    runs = [_read_run(path, step, limit) for path in paths]
    if not names:
        first, *others = runs
        names = tuple(n for n in first.records if all(n in run.records for run in others))
    for run in runs:
        if not names or not set(names) <= set(run.records):
            wanted = ", ".join(names) or "what the others have"
            raise UserError(
                f"{run.path} has results of {', '.join(run.records)} at step {run.step} with "
                f"--limit={limit}, not of {wanted}; run eval.py --suite=tasks on it first"
            )
    steps = ", ".join(f"{run.path.name}: {run.step}" for run in runs)
    return "\n".join(
        [f"steps {steps}", _format_scores(runs, names, limit), "", _format_seconds(runs, names)]
    )


def _read_run(path: pathlib.Path, step: int, limit: int) -> RunResults:
    """Reads the benchmark results of a step of a run, or of its newest step that has any.

    Args:
        path: The directory of the run.
        step: The step; 0 for the newest.
        limit: The limit with which the benchmarks were run; 0 for all documents.
    """
    found = []
    for folder in (path / "eval").glob("*.tasks"):
        number = int(folder.name.split(".")[0])
        if folder == result_files.samples_path(path, number, limit, "").parent:
            found.append(number)
    if not found or (step and step not in found):
        of_step = f" of step {step}" if step else ""
        raise UserError(
            f"{path} has no results of tasks{of_step} with --limit={limit}; run "
            "eval.py --suite=tasks on it first"
        )
    step = step or max(found)
    file = result_files.results_path(path, step, limit)
    records = json.loads(file.read_text(encoding="utf-8")).get("tasks", {}) if file.exists() else {}
    return RunResults(path, step, records)


def _format_scores(runs: list[RunResults], names: tuple[str, ...], limit: int) -> str:
    """Returns the table of scores: for each metric, one line per run other than the first."""
    columns = [
        Column(26, "left", gap=0),  # task
        Column(32, "left"),  # metric
        Column(9),  # documents
        *[Column(12)] * len(runs),
        Column(11),  # difference
        Column(7),  # standard error
        Column(7),  # p
    ]
    rows = [["task", "metric", "documents", *_run_names(runs), "difference", "+-", "p"]]
    for name in names:
        tables = []
        for run in runs:
            path = result_files.samples_path(run.path, run.step, limit, name)
            tables.append(_read_scores(path))
        for metric in tables[0]:
            values = [
                _align_scores(table, tables[0], metric, name, run)
                for table, run in zip(tables, runs)
            ]
            rows += _comparison_rows(name, metric, values)
    return text_table.text_table(columns, rows)


def _run_names(runs: list[RunResults]) -> list[str]:
    return [run.path.name[-MAX_NAME_CHARACTERS:] for run in runs]


def _comparison_rows(name: str, metric: Metric, values: list[np.ndarray]) -> list[list[str]]:
    """Returns the rows of one metric in the table of scores.

    There is a row for each run other than the first, with its difference to the first run. The
    first of these rows also shows the mean scores of all runs.

    Args:
        name: The name of the benchmark.
        metric: The metric.
        values: The scores of the documents, for each run.
    """
    title = task_runner.format_metric({"metric": metric[0], "filter": metric[1]})
    means = [f"{scores.mean():.4f}" for scores in values]
    start = [name, title, str(len(values[0])), *means]
    rows = []
    for other in values[1:]:
        test = paired_test(values[0], other)
        rows.append([*start, f"{test.difference:+.4f}", f"{test.stderr:.4f}", f"{test.p:.4f}"])
        start = [""] * len(start)
    return rows


def _format_seconds(runs: list[RunResults], names: tuple[str, ...]) -> str:
    """Returns the table of computing times, with those of the other runs over the first run's."""
    num_ratios = len(runs) - 1
    columns = [Column(69, "left", gap=0), *[Column(12)] * len(runs), *[Column(11)] * num_ratios]
    rows = [["seconds of computing", *_run_names(runs), "ratio"]]
    for name in names:
        seconds = [run.records[name]["seconds"] for run in runs]
        ratios = [f"{other / seconds[0]:.3f}" for other in seconds[1:]]
        rows.append([name, *(f"{value:.1f}" for value in seconds), *ratios])
    return text_table.text_table(columns, rows)


def paired_test(first: np.ndarray, other: np.ndarray) -> PairedTest:
    """Tests whether two runs differ on the same documents.

    If all scores are 0 or 1, this is the exact sign test on the documents that differ (McNemar);
    otherwise it is the paired t-test.

    Args:
        first: The scores of the first run, one per document.
        other: The scores of the other run on the same documents. The difference is other - first.
    """
    differences = other.astype(float) - first
    count = len(differences)
    stderr = float(np.std(differences, ddof=1) / count**0.5) if count > 1 else float("nan")
    if not differences.any():
        return PairedTest(0.0, stderr, 1.0)
    values = set(np.unique(np.concatenate((first, other))))
    if values <= {0.0, 1.0}:
        num_better = int((differences > 0).sum())
        num_different = int((differences != 0).sum())
        p = scipy.stats.binomtest(num_better, num_different).pvalue
    else:
        p = scipy.stats.ttest_rel(other, first).pvalue
    return PairedTest(float(differences.mean()), stderr, float(p))


def _read_scores(path: pathlib.Path) -> dict[Metric, DocumentScores]:
    """Reads the scores of a benchmark's documents, by metric.

    Metrics without a single number per document are left out; f1, for example, has two numbers.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; run eval.py --suite=tasks --tasks={path.stem} "
            "on that workdir first"
        )
    scores: dict[Metric, DocumentScores] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for metric, value in row["metrics"].items():
            if metric in LOG_PROBABILITY_METRICS:
                metric = "log p"
                value = value[0] if isinstance(value, list) else value
            if value is None:  # NaN, which JSON does not have
                value = math.nan
            if isinstance(value, (int, float)):
                documents = scores.setdefault((metric, row["filter"]), {})
                documents[row["task"], row["document"]] = (row["hash"], value)
    return dict(sorted(scores.items()))


def _align_scores(
    table: dict[Metric, DocumentScores],
    reference: dict[Metric, DocumentScores],
    metric: Metric,
    name: str,
    run: RunResults,
) -> np.ndarray:
    """Returns the scores of a run in the order of the first run's documents.

    Args:
        table: The scores of the run.
        reference: The scores of the first run.
        metric: The metric.
        name: The name of the benchmark, for error messages.
        run: The run, for error messages.

    Raises:
        UserError: The run has other documents than the first run, or other prompts.
    """
    scores = table.get(metric, {})
    wanted = reference[metric]
    hashes = {document: digest for document, (digest, _) in scores.items()}
    wanted_hashes = {document: digest for document, (digest, _) in wanted.items()}
    if hashes != wanted_hashes:
        raise UserError(
            f"{run.path.name} was given other documents or shots of {name} than the first workdir; "
            "evaluate both with the same --tasks, --tasks_dir and --limit"
        )
    return np.array([scores[document][1] for document in wanted], float)
