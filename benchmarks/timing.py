"""Timing side by side: machines are noisy, so a figure is a ratio of medians over interleaved repeats."""

import json
import math
import os
import platform
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from modse_jax.runtime import malloc, memory_usage

JSON = flags.DEFINE_string("json", None, "write the results there")


REPEATS = flags.DEFINE_integer("repeats", 9, "interleaved repeats")


def run(main: Callable) -> None:
    """main(arguments) under absl, with the memory settings of train.py."""
    malloc.use_large_pages()
    app.run(main)


def compile_all(cases: dict[str, tuple[Callable, tuple]]) -> dict[str, dict]:
    """Compiles f(*arguments) of every case: {"compiled", "arguments", "compile_seconds", "peak_bytes"}."""
    out = {}
    for name, (function, arguments) in cases.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        out[name] = dict(
            compiled=compiled,
            arguments=arguments,
            compile_seconds=time.perf_counter() - start,
            peak_bytes=memory_usage.peak_bytes(compiled),
        )
    return out


def interleaved(
    cases: dict[str, dict],
    repeats: int,
    warmup: int = 2,
    calls: int = 1,
    alone_over: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every repeat of every compiled case, one after the other in turn, each waited for.

    calls: calls of a case at a time. Of several the first is not timed: after another program the caches and the memory
    that a process holds are cold, which in a training run they never are. alone_over: seconds from which the first is
    the only one, and timed.
    """
    seconds = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            took = _seconds(case)
            if calls > 1 and took < alone_over:
                took = sum(_seconds(case) for _ in range(calls - 1)) / (calls - 1)
            if repeat >= warmup:
                seconds[name].append(took)
    return seconds


def _seconds(case):
    start = time.perf_counter()
    jax.block_until_ready(case["compiled"](*case["arguments"]))
    return time.perf_counter() - start


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over repeats of the ratio within a repeat: noise that lasts longer than a repeat cancels."""
    return float(np.median(np.array(seconds) / np.array(base)))


def write(result) -> None:
    """Into the file of --json, where there is one."""
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def machine() -> dict:
    """What a result was measured on."""
    return {
        "devices": [d.device_kind for d in jax.devices()],
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "jax": jax.__version__,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }
