"""Responses to SIGTERM and Ctrl-C, which schedulers and users send to stop a run."""

import os
import signal
import time
import types

import jax
from jax.sharding import Mesh

from modse_jax.errors import ExitCode
from modse_jax.runtime import processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A second signal within this many seconds is ignored. make and schedulers send a signal to a
# process and also to its process group, so that one request arrives twice.
SAME_SIGNAL_SECONDS = 0.5


class Stopped(BaseException):
    """Raised by the first stop signal if the training loop has not started yet."""


class StopRequest:
    """Records stop signals for a training run, from its construction on.

    Before `enter_loop` is called, the first signal raises `Stopped`. After that, it only sets
    `requested`, and the training loop saves a checkpoint after the current step and stops. A second
    signal exits at once, which is safe because checkpoints are committed atomically.

    Attributes:
      requested: True once this process has received a signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._mesh: Mesh | None = None
        self._previous_answer: jax.Array | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def enter_loop(self, mesh: Mesh) -> None:
        """From now on, a signal does not interrupt a step: it only sets `requested`.

        Args:
          mesh: the devices of all processes, over which `requested_anywhere` exchanges the flag.
        """
        self._mesh = mesh

    def requested_anywhere(self) -> bool:
        """Returns True, on every process alike, if any process has received a signal.

        With several processes this is the answer to the previous call: reading the current one
        would make every process wait for the devices after each step.
        """
        if not processes.is_multi_process():
            return self.requested
        if self._mesh is None:
            raise RuntimeError("enter_loop was not called")
        previous = self._previous_answer
        self._previous_answer = processes.any_of(self.requested, self._mesh)
        return previous is not None and bool(previous)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if now - self._requested_at > SAME_SIGNAL_SECONDS:
                os._exit(ExitCode.INTERRUPTED)
            return
        self.requested = True
        self._requested_at = now
        if self._mesh is None:
            raise Stopped
        # Not print(): the signal may have interrupted another print.
        os.write(2, b"\nstopping after this step; send the signal again to exit at once\n")


def exit_on_stop_signals() -> None:
    """Makes a stop signal end the process at once with `ExitCode.STOPPED`.

    For the time before a run has anything to save; `StopRequest` later replaces these handlers.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(ExitCode.STOPPED))
