"""The peak rate of devices in FLOP/s, from which model FLOPs utilization (MFU) is computed."""

import functools
import time
from collections.abc import Sequence

import jax

from modse_jax.runtime import chips


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Returns the FLOP/s that devices of one kind reach together, or None if unknown.

    The rate of an accelerator is that of the table in `chips`. The rate of a CPU is measured; the
    devices of one process share its cores, so they count once.
    """
    chip = chips.chip_name(devices[0])
    if chip == "cpu":
        num_processes = len({device.process_index for device in devices})
        return measure_cpu_flops() * num_processes
    if chip not in chips.CHIPS:
        return None
    return chips.CHIPS[chip].teraflops * 1e12 * len(devices)


@functools.cache
def measure_cpu_flops(size: int = 1536, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of a few float32 matmuls of square matrices on this CPU.

    The result is cached, so that a process measures once.
    """
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    square = jax.jit(lambda matrix: matrix @ matrix).lower(matrix).compile()
    square(matrix).block_until_ready()  # the first run is slower, and is not timed
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        square(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
