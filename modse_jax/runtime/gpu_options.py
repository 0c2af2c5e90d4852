"""XLA's compiler options for all code that this package compiles for a GPU.

They are passed to each compilation and not set in XLA_FLAGS, because XLA aborts the process on an
unknown flag.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

OPTIONS = {
    # The kinds of operations that may be part of a CUDA graph: XLA's default list, and WHILE. With
    # it, a loop whose trip count depends on data becomes part of a CUDA graph. Otherwise its
    # condition is copied to the host before every iteration: 3,750 times per micro-batch of 300Mx8
    # with moe.backend=blocked. The list replaces the default, so it must be complete; "+WHILE",
    # which XLA_FLAGS accepts, is refused here.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    ),
    # Keeps matmuls that share an input separate. Otherwise XLA would merge the gate and up matmuls
    # of small blocks, and concatenate their weights in every iteration to do so: 42 MB are read and
    # written for an expert of width 6,912.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """Returns the compiler options to compile for a device with, {} unless it is a GPU.

    Options that the installed XLA does not know are left out, and so are options that the user sets
    in XLA_FLAGS.
    """
    if device.platform != "gpu":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in OPTIONS.items()
        if f"--{name}=" not in flags and _is_known(device, name, value)
    }


@functools.cache
def _is_known(device: jax.Device, name: str, value: Any) -> bool:
    """Returns whether XLA accepts an option and its value, by compiling a tiny program with it."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda a: a + 1).lower(number).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error) or "is not a valid" in str(error):
            return False
        raise
    return True
