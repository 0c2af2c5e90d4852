"""Benchmarks through EleutherAI's lm-evaluation-harness: which tasks, with which data and shots; results; comparison.

Task files may say $harness for the harness's own folder of tasks, $tasks for this project's, and $data for --tasks_dir.
A line that ends with "# local" holds only where --tasks_dir is given; without it, data comes from the hub.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import tempfile
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import scipy.stats

from modse_jax.errors import RunError, UserError
from modse_jax.evaluation import scoring
from modse_jax.runtime import files, processes

OURS = pathlib.Path(__file__).parents[2] / "configs" / "tasks"


STOCK = (
    "mmlu/default",
    "agieval",
    "hendrycks_math",
)  # what our groups are made of: all of them are slow to read


LARGEST = 2**20  # bytes of a task file


BOOTSTRAP = 1000  # for the standard error of a perplexity


RECIPE = (
    "where there is no internet, --tasks_dir=DIR takes a file DIR/NAME.yaml with `include: $harness/PATH.yaml` "
    "of the stock task, `task: NAME`, `dataset_path: json`, `dataset_name: null` and `dataset_kwargs: "
    "{data_files: {test: $data/FILE.jsonl}}`"
)


class Task(NamedTuple):
    """A requested name, and what the harness made of it: a group, a task, or the tasks of a tag."""

    name: str
    built: list
    parts: tuple[str, ...]  # the names of its tasks


def run(
    workdirs: tuple[str, ...],
    step: int,
    names: tuple[str, ...],
    tasks_dir: str,
    limit: int,
    batch_size: int,
    show: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Evaluates a step of each workdir; every task is read before the first is run.

    Adds to eval/STEP.json (or eval/STEP.firstN.json), and leaves what every document gave in the folder STEP.tasks
    beside it. Args: step: 0 for the newest. limit: documents of each task, 0 for all. batch_size: 0 for what memory
    holds.
    """
    tasks_dir = str(pathlib.Path(tasks_dir).expanduser().absolute()) if tasks_dir else ""
    _prepare(tasks_dir)
    paths = [pathlib.Path(workdir).expanduser().absolute() for workdir in workdirs]
    for path in paths:  # before hours are spent on the first
        scoring.read_config(path)
        scoring.open_checkpoints(path).close()
    manager, tasks = processes.on_all_processes(
        lambda: load(names, tasks_dir) if processes.is_main_process() else (None, [])
    )
    return [_evaluate(path, step, manager, tasks, limit, batch_size, show) for path in paths]


def _prepare(tasks_dir):
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the suite tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt"
        )
    if tasks_dir:  # read once, when the harness is imported
        if not pathlib.Path(tasks_dir).is_dir():
            raise UserError(f"--tasks_dir={tasks_dir} is not a directory")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # its bootstrap would fork a process full of threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


# ---- tasks ----


def load(names: tuple[str, ...], tasks_dir: str):
    """(the harness's task manager, a Task per name), their data read. Raises UserError for what cannot be had."""
    from lm_eval import tasks as harness

    if not names:
        raise UserError("--tasks is empty; give for example --tasks=piqa,mmlu")
    root = pathlib.Path(harness.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        places, broken = _resolved(pathlib.Path(folder), root, tasks_dir)
        ours = sorted(p.stem for p in OURS.glob("*.yaml"))
        if set(names) <= set(ours):
            places = [*(root / name for name in STOCK), *places]
        manager = harness.TaskManager(
            include_path=places, include_defaults=not set(names) <= set(ours)
        )
        for name in names:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
                raise UserError(
                    f"--tasks: {name!r} is unknown; close: {', '.join(close) or 'none'}; this project's "
                    f"own are {', '.join(ours)}" + "".join(f"; cannot be read: {b}" for b in broken)
                )
        return manager, [_load(manager, name) for name in dict.fromkeys(names)]


def _load(manager, name):
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # whatever the harness, a task's own code or the hub raise
        raise UserError(_told(name, error)) from None
    for part, task in loaded["tasks"].items():
        if not len(task.eval_docs):
            raise UserError(f"task {part} has no documents")
        try:
            task.build_all_requests(limit=1, rank=0, world_size=1)
        except Exception as error:  # too few examples for its shots, a column that is not there
            raise UserError(_told(part, error)) from None
    group = loaded.get("groups", {}).get(name)
    return Task(name, [group] if group else list(loaded["tasks"].values()), tuple(loaded["tasks"]))


def _told(name, error):
    text = str(error).splitlines()[0] if str(error) else ""
    remote = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "datasets",
        "huggingface_hub",
    )
    return f"task {name} cannot be read: {type(error).__name__}: {text}" + (
        f"; {RECIPE}" if remote else ""
    )


def _resolved(folder, harness, data):
    """(folders, what could not be read): copies of our task files, and of those in the folder `data`, with their names
    of folders filled in. A file that includes a task does not take its tags: the tag would be of it alone."""
    from lm_eval.tasks._yaml_loader import load_yaml

    names = {"harness": str(harness), "tasks": str(folder / "ours"), "data": data}
    places = {OURS: folder / "ours"} | ({pathlib.Path(data): folder / "theirs"} if data else {})
    for source, target in places.items():
        target.mkdir()
        for path in source.rglob("*"):
            if (
                path.suffix in ("", ".yaml", ".py")
                and path.is_file()
                and path.stat().st_size < LARGEST
            ):
                text = path.read_text(errors="replace")
                if path.suffix == ".yaml":
                    lines = [
                        line for line in text.splitlines() if data or not line.endswith("# local")
                    ]
                    text = re.sub(
                        r"\$(harness|tasks|data)\b", lambda m: names[m[1]], "\n".join(lines)
                    )
                    if re.search("^include:", text, re.M) and not re.search("^tag:", text, re.M):
                        text += "\ntag: []"
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text)
    broken = []
    for copy in folder.rglob("*.yaml"):  # the harness passes over what it cannot parse
        try:
            load_yaml(copy, resolve_func=False)
        except Exception as error:
            broken.append(f"{copy.name}: {' '.join(str(error).split())[:300]}")
    return list(places.values()), broken


# ---- evaluation ----


def _evaluate(workdir, step, manager, tasks, limit, batch_size, show):
    from modse_jax.evaluation import harness

    opened = scoring.open_run(workdir, step, batch_size or len(jax.devices()))
    adapter = harness.Adapter(opened, batch_size)
    if not processes.is_main_process():
        trouble = adapter.model.follow()
        if trouble:
            raise RunError(trouble)
        return {}
    show(f"{workdir.name}, step {opened.step}\n{HEAD}\n")
    try:
        result = _evaluate_all(adapter, workdir, opened.step, manager, tasks, limit, show)
    except RunError as error:
        adapter.model.release(str(error))
        raise
    adapter.model.release()
    return result


def _evaluate_all(adapter, workdir, step, manager, tasks, limit, show):
    """The results of a step after the last task. Each task's are written as soon as they are whole."""
    path = scoring.results_path(workdir, step, limit)
    result = {}
    for task in tasks:
        record, samples = _record(adapter, manager, task, limit)
        _write_samples(samples_path(workdir, step, limit, task.name), samples)
        before = json.loads(path.read_text()).get("tasks", {}) if path.exists() else {}
        result = scoring.write(
            workdir,
            step,
            limit,
            {"step": step, "limit": limit, "tasks": {**before, task.name: record}},
        )
        show(lines(task.name, record) + "\n")
    return result


def _record(adapter, manager, task, limit):
    """(what eval/STEP.json says of a task, a row per document)."""
    import lm_eval

    engine = adapter.model
    adapter.reset()
    try:
        result = lm_eval.simple_evaluate(
            adapter,
            tasks=task.built,
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAP,
        )
    except (
        Exception
    ) as error:  # of a task's own code as of ours: say which task, keep what is whole
        traceback.print_exc()
        raise RunError(
            f"task {task.name} failed: {type(error).__name__}: {error}; the tasks before it are written"
        ) from None
    shown = [task.name] if task.name in result.get("groups", {}) else list(task.parts)
    scores = [
        score for part in dict.fromkeys([*shown, *task.parts]) for score in _scores(part, result)
    ]
    shots = sorted({result["n-shot"][part] for part in task.parts})
    documents = sum(result["n-samples"][part]["effective"] for part in task.parts)
    record = {
        "shots": shots[0] if len(shots) == 1 else shots,
        "documents": documents,
        "shown": shown,
        "scores": scores,
        "seconds": engine.seconds,
        "compile_seconds": engine.compile_seconds,
        **adapter.counts,
    }
    return record, [_sample(part, row) for part in task.parts for row in result["samples"][part]]


def _scores(part, result):
    """The scores of a task or group: {"task", "metric", "filter", "value", "stderr"}."""
    values = {**result["results"], **result.get("groups", {})}[part]
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            yield {
                "task": part,
                "metric": metric,
                "filter": filtered,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            }


def _sample(part, row):
    identity = "".join(row[name] for name in ("doc_hash", "prompt_hash", "target_hash"))
    return {
        "task": part,
        "document": row["doc_id"],
        "hash": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "filter": row["filter"],
        "metrics": {m: row[m] for m in row["metrics"]},
        "target": row["target"],
        "answer": row["filtered_resps"],
    }


def samples_path(workdir: pathlib.Path, step: int, limit: int, name: str) -> pathlib.Path:
    """Where the documents of a task are, a line each: metrics, target, answer."""
    return scoring.results_path(workdir, step, limit).with_suffix(".tasks") / f"{name}.jsonl"


def _write_samples(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples]
    files.write_atomically(path, "".join(lines))


NOTED = ("continuations_truncated", "generations_shortened", "empty_continuations")


HEAD = (
    f"{'task':26} {'shots':>5} {'documents':>9}  {'metric':32} {'value':>8} {'+-':>7} {'seconds':>8} "
    f"{'truncated':>9}"
)


def lines(name: str, record: dict) -> str:
    """A task's part of the table under HEAD. seconds: of computing, compilation not included."""
    shown = [s for s in record["scores"] if s["task"] in record["shown"]]
    out = []
    for i, s in enumerate(shown):
        metric = s["metric"] + ("" if s["filter"] == "none" else f" ({s['filter']})")
        stderr = "" if s["stderr"] is None else _number(s["stderr"])
        first = (
            f"{name:26} {record['shots']!s:>5} {record['documents']:9}"
            if i == 0
            else f"{s['task'] if s['task'] != name else '':26} {'':>5} {'':>9}"
        )
        rest = (
            f" {record['seconds']:8.1f} {record.get('contexts_truncated', 0):9}" if i == 0 else ""
        )
        out.append(f"{first}  {metric:32} {_number(s['value']):>8} {stderr:>7}{rest}")
    other = {name: record[name] for name in NOTED if record.get(name)}
    return "\n".join(
        out + [f"{'':43} {name.replace('_', ' ')}: {count}" for name, count in other.items()]
    )


def _number(value):
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


# ---- comparison ----

LOG_P = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def compare(workdirs: tuple[str, ...], step: int, names: tuple[str, ...], limit: int) -> str:
    """A table of several runs' results on the same documents, paired: each against the first. step: 0 for each run's
    newest with results of tasks. Raises UserError where documents, shots or answers differ, or a result is missing."""
    paths = [pathlib.Path(w).expanduser().absolute() for w in workdirs]
    records = [_records(path, step, limit) for path in paths]
    names = names or tuple(n for n in records[0][1] if all(n in r for _, r in records))
    for path, (s, done) in zip(paths, records):
        if not names or not set(names) <= set(done):
            raise UserError(
                f"{path} has results of {', '.join(done)} at step {s} with --limit={limit}, not of "
                f"{', '.join(names) or 'what the others have'}; run eval.py --suite=tasks on it first"
            )
    runs = " ".join(f"{p.name[-12:]:>12}" for p in paths)
    out = [
        "steps " + ", ".join(f"{p.name}: {s}" for p, (s, _) in zip(paths, records)),
        f"{'task':26} {'metric':32} {'documents':>9} {runs} {'difference':>11} {'+-':>7} {'p':>7}",
    ]
    for name in names:
        tables = [_values(samples_path(p, s, limit, name)) for p, (s, _) in zip(paths, records)]
        for metric in tables[0]:
            out += _rows(
                name,
                metric,
                [_paired(t, metric, tables[0], name, p) for t, p in zip(tables, paths)],
            )
    out += ["", f"{'seconds of computing':69} {runs} {'ratio':>11}"]
    for name in names:
        seconds = [r[name]["seconds"] for _, r in records]
        ratios = " ".join(f"{s / seconds[0]:11.3f}" for s in seconds[1:])
        out.append(f"{name:69} " + " ".join(f"{s:12.1f}" for s in seconds) + f" {ratios}")
    return "\n".join(out)


def _records(path, step, limit):
    """(step, {task: record}) of the given or newest step with results of tasks."""
    found = sorted(
        int(p.name.split(".")[0])
        for p in (path / "eval").glob("*.tasks")
        if p == samples_path(path, int(p.name.split(".")[0]), limit, "").parent
    )
    if (step or not found) and step not in found:
        raise UserError(
            f"{path} has no results of tasks{f' of step {step}' if step else ''} with --limit={limit}; run "
            "eval.py --suite=tasks on it first"
        )
    step = step or found[-1]
    results = scoring.results_path(path, step, limit)
    return step, json.loads(results.read_text()).get("tasks", {}) if results.exists() else {}


def paired(first: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """(mean difference, its standard error, two-sided p) of two runs on the same documents: by the exact sign test on
    the documents that differ where scores are 0 or 1 (McNemar), else by the paired t-test."""
    d = other.astype(float) - first
    stderr = float(np.std(d, ddof=1) / len(d) ** 0.5) if len(d) > 1 else float("nan")
    if not d.any():
        return 0.0, stderr, 1.0
    if set(np.unique(np.concatenate((first, other)))) <= {0.0, 1.0}:
        p = scipy.stats.binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue
    else:
        p = scipy.stats.ttest_rel(other, first).pvalue
    return float(d.mean()), stderr, float(p)


def _values(path):
    """{(metric, filter): {(task, document): (hash, value)}}. A perplexity is no mean over documents: their log p is.
    Others that are none (f1 has a pair a document) are left out."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; run eval.py --suite=tasks --tasks={path.stem} on that workdir first"
        )
    out = {}
    for row in map(json.loads, path.read_text().splitlines()):
        for metric, value in row["metrics"].items():
            if metric in LOG_P:
                metric, value = "log p", value[0] if isinstance(value, list) else value
            if isinstance(value, (int, float)):
                out.setdefault((metric, row["filter"]), {})[row["task"], row["document"]] = (
                    row["hash"],
                    value,
                )
    return dict(sorted(out.items()))


def _paired(table, metric, reference, name, path):
    mine, theirs = table.get(metric, {}), reference[metric]
    if {k: h for k, (h, _) in mine.items()} != {k: h for k, (h, _) in theirs.items()}:
        raise UserError(
            f"{path.name} was given other documents or shots of {name} than the first workdir; evaluate "
            "both with the same --tasks, --tasks_dir and --limit"
        )
    return np.array([mine[k][1] for k in theirs], float)


def _rows(name, metric, values):
    title = metric[0] + ("" if metric[1] == "none" else f" ({metric[1]})")
    head = f"{name:26} {title:32} {len(values[0]):9} " + " ".join(
        f"{v.mean():12.4f}" for v in values
    )
    for i, other in enumerate(values[1:]):
        difference, stderr, p = paired(values[0], other)
        blank = f"{'':26} {'':32} {'':>9} " + " " * (13 * len(values) - 1)
        yield f"{head if i == 0 else blank} {difference:+11.4f} {stderr:7.4f} {p:7.4f}"
