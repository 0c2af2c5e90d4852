"""Helpers for tests of sweeps: a small sweep file, and runners as a user starts them."""

import contextlib
import csv
import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from modse_jax.sweeps.results import TIME_COLUMNS, SweepDirectory
from modse_jax.training import run_logs
from tests.helpers.runs import ROOT, environment

TIMEOUT = 600  # seconds; a runner that takes this long hangs, also on a busy machine


def write_sweep(folder: pathlib.Path, corpus: pathlib.Path, arms: str, **training: int) -> str:
    """Writes a sweep file with the tiny config as its base, and returns its path.

    Args:
        folder: where to write it.
        corpus: the folder of text to train on.
        arms: the arms, as Python code.
        training: values of the section training.
    """
    file = folder / "small.py"
    file.write_text(
        f"""
from modse_jax.config.loading import to_option_dict
from modse_jax.sweeps.definition import Sweep, axis, chain, choices, product, seeds
from tests.helpers.configs import tiny_config

def get_sweep():
    base = tiny_config(
        data=dict(source="text:{corpus}"),
        training={training!r},
        advanced=dict(max_nonfinite_steps=2),
    )
    return Sweep(base=to_option_dict(base), arms={arms}, compares_shapes=False)
"""
    )
    return str(file)


def start_runner(sweep: str, workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
    """Starts a runner in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "modse_jax", "sweep"]
        + [f"--sweep={sweep}", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment(devices=1),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_to_end(sweep: str, workdir: pathlib.Path, *arguments: str) -> tuple[str, str, int]:
    """Runs a runner to its end. Returns (stdout, stderr, exit code)."""
    process = start_runner(sweep, workdir, *arguments)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    return stdout, stderr, process.returncode


def kill_when_steps_are_logged(
    process: subprocess.Popen, workdir: pathlib.Path, num_steps: int, rng: random.Random
) -> bool:
    """Kills the process group at a random moment after so many lines of steps are in the logs.

    Returns:
        True if it was killed; False if it ended before.
    """
    while process.poll() is None and count_logged_steps(workdir) < num_steps:
        time.sleep(0.02)
    time.sleep(rng.random() / 5)
    is_alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return is_alive


def count_logged_steps(workdir: pathlib.Path) -> int:
    """Returns the lines of training steps in the logs of all runs."""
    logs = workdir.glob("runs/*/training/metrics.jsonl")
    return sum(path.read_text(errors="replace").count('"split": "train"') for path in logs)


def read_table(workdir: pathlib.Path) -> dict[str, dict[str, str]]:
    """Returns {arm: {column: text}} of results.csv, without times and the path of the workdir."""
    text = (workdir / "results.csv").read_text().replace(str(workdir), "WORKDIR")
    rows = list(csv.DictReader(io.StringIO(text)))
    return {
        row.pop("arm"): {name: text for name, text in row.items() if name not in TIME_COLUMNS}
        for row in rows
    }


def count_repeated_steps(workdir: pathlib.Path) -> int:
    """Returns the largest number of steps that a run trained more than once."""
    counts = [0]
    for path in workdir.glob("runs/*/training/metrics.discarded.jsonl"):
        rows = [row for row in run_logs.read_log(path) if row["split"] == "train"]
        counts.append(len(rows))
    return max(counts)


def read_outputs(workdir: pathlib.Path) -> str:
    """Returns what all runs have printed."""
    paths = sorted(SweepDirectory(workdir).runs.glob("*/output.txt"))
    return "\n".join(path.read_text() for path in paths)
