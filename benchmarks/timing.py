"""Times functions side by side.

Machines are noisy, so the repeats of all functions are interleaved, and results are medians of
ratios within a repeat.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import app, flags

from modse_jax.runtime import malloc, memory_usage

JSON = flags.DEFINE_string("json", None, "A file to write the results to.")
REPEATS = flags.DEFINE_integer("repeats", 9, "Number of interleaved repeats.")

Name = TypeVar("Name", bound=Hashable)


class Case(NamedTuple):
    """A compiled function to time, and its arguments."""

    compiled: Callable
    arguments: tuple
    compile_seconds: float = 0.0
    peak_bytes: int | None = None  # None if unknown


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs main(arguments) with absl flags and the memory settings of train.py."""
    malloc.use_large_pages()
    app.run(main)


def compile_all(functions: Mapping[Name, tuple[Callable, tuple]]) -> dict[Name, Case]:
    """Compiles functions for their arguments.

    Args:
        functions: {name: (function, arguments)}.
    """
    cases = {}
    for name, (function, arguments) in functions.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        peak_bytes = memory_usage.peak_bytes(compiled)
        cases[name] = Case(compiled, arguments, time.perf_counter() - start, peak_bytes)
    return cases


def time_interleaved(
    cases: Mapping[Name, Case],
    repeats: int,
    warmup: int = 2,
    calls: int = 1,
    single_call_seconds: float = math.inf,
) -> dict[Name, list[float]]:
    """Times the cases one after the other in every repeat, and waits for each result.

    Args:
        cases: to time.
        repeats: number of timed repeats.
        warmup: number of repeats before them that are not timed.
        calls: consecutive calls of a case in a repeat. If there are several, the first one is not
            timed: the caches and the memory of the process are cold after another program, which
            does not happen in a training run.
        single_call_seconds: if the first call takes at least this long, it is timed and not
            repeated.

    Returns:
        The seconds per call in every repeat, by case.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            per_call = _time_call(case)
            if calls > 1 and per_call < single_call_seconds:
                per_call = sum(_time_call(case) for _ in range(calls - 1)) / (calls - 1)
            if repeat >= warmup:
                seconds[name].append(per_call)
    return seconds


def _time_call(case: Case) -> float:
    start = time.perf_counter()
    jax.block_until_ready(case.compiled(*case.arguments))
    return time.perf_counter() - start


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Returns the median over repeats of the ratio within a repeat.

    Noise that lasts longer than a repeat cancels.
    """
    return float(np.median(np.array(seconds) / np.array(base)))


def write(result: Any) -> None:
    """Writes a result to the file of --json, if there is one."""
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def describe_machine() -> dict[str, Any]:
    """Returns the hardware and software that a result was measured on."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "jax": jax.__version__,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }
