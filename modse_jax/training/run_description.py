"""Descriptions that a run writes or prints when it starts: environment.json, a line on memory."""

import importlib.metadata
import math
import platform
import sys

import jax

from modse_jax.runtime import code_revision, memory_usage
from modse_jax.training.train_step import State

MIB = 2**20

# Packages whose versions are recorded in environment.json.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
)


def describe_environment() -> dict:
    """Returns the contents of environment.json: what may affect results beside the config."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "git_commit": code_revision.git_output("rev-parse", "HEAD"),
        "git_changes": code_revision.git_output("status", "--porcelain").splitlines(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def memory_line(
    compiled_step: jax.stages.Compiled, state_shapes: State, compile_seconds: float
) -> str:
    """Returns the line that a run prints on the memory that a training step needs per device.

    Args:
      compiled_step: the compiled training step.
      state_shapes: shapes, types and shardings of the state.
      compile_seconds: duration of the compilation; 0 if an earlier run of this process compiled.
    """
    state = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(state_shapes)
    )
    peak = memory_usage.peak_bytes(compiled_step) or state
    origin = (
        f"compiled in {compile_seconds:.0f} s" if compile_seconds else "compiled by a run before"
    )
    return (
        f"memory per device: state {state / MIB:,.0f} MiB, at most about {peak / MIB:,.0f} MiB in "
        f"a step; {origin}"
    )
