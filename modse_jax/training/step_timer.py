"""Measures the duration of training steps between two log lines."""

import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Interval(NamedTuple):
    """Averages over the training steps between two log lines.

    Attributes:
      seconds_per_step: duration of a step, without the time of validation and saving.
      data_wait: fraction of that time that was spent waiting for the next batch.
    """

    seconds_per_step: float
    data_wait: float


class StepTimer:
    """Measures the time of training steps, interval by interval."""

    def __init__(self, step: int) -> None:
        """Starts the first interval. `step` is the number of steps that are completed already."""
        self._start = time.perf_counter()
        self._first_step = step
        self._waited = 0.0
        self._paused_at = 0.0

    def next_item(self, items: Iterator[Item]) -> Item:
        """Returns the next item of an iterator and counts the time as waiting for data."""
        begin = time.perf_counter()
        item = next(items)
        self._waited += time.perf_counter() - begin
        return item

    def pause(self) -> None:
        """Excludes the time until `resume` from the interval."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Ends a pause: time counts again."""
        self._start += time.perf_counter() - self._paused_at

    def restart(self, step: int) -> Interval:
        """Ends the interval and starts the next one; returns the averages of the ended one.

        `step` is the number of steps that are completed now.
        """
        now = time.perf_counter()
        elapsed = now - self._start
        interval = Interval(elapsed / (step - self._first_step), self._waited / elapsed)
        self._start = now
        self._first_step = step
        self._waited = 0.0
        return interval
