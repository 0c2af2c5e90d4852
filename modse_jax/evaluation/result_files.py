"""Files with the results of an evaluation: `eval/STEP.json` and what belongs to it."""

import json
import pathlib

from modse_jax.runtime import files


def results_path(workdir: pathlib.Path, step: int, limit: int) -> pathlib.Path:
    """Returns the path of the results of a step.

    Results on the first `limit` records or documents only have a file of their own, so that they
    never replace results on all of them.
    """
    name = f"{step}.first{limit}.json" if limit else f"{step}.json"
    return workdir / "eval" / name


def samples_path(workdir: pathlib.Path, step: int, limit: int, task: str) -> pathlib.Path:
    """Returns the path of a benchmark's documents: one line each, with metrics and answer."""
    return results_path(workdir, step, limit).with_suffix(".tasks") / f"{task}.jsonl"


def find_full_results(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the result files on all validation records, ordered by step."""
    paths = [path for path in (workdir / "eval").glob("*.json") if path.stem.isdigit()]
    return sorted(paths, key=lambda path: int(path.stem))


def add_results(workdir: pathlib.Path, step: int, limit: int, results: dict) -> dict:
    """Merges results into the file of a step, and returns the content of that file.

    Suites that run one after the other thus make one common result.
    """
    path = results_path(workdir, step, limit)
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        results = {**json.loads(path.read_text()), **results}
    files.write_atomically(path, json.dumps(results, indent=2) + "\n")
    return results
