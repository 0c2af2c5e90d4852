"""XLA's compiler options for GPU programs: every program that trains, scores or decodes uses them.

They are options of one compilation and not XLA_FLAGS, because XLA aborts the process on an unknown
flag.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

OPTIONS = {
    # XLA's default list, and WHILE. A loop whose trip count depends on data then becomes part of a
    # CUDA graph. Otherwise its condition is copied to the host before every iteration: 3,750 times
    # per micro-batch of 300Mx8 with moe.backend=blocked. A list replaces the default; "+WHILE",
    # which XLA_FLAGS accepts, is refused here.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    ),
    # Matmuls that share an input stay separate. XLA merges the gate and up matmuls of small blocks,
    # and for that concatenates their weights in every iteration: 42 MB are read and written for an
    # expert of width 6,912.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(device: jax.Device) -> dict[str, str | int]:
    """Returns the compiler options of programs on the device: none unless it is a GPU.

    Options that this XLA does not know are left out, and so are those that XLA_FLAGS sets.
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
def _is_known(device: jax.Device, name: str, value: str | int) -> bool:
    """Returns whether XLA accepts an option and its value; compiles a program of one addition."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda a: a + 1).lower(number).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error) or "is not a valid" in str(error):
            return False
        raise
    return True
