"""Plans a training step for hardware that is not attached.

The training step of a config is compiled for a topology, such as 16 TPU v5e chips, and what it
would need there is reported: memory, FLOPs, communication between devices, and kernel launches.

    python train.py --config=configs/modse_300m_x8.py --plan=v5e:4x4,gpu:h100x8 \
        [--plan_json=FILE] [--config....]

See topologies.py for the names of topologies, and step_plan.StepPlan for the results.
"""

import os
import pathlib
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from modse_jax.config import device_mesh
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import accounting, kernel_selection
from modse_jax.moe import expert_placement
from modse_jax.planning import (
    gpu_compiler,
    hlo_collectives,
    roofline,
    step_compilation,
    step_plan,
    topologies,
)
from modse_jax.planning.hlo_collectives import Collective
from modse_jax.planning.step_plan import StepPlan
from modse_jax.planning.topologies import Topology
from modse_jax.runtime import chips, files, memory_usage, sharding
from modse_jax.training import train_step


class StepFlops(NamedTuple):
    """FLOPs of the model in one training step."""

    per_device: float  # mean over the devices
    max_over_mean: float  # FLOPs of the most loaded device over that mean


def prepare_environment(names: Sequence[str]) -> None:
    """Prepares this process for planning; must run before the first use of a device.

    JAX is set to run on CPU, so that no accelerator of this machine is started, with as many CPU
    devices as the largest CPU topology needs.

    Args:
        names: the names of the topologies to plan for; see topologies.py.
    """
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        JAX_PLATFORMS="cpu",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_STDERR_LOG_LEVEL="3",
    )
    parsed = [topologies.parse_topology(name) for name in names]
    cpus = [topology.devices_per_host for topology in parsed if topology.kind == "cpu"]
    jax.config.update("jax_platforms", "cpu")
    # The plan reads the text of the compiled program, which XLA does not write for a program that
    # it finds in its compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_num_cpu_devices", max(cpus, default=1))
    if any(topology.kind == "gpu" for topology in parsed):
        # XLA would warn of every optimization that needs a real GPU. No error is hidden: errors are
        # raised as exceptions, too.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        gpu_compiler.load_compiler()


def check_arguments(names: Sequence[str], json_path: str) -> None:
    """Checks --plan and --plan_json before minutes are spent on compilation.

    Raises:
        UserError: a topology does not exist or its compiler is missing, or the file cannot be
            written.
    """
    parsed = [topologies.parse_topology(name) for name in names]
    if any(topology.kind == "gpu" for topology in parsed):
        gpu_compiler.find_compiler()
    folder = pathlib.Path(json_path).expanduser().absolute().parent
    if json_path and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"--plan_json={json_path} cannot be written: {folder} is not a writable directory"
        )


def plan_step(config: Config, name: str) -> StepPlan:
    """Compiles the training step of a config for a topology and returns what it needs.

    Raises:
        UserError: the config's mesh does not fit the topology, or the step cannot be compiled.
    """
    topology = topologies.parse_topology(name)
    mesh = device_mesh.build_mesh(config, topologies.list_devices(topology))
    with gpu_compiler.assume_cudnn():  # the planned GPUs will have it
        kernels = kernel_selection.select_kernels(config, mesh)
    state = train_step.state_shapes(config, mesh)
    flops = count_flops(config, mesh)
    plan = StepPlan(
        topology=name,
        devices=mesh.size,
        hosts=topology.num_hosts,
        mesh={axis: mesh.shape[axis] for axis in sharding.AXES},
        moe_backend=kernels.experts,
        attention=kernels.attention,
        parameter_bytes_per_device=_bytes_per_device(state.params),
        optimizer_bytes_per_device=_bytes_per_device(state.opt_state),
        capacity_bytes_per_device=_capacity(topology, mesh),
        flops_per_device=flops.per_device,
        flops_max_over_mean=flops.max_over_mean,
    )
    if kernels.note:
        plan.notes.append(f"moe.backend is {kernels.experts}: {kernels.note}")
    start = time.monotonic()
    step = step_compilation.compile_step(config, mesh, topology)
    plan.compile_seconds = round(time.monotonic() - start, 1)
    plan.peak_bytes_per_device = step.peak_bytes
    if not step.has_enough_memory or step.peak_bytes is None:
        plan.fits = False
        return plan
    plan.activation_bytes_per_device = step.temporary_bytes
    plan.fits = bool(step.peak_bytes <= plan.capacity_bytes_per_device)
    collectives = add_collectives(plan, step.hlo, topology)
    bound = roofline.estimate_roofline(config, topology.chip, plan)
    if bound is not None:
        plan.roofline_step_seconds = bound.seconds
        plan.roofline_bound_by = bound.bound_by
    if topology.kind == "gpu":
        add_launches(plan, step.launches)
        plan.notes += _list_gpu_notes(kernels.attention, collectives, topology)
    return plan


def add_collectives(plan: StepPlan, hlo: str, topology: Topology) -> list[Collective]:
    """Finds the collectives of a compiled training step, and adds their bytes to the plan.

    Args:
        plan: the predicted time and memory of the step. Its fields about communication are set.
        hlo: the text of the compiled step.
        topology: the devices of the step, and how they are connected.

    Returns:
        The collectives, in the order of the text.
    """
    collectives, unknown = hlo_collectives.find_collectives(hlo)
    plan.unknown_collectives = unknown
    plan.notes += [
        f"the bytes of collectives are too low, because one could not be counted: {reason}"
        for reason in unknown
    ]
    plan.collective_bytes_by_kind = hlo_collectives.bytes_by_kind(collectives)
    plan.collective_bytes_between_hosts = 0.0
    if topology.num_hosts > 1:
        plan.collective_bytes_between_hosts = hlo_collectives.bytes_between_hosts(
            collectives, topology.devices_per_host
        )
    return collectives


def add_launches(plan: StepPlan, launches: gpu_compiler.Launches | None) -> None:
    """Adds to the plan how many kernels and CUDA graphs the host launches in a step on a GPU.

    Args:
        plan: the predicted time and memory of the step. Its fields about launches are set; they
            stay None if the launches are unknown.
        launches: the launches; None if XLA wrote no list of them.
    """
    if launches is None:
        plan.notes.append("kernels are not counted: XLA wrote no list of what it launches")
        return
    plan.kernels = launches.kernels
    plan.graph_launches = launches.graphs
    plan.host_waits = launches.host_waits
    plan.open_loops = launches.open_loops
    if launches.open_loops:
        plan.notes.append(
            f"{launches.open_loops} loops outside CUDA graphs have data-dependent trip counts: "
            "kernels, graph launches and host waits are for "
            f"{launches.iterations:g} iteration(s) of each, at every level of nesting"
        )


def write_json(plans: Sequence[StepPlan], path: str) -> None:
    """Writes plans into a JSON file, as a list of dictionaries."""
    rows = [step_plan.to_dict(plan) for plan in plans]
    text = files.format_json(rows, indent=2) + "\n"
    pathlib.Path(path).expanduser().write_text(text, encoding="utf-8")


def count_flops(config: Config, mesh: Mesh) -> StepFlops:
    """Returns the FLOPs of forward and backward pass, without rematerialization.

    The experts of a pool are assumed to receive equally many tokens. Devices then differ only in
    the widths of their experts and, if there are several pools, in how many they have of each.
    """
    length = config.data.sequence_length
    tokens = config.training.batch_size * length / mesh.size
    per_device = accounting.nominal_flops_per_token(config, length) * tokens
    expert_flops = accounting.nominal_expert_flops_per_token(config) * tokens
    placement = device_mesh.place_experts_on_mesh(config, mesh)
    tokens_per_expert = [
        Fraction(pool.top_k, pool.num_experts)
        for pool in config.pools
        for _ in range(pool.num_experts)
    ]
    straggler = expert_placement.straggler_factor(tokens_per_expert, placement)
    return StepFlops(per_device, 1 + expert_flops * (straggler - 1) / per_device)


def _capacity(topology: Topology, mesh: Mesh) -> float:
    """Returns the memory of one device in bytes; CPU devices share that of this machine equally."""
    if topology.chip in chips.CHIPS:
        return chips.CHIPS[topology.chip].gigabytes * 2**30
    return memory_usage.host_memory_bytes() / mesh.size


def _bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of all sharded arrays in a tree."""
    total = 0
    for array in jax.tree.leaves(tree):
        shard_shape = array.sharding.shard_shape(array.shape)
        total += int(np.prod(shard_shape)) * array.dtype.itemsize
    return total


def _list_gpu_notes(
    attention: str, collectives: Sequence[Collective], topology: Topology
) -> list[str]:
    notes = []
    if attention == "cudnn":
        notes.append(
            "the peak does not include the workspace of cuDNN's attention, whose size only a GPU "
            "can report"
        )
    if any(
        collective.kind == "ragged-all-to-all"
        and hlo_collectives.crosses_hosts(collective, topology.devices_per_host)
        for collective in collectives
    ):
        notes.append(
            "a ragged all-to-all crosses hosts, which XLA may refuse at run time; choose a "
            "mesh.expert whose devices share a host, or moe.exchange=gather"
        )
    return notes
