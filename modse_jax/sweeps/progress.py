"""The progress line of a sweep: how many runs have ended, the current run, and the time left."""

import os
import shutil
import sys
import time
from collections.abc import Sequence

from modse_jax.sweeps import matching, results
from modse_jax.sweeps.planning import PlannedRun
from modse_jax.sweeps.results import Result, SweepDirectory
from modse_jax.training import metrics, run_logs

LOG_SECONDS = 60.0  # between two lines, if the output is no terminal
TAIL_BYTES = 65536  # of metrics.jsonl, which hold its last line


class Progress:
    """Prints a line for each run that ends, and in between one line that is updated in place.

    The time left assumes that the runs that are left reach the FLOP/s of the work so far, which
    includes compilation and validation.
    """

    def __init__(self, directory: SweepDirectory, runs: Sequence[PlannedRun]) -> None:
        """Counts the runs that have ended already."""
        self._directory = directory
        self._costs = {run.name: _count_flops(run) for run in runs}
        self._left = {
            run.name for run in runs if results.read_result(directory, run.identity.id) is None
        }
        self._started_at = time.monotonic()
        self._printed_at = self._started_at
        self._flops_done = 0.0  # by this process
        self._run: PlannedRun | None = None
        self._first_step = 0  # of the current run, when this process started it
        self._is_terminal = sys.stdout.isatty()

    def start(self, run: PlannedRun) -> None:
        """Makes a run the current one."""
        self._run = run
        self._first_step = self._last_step()

    def update(self) -> None:
        """Prints the line of the current run, if it is time."""
        interval = 1.0 if self._is_terminal else LOG_SECONDS
        if self._run is None or time.monotonic() - self._printed_at < interval:
            return
        step = self._last_step()
        steps = self._run.config.training.steps
        done = (step - self._first_step) / steps
        left = self._time_left(done * self._costs[self._run.name])
        self._print(
            f"{self._counter()} {self._run.name}: step {step}/{steps}; {left}", is_last=False
        )

    def finish(self, run: PlannedRun, result: Result) -> None:
        """Prints how a run ended."""
        self._left.discard(run.name)
        done = 1 - self._first_step / run.config.training.steps
        self._flops_done += done * self._costs[run.name]
        loss = result["metrics"]["validation_loss"]
        ending = f"validation loss {loss:.4f}" if loss is not None else result["reason"]
        self._run = None
        self._print(
            f"{self._counter()} {run.name}: {result['state']} {ending}; {self._time_left(0)}"
        )

    def show_waiting(self, count: int) -> None:
        """Prints that another process trains all runs that are left, if it is time."""
        interval = 1.0 if self._is_terminal else LOG_SECONDS
        if time.monotonic() - self._printed_at >= interval:
            self._print(f"waiting for {count} runs that other processes train", is_last=False)

    def close(self) -> None:
        """Ends a line that was updated in place."""
        if self._is_terminal:
            print(flush=True)

    def _counter(self) -> str:
        return f"[{len(self._costs) - len(self._left)}/{len(self._costs)}]"

    def _time_left(self, current_flops: float) -> str:
        """Returns the time left as text; `current_flops` are those done of the current run."""
        done = self._flops_done + current_flops
        if not self._left:
            return "all runs have ended"
        if not done:
            return "time left unknown"
        total = sum(self._costs[name] for name in self._left) - current_flops
        seconds = total * (time.monotonic() - self._started_at) / done
        return f"about {metrics.duration(seconds)} left"

    def _last_step(self) -> int:
        """Returns the last step of the current run that is logged; 0 if there is none."""
        assert self._run is not None
        path = self._directory.training(self._run.identity.id) / "metrics.jsonl"
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        rows = run_logs.parse_log(lines)
        return rows[-1]["step"] if rows else 0

    def _print(self, text: str, is_last: bool = True) -> None:
        self._printed_at = time.monotonic()
        if not self._is_terminal:
            print(text, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="\n" if is_last else "", flush=True)


def _count_flops(run: PlannedRun) -> float:
    config = run.identity.config
    return float(matching.count_flops_per_token(config) * matching.count_tokens(config))
