"""The memory that a compiled function needs, and the memory of this machine."""

import os

import jax


def peak_bytes(compiled: jax.stages.Compiled, include_arguments: bool = True) -> int | None:
    """Returns the memory that a compiled function needs on each device, in bytes.

    It is the sum of arguments, temporary arrays and outputs. A donated argument and the output that
    reuses its memory are counted once.

    Args:
      compiled: the compiled function.
      include_arguments: False leaves out the arguments, which may be in memory already.

    Returns:
      The number of bytes, or None if the platform reports no memory analysis.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = analysis.temp_size_in_bytes + outputs
    if include_arguments:
        total += analysis.argument_size_in_bytes
    return total


def host_memory_bytes() -> int:
    """Returns the size of this machine's main memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
