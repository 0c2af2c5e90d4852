"""Checks that a run makes before it writes anything."""

import contextlib
import pathlib
import shutil
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from modse_jax.config import device_mesh
from modse_jax.config.loading import to_flat_dict
from modse_jax.config.options import Config
from modse_jax.data import training_data
from modse_jax.errors import NoRoomError, UserError
from modse_jax.model import kernel_selection
from modse_jax.moe.expert_placement import Placement
from modse_jax.runtime import memory_usage, processes
from modse_jax.training import train_step, workdir_checks
from modse_jax.training.train_step import State

MIB = 2**20
GIB = 2**30


class Setup(NamedTuple):
    """Results of the checks that the run uses later.

    Attributes:
      mesh: the device mesh.
      placement: the placement of experts on the mesh.
      state_shapes: shapes, types and shardings of the state.
      kernels: the selected expert and attention kernels.
    """

    mesh: Mesh
    placement: Placement
    state_shapes: State
    kernels: kernel_selection.SelectedKernels


def run_preflight_checks(config: Config, workdir: pathlib.Path) -> Setup:
    """Makes every check that is possible before data is read.

    Args:
      config: the config.
      workdir: the directory of the run.

    Raises:
      UserError: on every process, if a check fails on any of them, or if their options, workdirs or
        code differ.
    """
    setup = processes.on_all_processes(lambda: _check(config, workdir))
    facts = {name: repr(value) for name, value in to_flat_dict(config).items()}
    facts["--workdir"] = str(workdir)
    facts["the code of modse_jax"] = processes.source_digest()
    processes.assert_same(facts)
    return setup


def _check(config: Config, workdir: pathlib.Path) -> Setup:
    mesh = device_mesh.build_mesh(config)
    placement = device_mesh.place_experts_on_mesh(config, mesh)
    kernels = kernel_selection.check_kernels(config, mesh)
    _check_validation_kernels(config, mesh)
    workdir_checks.check_workdir(workdir, config)
    training_data.check_source(config, workdir)
    state_shapes = train_step.state_shapes(config, mesh)
    _check_free_space(workdir, state_shapes, config.checkpoint.keep)
    return Setup(mesh, placement, state_shapes, kernels)


def _check_validation_kernels(config: Config, mesh: Mesh) -> None:
    """Tests the kernels that validation uses, if they are others than those of training."""
    evaluation = kernel_selection.for_evaluation(config)
    training_kernels = (config.moe.backend, config.model.attention)
    evaluation_kernels = (evaluation.moe.backend, evaluation.model.attention)
    if evaluation_kernels != training_kernels:
        kernel_selection.check_kernels(evaluation, mesh)


def _check_free_space(workdir: pathlib.Path, state_shapes: State, keep: int) -> None:
    """Checks that the disk has room for the `keep` newest checkpoints, and for one more."""
    state_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state_shapes))
    needed = (keep + 1) * state_bytes
    free = shutil.disk_usage(workdir_checks.nearest_existing_parent(workdir)).free
    if free + _saved_bytes(workdir) < needed:
        raise NoRoomError(
            f"--workdir={workdir} has {free / MIB:,.0f} MiB free, but {keep + 1} checkpoints of "
            f"{state_bytes / MIB:,.0f} MiB need {needed / MIB:,.0f} MiB; free some space, lower "
            "checkpoint.keep, or use another --workdir"
        )


def _saved_bytes(workdir: pathlib.Path) -> int:
    """Returns the bytes of the checkpoints on disk, which new ones will replace."""
    total = 0
    for file in (workdir / "checkpoints").glob("[0-9]*/**/*"):
        # A file can disappear if another run uses this workdir. The lock reports that later.
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def check_step_memory(compiled_step: jax.stages.Compiled, mesh: Mesh) -> None:
    """Checks that the devices of this process have the memory that a compiled step needs.

    Raises:
      UserError: they have less memory.
    """
    needed = memory_usage.peak_bytes(compiled_step)
    if needed is None:
        return
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # All CPU devices of a process share the memory of the host.
        needed *= len(mesh.local_devices)
        available = memory_usage.host_memory_bytes()
    else:
        available = (device.memory_stats() or {}).get("bytes_limit", needed)
    if needed > available:
        raise UserError(
            f"a step needs about {needed / GIB:.1f} GiB on {device.device_kind}, which has "
            f"{available / GIB:.1f}; lower training.batch_size or raise "
            "training.gradient_accumulation, set model.remat=full, or share parameters with "
            "mesh.fsdp"
        )
