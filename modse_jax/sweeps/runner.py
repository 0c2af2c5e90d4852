"""Runs a sweep: orders a worker process to train every run that has no result yet.

Several runners may share a workdir, on one machine or on several with one file system: each run is
trained by whoever holds its lock. Everything that a runner knows is read from the workdir, so it
can be killed at any moment and started again.
"""

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Sequence

from modse_jax.errors import DiskFullError, ExitCode, UserError
from modse_jax.runtime import processes, signals
from modse_jax.runtime.lock import LockHeldError, hold_lock, wait_for_lock
from modse_jax.sweeps import orders, planning, results
from modse_jax.sweeps.orders import Order, Reply
from modse_jax.sweeps.planning import LoadedSweep, PlannedRun
from modse_jax.sweeps.progress import Progress
from modse_jax.sweeps.results import SweepDirectory

# A run whose worker dies this many times has failed. It is most likely killed for lack of memory.
MAX_DEATHS = 2

POLL_SECONDS = 0.5
WAIT_SECONDS = 1.0  # between two looks at the runs of other processes


@dataclasses.dataclass(frozen=True)
class Share:
    """The place of a runner among several jobs, which begin with different runs.

    Attributes:
        index: the index of the job.
        count: the number of jobs.
    """

    index: int
    count: int


class WorkerProcess:
    """A worker, which trains one run at a time."""

    def __init__(self) -> None:
        """Starts the process. It is in the process group of this one, so one kill ends both."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "modse_jax.sweeps.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": processes.python_path(), "TQDM_DISABLE": "1"},
        )
        self._received = b""

    def send(self, order: str) -> None:
        """Sends an order."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; `poll` reports that
            self._process.stdin.write(order.encode())
            self._process.stdin.flush()

    def poll(self) -> Reply | None:
        """Waits a moment for a reply. Returns None if there is none yet.

        Raises:
            EOFError: the process has ended.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        readable, _, _ = select.select([descriptor], [], [], POLL_SECONDS)
        if readable:
            received = os.read(descriptor, 65536)
            if not received:
                raise EOFError
            self._received += received
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return orders.decode_reply(line)

    def wait(self) -> int:
        """Waits until the process ends, and returns its exit code."""
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Ends the process: at once if it is training, else when it has read the end of input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()


class Runner:
    """Trains the runs of a sweep in a worker process."""

    def __init__(
        self,
        directory: SweepDirectory,
        name: str,
        runs: Sequence[PlannedRun],
        share: Share | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            directory: the workdir of the sweep.
            name: the name of the sweep.
            runs: its runs, in the order of the tables. Those of one shape are trained together.
            share: which job of several this is. A job ends when other jobs train all runs that are
                left; without a share, the runner waits for them.
        """
        self._directory = directory
        self._name = name
        self._runs = runs
        self._waits_for_others = share is None
        self._queue = planning.order_by_shape(runs)
        if share is not None:
            first = len(runs) * share.index // share.count
            self._queue = self._queue[first:] + self._queue[:first]
        self._worker: WorkerProcess | None = None
        self._deaths: Counter[str] = Counter()
        self._is_worker_deterministic = True
        self._last_exit_code = 0  # of a worker that died
        self._stop_requested_at: float | None = None
        self._progress = Progress(directory, runs)

    def run(self) -> ExitCode:
        """Trains all runs.

        Returns:
            FINISHED; FAILED if runs have diverged or failed; STOPPED after a signal.

        Raises:
            DiskFullError: the disk is full. The same call resumes.
        """
        for number in signals.STOP_SIGNALS:
            signal.signal(number, self._handle_signal)
        self._rebuild_tables()
        try:
            self._train_all()
        finally:
            if self._worker is not None:
                self._worker.close()
            self._progress.close()
        rows = self._rebuild_tables()
        if self._stop_requested_at is not None:
            return ExitCode.STOPPED
        is_bad = any(row["state"] in (results.FAILED, results.DIVERGED) for row in rows)
        return ExitCode.FAILED if is_bad else ExitCode.FINISHED

    def _train_all(self) -> None:
        """Trains until every run has a result, a signal arrives, or no run is left for a job."""
        pending = list(self._queue)
        while pending and self._stop_requested_at is None:
            busy = []
            for run in pending:
                if self._stop_requested_at is not None:
                    return
                if results.read_result(self._directory, run.identity.id) is None:
                    is_busy = self._train(run)
                    if is_busy:
                        busy.append(run)
            if len(busy) == len(pending):
                if not self._waits_for_others:
                    return
                self._progress.show_waiting(len(busy))
                time.sleep(WAIT_SECONDS)
            pending = busy

    def _train(self, run: PlannedRun) -> bool:
        """Trains a run until it has a result. Returns True if another process trains it."""
        while self._stop_requested_at is None:
            reply = self._order(run)
            if reply is None:  # the worker died; it is started again
                self._deaths[run.name] += 1
                if self._deaths[run.name] >= MAX_DEATHS:
                    self._record_death(run)
                    return False
                continue
            if reply.kind == orders.BUSY:
                return True
            if reply.kind == orders.DISK_FULL:
                raise DiskFullError(f"{reply.text}; make room and run the same command again")
            if reply.kind == orders.STOPPED:
                self._stop_requested_at = self._stop_requested_at or time.monotonic()
            if reply.kind == orders.ENDED:
                self._finish(run)
            return False
        return False

    def _order(self, run: PlannedRun) -> Reply | None:
        """Orders the worker to train a run. Returns its reply; None if it died."""
        is_deterministic = run.config.training.deterministic
        if self._worker is not None and is_deterministic != self._is_worker_deterministic:
            self._worker.close()  # XLA reads this option once per process
            self._worker = None
        if self._worker is None:
            self._worker = WorkerProcess()
            self._is_worker_deterministic = is_deterministic
        if self._stop_requested_at is not None:  # the signal may have come before the worker
            return Reply(orders.STOPPED, "")
        self._progress.start(run)
        self._worker.send(orders.encode_order(Order(self._directory, run.identity, run.config)))
        try:
            while (reply := self._worker.poll()) is None:
                self._progress.update()
        except EOFError:
            self._last_exit_code = self._worker.wait()
            self._worker = None
            is_stopped = self._last_exit_code == ExitCode.STOPPED
            return Reply(orders.STOPPED, "") if is_stopped else None
        return reply

    def _finish(self, run: PlannedRun) -> None:
        """Reports the result of a run and adds it to the tables."""
        result = results.read_result(self._directory, run.identity.id)
        assert result is not None
        self._progress.finish(run, result)
        self._rebuild_tables()
        if result["state"] == results.FAILED and self._worker is not None:
            # An error may leave arrays on the devices, so the next run gets a new process.
            self._worker.close()
            self._worker = None

    def _record_death(self, run: PlannedRun) -> None:
        """Records that a run has failed because the worker died."""
        reason = (
            f"the process died {MAX_DEATHS} times, last with exit code {self._last_exit_code}; "
            "-9 usually means that memory was full"
        )
        path = self._directory.run(run.identity.id) / ".lock"
        with contextlib.suppress(LockHeldError), hold_lock(path, "the run is in use"):
            results.write_result(self._directory, run.identity, results.FAILED, reason)
            self._finish(run)

    def _rebuild_tables(self) -> list[dict]:
        with wait_for_lock(self._directory.root / ".lock"):
            return results.rebuild_tables(
                self._directory, self._name, planning.identities(self._runs)
            )

    def _handle_signal(self, number: int, frame: types.FrameType | None) -> None:
        """Passes the first signal to the worker, which saves and stops. The second kills it."""
        now = time.monotonic()
        if self._stop_requested_at is None:
            self._stop_requested_at = now
            if self._worker is not None:
                self._worker.send_signal(signal.SIGTERM)
        elif now - self._stop_requested_at > signals.SAME_SIGNAL_SECONDS:
            if self._worker is not None:
                self._worker.send_signal(signal.SIGKILL)
            os._exit(ExitCode.INTERRUPTED)


def discard_failed(directory: SweepDirectory, runs: Sequence[PlannedRun]) -> int:
    """Removes the results of runs that failed, so that they are trained again; returns how many.

    A run that has checkpoints resumes from them.
    """
    discarded = 0
    for run in runs:
        result = results.read_result(directory, run.identity.id)
        if result is None or result["state"] != results.FAILED:
            continue
        path = directory.run(run.identity.id) / ".lock"
        with contextlib.suppress(LockHeldError), hold_lock(path, "the run is in use"):
            directory.result(run.identity.id).unlink(missing_ok=True)
            discarded += 1
    return discarded


def run_sweep(
    directory: SweepDirectory,
    name: str,
    sweep: LoadedSweep,
    retry: str = "",
    share: Share | None = None,
) -> ExitCode:
    """Trains the arms of a sweep that have no result yet. Returns how it ended; see `Runner.run`.

    Args:
        directory: the workdir of the sweep.
        name: the name of the sweep.
        sweep: the sweep, whose arms have been checked.
        retry: "failed" trains runs that failed earlier once more.
        share: which job of several this is; see `Runner`.

    Raises:
        UserError: the workdir is not that of this sweep, or the data is invalid.
        DiskFullError: the disk is full.
    """
    if processes.is_multi_process():
        raise UserError("a sweep runs in one process; start one command on one machine")
    runs = planning.plan_runs(directory, name, sweep)
    if retry == "failed":
        discard_failed(directory, runs)
    return Runner(directory, name, runs, share).run()
