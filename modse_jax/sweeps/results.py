"""The results of a sweep: one file per run, and tables that are rebuilt from these files.

    WORKDIR/sweep.json                     what the sweep is: see `description`
    WORKDIR/data/KEY/                      prepared data that runs share
    WORKDIR/runs/ID/training/              the workdir of a run, as train.py writes it
    WORKDIR/runs/ID/output.txt             what the run printed
    WORKDIR/runs/ID/result.json            its result; exists once the run has ended
    WORKDIR/results.csv, results.parquet   a row for each arm of the sweep
    WORKDIR/other_results.csv              results of other code or data, or of arms that are gone
    WORKDIR/report/                        the report: see modse_jax/report/comparison

A result is written once, by a rename, so it is complete or absent. Tables are written by a rename
too, and nothing is read from them: deleting one loses nothing. (Only in workdirs of older versions,
whose sweep.json has no ids, a report takes the ids from results.csv.)
"""

import csv
import io
import json
import pathlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from modse_jax.config.loading import from_saved, to_flat_dict
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import accounting
from modse_jax.moe import layer_options
from modse_jax.runtime import files
from modse_jax.sweeps import matching
from modse_jax.sweeps.identity import RunIdentity
from modse_jax.training import run_logs

FORMAT = 1

# States of a run that has ended.
FINISHED = "finished"
DIVERGED = "diverged"
FAILED = "failed"

# States of an arm without a result.
WAITING = "waiting"
UNFINISHED = "unfinished"

# Columns that differ from one execution of the same run to the next.
TIME_COLUMNS = ("training_seconds", "tokens_per_second")

Result = dict[str, Any]


class SweepDirectory:
    """The paths of a sweep's workdir."""

    def __init__(self, workdir: str | pathlib.Path) -> None:
        """Names a workdir, which need not exist."""
        self.root = pathlib.Path(workdir).expanduser().absolute()
        self.description = self.root / "sweep.json"
        self.data = self.root / "data"
        self.runs = self.root / "runs"

    def run(self, run_id: str) -> pathlib.Path:
        """Returns the directory of a run."""
        return self.runs / run_id

    def training(self, run_id: str) -> pathlib.Path:
        """Returns the workdir that the run trains in."""
        return self.run(run_id) / "training"

    def result(self, run_id: str) -> pathlib.Path:
        """Returns the file of the result of a run."""
        return self.run(run_id) / "result.json"


def read_result(directory: SweepDirectory, run_id: str) -> Result | None:
    """Returns the result of a run; None if it has not ended.

    Raises:
        UserError: the file is damaged, or of another format.
    """
    path = directory.result(run_id)
    try:
        result = files.read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove it to run this arm again") from None
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, expected {FORMAT}; use another --workdir")
    return result


def state_without_result(directory: SweepDirectory, run_id: str) -> str:
    """Returns the state of a run that has no result: UNFINISHED, or WAITING if it has not begun."""
    return UNFINISHED if directory.training(run_id).exists() else WAITING


def read_config(result: Result) -> Config:
    """Returns the config of a result."""
    return from_saved(result["config"])


def write_result(
    directory: SweepDirectory, identity: RunIdentity, state: str, reason: str = ""
) -> Result:
    """Writes the result of a run that has ended, from its logs, and returns it.

    Args:
        directory: the sweep.
        identity: the run.
        state: FINISHED, DIVERGED or FAILED.
        reason: why a run failed.
    """
    result = {
        "format": FORMAT,
        **identity.to_json(),
        "state": state,
        "reason": reason,
        "metrics": summarize_logs(identity.config, directory.training(identity.id)),
    }
    path = directory.result(identity.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, files.format_json(result, indent=1) + "\n")
    return result


def summarize_logs(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the metrics of a run that the tables show; values that are not known are None."""
    rows = _read_rows(workdir / "metrics.jsonl")
    training = [row for row in rows if row["split"] == "train"]
    last_training = training[-1] if training else {}
    validations = [row for row in rows if row["split"] == "validation"]
    last_validation = validations[-1] if validations else {}
    seconds = _training_seconds(training)
    steps = last_training.get("step", 0)
    tokens_per_step = config.training.batch_size * config.data.sequence_length
    return {
        "steps_done": steps,
        "training_loss": last_training.get("loss"),
        "validation_loss": last_validation.get("loss"),
        "bits_per_byte": last_validation.get("bits_per_byte"),
        "skipped_steps": last_training.get("skipped_steps"),
        **_summarize_routing(config, _read_rows(workdir / "routing.jsonl"), tokens_per_step),
        "training_seconds": seconds,
        "tokens_per_second": steps * tokens_per_step / seconds if seconds else None,
    }


def _read_rows(path: pathlib.Path) -> list[dict]:
    return run_logs.read_log(path) if path.exists() else []


def _training_seconds(training: Sequence[Mapping]) -> float:
    """Returns the time of all training steps, without compilation, validation and saving."""
    seconds = 0.0
    previous_step = 0
    for row in training:
        seconds += (row["step"] - previous_step) * row["step_seconds"]
        previous_step = row["step"]
    return seconds


def _summarize_routing(
    config: Config, rows: Sequence[Mapping], tokens_per_step: int
) -> dict[str, Any]:
    """Returns load imbalance, dropped tokens and realized FLOPs, over all logged training steps."""
    rows = [row for row in rows if row["split"] == "train"]
    if not rows:
        return {"load_imbalance": None, "dropped_share": None, "realized_flops_per_token": None}
    counts_RE = np.array([row["tokens_per_expert"] for row in rows], np.int64)
    num_layers = config.model.num_layers
    layer_of_row = np.array([row["layer"] for row in rows])
    by_layer = [counts_RE[layer_of_row == layer].sum(axis=0) for layer in range(num_layers)]
    dropped = sum(row["dropped"] for row in rows)
    num_tokens = len(rows) * tokens_per_step // num_layers
    return {
        # Of the tokens of all logged steps; the largest of any layer.
        "load_imbalance": max(load_imbalance(config, counts_E) for counts_E in by_layer),
        "dropped_share": dropped / max(int(counts_RE.sum()), 1),
        "realized_flops_per_token": realized_flops_per_token(
            config, counts_RE, dropped, num_tokens
        ),
    }


def load_imbalance(config: Config, counts_E: np.ndarray) -> float:
    """Returns the maximum over the mean of tokens per expert of a pool, of the least balanced pool.

    Args:
        config: the config of the run.
        counts_E: tokens routed to every expert of a layer.
    """
    of_pools = [counts_E[pool.experts] for pool in layer_options.pool_ranges(config.pools)]
    return max(float(counts.max() / max(counts.mean(), 1e-9)) for counts in of_pools)


def realized_flops_per_token(
    config: Config, counts_RE: np.ndarray, dropped: int, num_tokens: int
) -> int:
    """Returns the FLOPs of training per token for the routing of some lines of routing.jsonl.

    Dropped tokens are taken from all experts alike, because the logs do not have more.

    Args:
        config: the config of the run.
        counts_RE: tokens routed to every expert, per line.
        dropped: routed tokens over capacity, of all lines.
        num_tokens: the tokens that entered the model.
    """
    counts_E = counts_RE.sum(axis=0)
    computed_E = counts_E * (1 - dropped / max(int(counts_E.sum()), 1))
    return accounting.realized_flops_per_token(
        config, config.data.sequence_length, computed_E, num_tokens
    )


# ---- tables --------------------------------------------------------------------------------------


def rebuild_tables(
    directory: SweepDirectory, name: str, arms: Mapping[str, RunIdentity]
) -> list[dict[str, Any]]:
    """Writes the tables of a sweep from the results of its runs.

    Only one process may do so at a time.

    Args:
        directory: the sweep.
        name: the name of the sweep.
        arms: the arms of the sweep by name.

    Returns:
        The rows of results.csv.
    """
    configs = [matching.ResolvedArm(name, identity.config) for name, identity in arms.items()]
    options = matching.varying_options(configs)
    rows = [_arm_row(directory, name, arm, options) for name, arm in arms.items()]
    write_csv(directory.root / "results.csv", rows)
    _write_parquet(directory.root / "results.parquet", rows, name)
    others = find_other_results(directory, {identity.id for identity in arms.values()})
    other_path = directory.root / "other_results.csv"
    if others:
        code = next(iter(arms.values())).code
        known = {identity.config for identity in arms.values()}
        write_csv(other_path, [_other_row(result, code, known, options) for result in others])
    else:
        other_path.unlink(missing_ok=True)
    return rows


def find_other_results(directory: SweepDirectory, ids: set[str]) -> list[Result]:
    """Returns the results in a workdir that are not those of the given runs, ordered by id."""
    folders = sorted(directory.runs.iterdir()) if directory.runs.is_dir() else []
    found = [read_result(directory, path.name) for path in folders if path.name not in ids]
    return [result for result in found if result is not None]


def _arm_row(
    directory: SweepDirectory, name: str, arm: RunIdentity, options: Sequence[str]
) -> dict[str, Any]:
    result = read_result(directory, arm.id)
    if result is None:
        state = state_without_result(directory, arm.id)
        result = {"state": state, "reason": "", "revision": "", "metrics": _no_metrics()}
    return {"arm": name, **_describe(arm.id, arm.config, result, options)}


def _other_row(
    result: Result, code: str, configs: Container[Config], options: Sequence[str]
) -> dict[str, Any]:
    config = read_config(result)
    reason = explain_apart(result, code, configs)
    return {"apart_because": reason, **_describe(result["id"], config, result, options)}


def explain_apart(result: Result, code: str, configs: Container[Config]) -> str:
    """Returns why a result in a workdir is not one of the sweep's.

    Args:
        result: a result whose id is not that of an arm.
        code: hash of the code of the sweep.
        configs: the configs of the arms.
    """
    if result["code"] != code:
        return "other code"
    return "other data" if read_config(result) in configs else "not an arm of this sweep"


def _describe(
    run_id: str, config: Config, result: Result, options: Sequence[str]
) -> dict[str, Any]:
    values = to_flat_dict(config)
    return {
        "state": result["state"],
        **{option: _as_cell(values[option]) for option in options},
        **{quantity: count(config) for quantity, count in matching.QUANTITIES.items()},
        **result["metrics"],
        "reason": result["reason"],
        "revision": result["revision"],
        "id": run_id,
    }


def _no_metrics() -> dict[str, None]:
    """Returns the metrics of a run that has none yet."""
    return dict.fromkeys(summarize_logs(Config(), pathlib.Path("/nonexistent")))


def _as_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, at least one, as a CSV file whose columns are the names of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomically(path, text.getvalue())


def _write_parquet(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    table = table.replace_schema_metadata({"sweep": name})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    files.write_atomically(path, sink.getvalue().to_pybytes())
