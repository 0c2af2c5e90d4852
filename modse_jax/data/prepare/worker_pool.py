"""Runs a function over the parts of a source, in several processes, with a progress bar."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol, TypeVar

import tqdm

from modse_jax.data.sources import Part


class PartResult(Protocol):
    """The result for one part of a source; the progress bar shows its number of documents."""

    @property
    def documents(self) -> int: ...


Result = TypeVar("Result", bound=PartResult)

Task = tuple[Any, ...]  # (function, part number, part, further arguments)


def run_over_parts(
    work: Callable[..., Result],
    parts: Sequence[Part],
    workers: int,
    label: str,
    arguments: Sequence[Any] | None = None,
) -> list[Result]:
    """Calls `work(number, part)` for every part in several processes; returns results in order.

    Args:
        work: a function that can be pickled.
        parts: the parts of the source, numbered from 0.
        workers: number of processes; with 1, `work` runs in this process.
        label: name of the pass, for the progress bar.
        arguments: for each part, a third argument of `work`; None if it takes none.
    """
    tasks: list[Task] = []
    for number, part in enumerate(parts):
        extra = () if arguments is None else (arguments[number],)
        tasks.append((work, number, part, *extra))
    results: dict[int, Result] = {}
    num_documents = 0
    start = time.monotonic()
    num_workers = min(workers, len(parts))
    with contextlib.ExitStack() as stack:
        bar = _progress_bar(parts, label)
        stack.callback(bar.close)
        if num_workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = futures.ProcessPoolExecutor(num_workers, context, init_worker)
            stack.callback(kill_workers, pool)
            finished = _run_in_pool(pool, tasks)
        else:
            finished = map(run_task, tasks)
        for number, result in finished:
            results[number] = result
            num_documents += result.documents
            rate = num_documents / (time.monotonic() - start)
            bar.update(parts[number].size)
            bar.set_postfix_str(f"{rate:,.0f} documents/s")
    return [results[number] for number in range(len(parts))]


def _progress_bar(parts: Sequence[Part], label: str) -> tqdm.tqdm:
    """Returns a progress bar that counts bytes, or records if the source is a TFDS dataset."""
    return tqdm.tqdm(
        total=sum(part.size for part in parts),
        unit="rec" if any(part.kind == "tfds" for part in parts) else "B",
        unit_scale=True,
        desc=label,
        disable=None,
    )


def _run_in_pool(pool: futures.ProcessPoolExecutor, tasks: list[Task]) -> Iterator[tuple[int, Any]]:
    submitted = [pool.submit(run_task, task) for task in tasks]
    for future in futures.as_completed(submitted):
        yield future.result()


def run_task(task: Task) -> tuple[int, Any]:
    """Runs the work on one part; returns (number of the part, result)."""
    work, number, *arguments = task
    return number, work(number, *arguments)


def init_worker() -> None:
    """Prepares a worker process: it ignores signals, and exits when its parent exits.

    A scheduler sends signals to every process of a group, but the parent process decides when to
    stop. If the parent is killed, its workers must not continue to write.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def kill_workers(pool: futures.ProcessPoolExecutor) -> None:
    """Ends a pool, and kills workers that are still busy after an error or a signal."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()
