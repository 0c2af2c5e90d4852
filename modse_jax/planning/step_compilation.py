"""Compiles the training step of a config for a topology, and collects what the compiler reports."""

import pathlib
import re
import tempfile
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from modse_jax.config.options import Config
from modse_jax.errors import UserError, describe_exception
from modse_jax.planning import gpu_compiler
from modse_jax.planning.topologies import Topology
from modse_jax.runtime import memory_usage
from modse_jax.training import train_step

# Finds the needed memory in the errors of XLA's compilers for a program that needs too much:
#   RESOURCE_EXHAUSTED: ... Used 30.51G of 15.75G hbm.
#   RESOURCE_EXHAUSTED: ... required to allocate (18.25G) ...
NEEDED_MEMORY = re.compile(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CompiledStep(NamedTuple):
    """Facts that the compiler reports about a training step, per device."""

    peak_bytes: float | None  # None if the step does not fit and the compiler names no number
    temporary_bytes: int | None = None  # None if the step does not fit
    hlo: str = ""  # the text of the compiled program; "" if the step does not fit
    launches: gpu_compiler.Launches | None = None  # on a GPU, if XLA listed them

    @property
    def has_enough_memory(self) -> bool:
        """False if the compiler refused the program because the device has too little memory."""
        return self.temporary_bytes is not None


def compile_step(config: Config, mesh: Mesh, topology: Topology) -> CompiledStep:
    """Compiles the training step of a config for the devices of a mesh.

    Args:
        config: the config.
        mesh: the mesh of the topology's devices.
        topology: the topology.

    Raises:
        UserError: the compiler of a GPU fails.
    """
    if topology.kind == "cpu":
        compiled = train_step.compile_train_step(config, mesh)
        return _describe(compiled, compiled.as_text())
    with tempfile.TemporaryDirectory() as folder:
        if topology.kind == "gpu":
            return _compile_for_gpu(config, mesh, topology, folder)
        return _compile_for_tpu(config, mesh, folder)


def _describe(
    compiled: jax.stages.Compiled, hlo: str | None, launches: gpu_compiler.Launches | None = None
) -> CompiledStep:
    """Returns what a compiler reports. Those of CPU, GPU and TPU report memory and program."""
    analysis = compiled.memory_analysis()
    if analysis is None or hlo is None:
        raise RuntimeError("the compiler reports neither memory nor the program")
    peak_bytes = memory_usage.peak_bytes(compiled)
    return CompiledStep(peak_bytes, analysis.temp_size_in_bytes, hlo, launches)


def _compile_for_gpu(config: Config, mesh: Mesh, topology: Topology, folder: str) -> CompiledStep:
    options = gpu_compiler.compile_options(config.training.deterministic, folder)
    try:
        with gpu_compiler.assume_cudnn():
            compiled = train_step.compile_train_step(config, mesh, options)
    except jax.errors.JaxRuntimeError as error:
        reason = describe_exception(error).splitlines()[0][:300]
        raise UserError(
            f"--plan={topology.name}: XLA cannot compile the step ({reason}); "
            "choose another moe.backend or model.attention"
        ) from None
    try:
        launches = gpu_compiler.read_launches(folder)
    except FileNotFoundError:
        launches = None
    return _describe(compiled, compiled.as_text(), launches)


def _compile_for_tpu(config: Config, mesh: Mesh, folder: str) -> CompiledStep:
    # jaxlib cannot parse everything that libtpu returns, so libtpu writes the program to a file.
    options: dict[str, str | int] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        compiled = train_step.compile_train_step(config, mesh, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return CompiledStep(peak_bytes=_read_needed_memory(str(error)))
    (file,) = pathlib.Path(folder).glob("*.jit_step.*after_optimizations.txt")
    return _describe(compiled, file.read_text(encoding="utf-8"))


def _read_needed_memory(message: str) -> float | None:
    """Returns the bytes that the compiler says a program needs, or None."""
    needed = NEEDED_MEMORY.search(message)
    return float(needed.group(1)) * UNITS[needed.group(2)] if needed else None
