"""Runs benchmarks on one or several trained models, and writes and shows their results."""

import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from modse_jax.errors import RunError, UserError, describe_exception
from modse_jax.evaluation import model_loading, result_files, text_table
from modse_jax.evaluation.benchmarks import task_files
from modse_jax.evaluation.benchmarks.task_files import LoadedTasks, Task
from modse_jax.evaluation.text_table import Column
from modse_jax.runtime import files, processes

if TYPE_CHECKING:
    from modse_jax.evaluation.benchmarks.harness_adapter import Adapter

BOOTSTRAP_ITERATIONS = 1000  # for the standard error of a perplexity

COLUMNS = (
    Column(26, "left", gap=0),  # task
    Column(5),  # shots
    Column(9),  # documents
    Column(32, "left", gap=2),  # metric
    Column(8),  # value
    Column(7),  # standard error
    Column(8),  # seconds of computation, without compilation
    Column(9),  # truncated contexts
)
HEADER = ("task", "shots", "documents", "metric", "value", "+-", "seconds", "truncated")
NOTE_INDENT = " " * 44

# Counts that are shown only if they are not zero, since they qualify the scores.
SHOWN_COUNTS = ("continuations_truncated", "generations_shortened", "empty_continuations")

Show = Callable[[str], None]


class TaskResult(NamedTuple):
    """The results of a benchmark.

    Attributes:
        record: Its entry in eval/STEP.json: scores, counts and times.
        documents: A dictionary per document with its metrics, target and answer.
    """

    record: dict
    documents: list[dict]


def show_nothing(text: str) -> None:
    """Discards console output; the default for `show` arguments."""


def run_tasks(
    workdirs: tuple[str, ...],
    step: int,
    names: tuple[str, ...],
    tasks_dir: str,
    limit: int,
    batch_size: int,
    show: Show = show_nothing,
) -> list[dict]:
    """Runs benchmarks on a checkpoint of each workdir.

    The results are added to eval/STEP.json (or eval/STEP.firstN.json with a limit of N), and those
    of single documents to the folder STEP.tasks beside it. All workdirs and tasks are checked
    before the first task is run.

    Args:
        workdirs: Directories of runs.
        step: A saved step; 0 for the newest.
        names: Names of benchmarks.
        tasks_dir: A folder with task files and data; "" for the Hugging Face hub.
        limit: Documents of each task; 0 for all.
        batch_size: Sequences per batch; 0 for as many as fit in memory.
        show: Called with each piece of console output.

    Returns:
        The content of the result file of each workdir; on processes other than the main one, an
        empty dictionary for each.
    """
    tasks_dir = str(pathlib.Path(tasks_dir).expanduser().absolute()) if tasks_dir else ""
    _prepare_harness(tasks_dir)
    paths = [pathlib.Path(workdir).expanduser().absolute() for workdir in workdirs]
    for path in paths:
        model_loading.read_config(path)
        model_loading.open_checkpoints(path).close()

    def load_on_main_process() -> LoadedTasks:
        if processes.is_main_process():
            return task_files.load(names, tasks_dir)
        return LoadedTasks(None, [])

    loaded = processes.on_all_processes(load_on_main_process)
    return [_evaluate(path, step, loaded, limit, batch_size, show) for path in paths]


def _prepare_harness(tasks_dir: str) -> None:
    """Checks that the harness is installed, and sets environment variables that it reads.

    It reads them when it is imported, so this must be called before.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the suite tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt"
        )
    if tasks_dir:
        if not pathlib.Path(tasks_dir).is_dir():
            raise UserError(f"--tasks_dir={tasks_dir} is not a directory")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The harness's bootstrap would fork this process, which is unsafe with JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _evaluate(
    workdir: pathlib.Path, step: int, loaded: LoadedTasks, limit: int, batch_size: int, show: Show
) -> dict:
    """Runs all benchmarks on one checkpoint; returns the content of the result file.

    The main process runs the harness. The other processes take part in its computations and return
    an empty dictionary.
    """
    from modse_jax.evaluation.benchmarks.harness_adapter import Adapter

    model = model_loading.load_model(workdir, step, batch_size or len(jax.devices()))
    adapter = Adapter(model, batch_size)
    programs = adapter.engine.programs
    if not processes.is_main_process():
        trouble = programs.follow()
        if trouble:
            raise RunError(trouble)
        return {}
    header = text_table.format_row(COLUMNS, HEADER)
    show(f"{workdir.name}, step {model.step}\n{header}\n")
    try:
        results = _evaluate_tasks(adapter, workdir, model.step, loaded, limit, show)
    except RunError as error:
        programs.release(str(error))
        raise
    programs.release()
    return results


def _evaluate_tasks(
    adapter: "Adapter",
    workdir: pathlib.Path,
    step: int,
    loaded: LoadedTasks,
    limit: int,
    show: Show,
) -> dict:
    """Runs all benchmarks on the main process, and writes the results after each of them.

    Returns:
        The content of the result file.
    """
    path = result_files.results_path(workdir, step, limit)
    results = {}
    for task in loaded.tasks:
        result = _evaluate_task(adapter, loaded.manager, task, limit)
        documents_path = result_files.samples_path(workdir, step, limit, task.name)
        _write_documents(documents_path, result.documents)
        earlier = {}
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8")).get("tasks", {})
        added = {"step": step, "limit": limit, "tasks": {**earlier, task.name: result.record}}
        results = result_files.add_results(workdir, step, limit, added)
        show(format_record(task.name, result.record) + "\n")
    return results


def _evaluate_task(adapter: "Adapter", manager: Any, task: Task, limit: int) -> TaskResult:
    import lm_eval

    adapter.reset()
    try:
        evaluated = lm_eval.simple_evaluate(
            adapter,
            tasks=task.built,
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
        )
    except Exception as error:  # the code of a task raises anything
        traceback.print_exc()
        raise RunError(
            f"task {task.name} failed: {type(error).__name__}: {describe_exception(error)}; "
            "the tasks before it are written"
        ) from None
    is_group = task.name in evaluated.get("groups", {})
    shown = [task.name] if is_group else list(task.parts)
    scores: list[dict] = []
    for part in dict.fromkeys([*shown, *task.parts]):
        scores += _list_scores(part, evaluated)
    shots = sorted({evaluated["n-shot"][part] for part in task.parts})
    programs = adapter.engine.programs
    record = {
        "shots": shots[0] if len(shots) == 1 else shots,
        "documents": sum(evaluated["n-samples"][part]["effective"] for part in task.parts),
        "shown": shown,
        "scores": scores,
        "seconds": programs.seconds,
        "compile_seconds": programs.compile_seconds,
        **adapter.counts,
    }
    documents = [
        _document_result(part, row) for part in task.parts for row in evaluated["samples"][part]
    ]
    return TaskResult(record, documents)


def _list_scores(part: str, evaluated: dict) -> Iterator[dict]:
    """Yields the scores of a task or group: "task", "metric", "filter", "value" and "stderr"."""
    values = {**evaluated["results"], **evaluated.get("groups", {})}[part]
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            yield {
                "task": part,
                "metric": metric,
                "filter": filter_name,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            }


def _document_result(part: str, row: dict) -> dict:
    """Returns the result of one document as a dictionary, which is written as a line of JSON.

    Its hash identifies document, prompt and target, so that a comparison can check that two runs
    were asked the same question.

    Args:
        part: The name of the document's task.
        row: The harness's result for the document.
    """
    identity = row["doc_hash"] + row["prompt_hash"] + row["target_hash"]
    return {
        "task": part,
        "document": row["doc_id"],
        "hash": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "filter": row["filter"],
        "metrics": {metric: row[metric] for metric in row["metrics"]},
        "target": row["target"],
        "answer": row["filtered_resps"],
    }


def _write_documents(path: pathlib.Path, documents: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [files.format_json(document, ensure_ascii=False, default=str) for document in documents]
    files.write_atomically(path, "".join(line + "\n" for line in lines))


def format_record(name: str, record: dict) -> str:
    """Returns the lines that the console table shows for a benchmark, below HEADER.

    Args:
        name: The name of the benchmark.
        record: Its entry in eval/STEP.json.
    """
    rows: list[list[str]] = []
    for score in record["scores"]:
        if score["task"] not in record["shown"]:
            continue
        stderr = "" if score["stderr"] is None else _format_number(score["stderr"])
        values = [format_metric(score), _format_number(score["value"]), stderr]
        if not rows:
            first = [name, str(record["shots"]), str(record["documents"])]
            seconds = f"{record['seconds']:.1f}"
            last = [seconds, str(record.get("contexts_truncated", 0))]
            rows.append([*first, *values, *last])
        else:
            part = score["task"] if score["task"] != name else ""
            rows.append([part, "", "", *values])
    lines = [text_table.format_row(COLUMNS, row) for row in rows]
    for count in SHOWN_COUNTS:
        if record.get(count):
            lines.append(f"{NOTE_INDENT}{count.replace('_', ' ')}: {record[count]}")
    return "\n".join(lines)


def format_metric(score: dict) -> str:
    """Returns the name of a metric for tables, such as "acc" or "exact_match (strict-match)".

    The name in parentheses is that of the harness's filter, which extracts the answer from the
    generated text.
    """
    if score["filter"] == "none":
        return score["metric"]
    return f"{score['metric']} ({score['filter']})"


def _format_number(value: float | None) -> str:
    """Returns a score as text. None stands for NaN, which JSON does not have."""
    is_large = value is not None and abs(value) >= 100
    return text_table.format_number(value, ".3g" if is_large else ".4f")
