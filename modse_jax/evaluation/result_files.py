"""Paths and contents of the files in the folder eval/ of a run, which hold evaluation results.

eval/STEP.json holds the results of all suites that ran on the checkpoint of STEP. The folder
eval/STEP.tasks holds one file per benchmark with its documents.
"""

import json
import pathlib

from modse_jax.runtime import files


def results_path(workdir: pathlib.Path, step: int, limit: int) -> pathlib.Path:
    """Returns the path of the results of a step.

    With a limit, results are on the first `limit` records or documents only. They go to a file of
    their own, so that they never replace results on all records.
    """
    name = f"{step}.first{limit}.json" if limit else f"{step}.json"
    return workdir / "eval" / name


def samples_path(workdir: pathlib.Path, step: int, limit: int, task: str) -> pathlib.Path:
    """Returns the path of a benchmark's documents: JSON Lines with metrics and answer of each."""
    return results_path(workdir, step, limit).with_suffix(".tasks") / f"{task}.jsonl"


def find_full_results(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of all result files without a limit, in ascending order of their steps."""
    paths = [path for path in (workdir / "eval").glob("*.json") if path.stem.isdigit()]
    return sorted(paths, key=lambda path: int(path.stem))


def add_results(workdir: pathlib.Path, step: int, limit: int, results: dict) -> dict:
    """Adds results to the file of a step, and returns the new content of the file.

    Entries that the file already has under other names are preserved, so suites that run one after
    the other share one file.
    """
    path = results_path(workdir, step, limit)
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        results = {**json.loads(path.read_text(encoding="utf-8")), **results}
    files.write_atomically(path, files.format_json(results, indent=2) + "\n")
    return results
