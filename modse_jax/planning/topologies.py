"""Names of hardware topologies to plan for, and devices to compile for.

A topology is one of

    v5e:4x4        a TPU slice, compiled by libtpu
    gpu:h100x8     one host with 8 GPUs (gpu:h100 is one GPU), compiled by XLA's CUDA plugin
    gpu:h100:2x8   2 hosts with 8 GPUs each, joined by a network (chips.Chip.network_terabytes)
    cpu:8          that many virtual CPU devices
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from modse_jax.errors import UserError, describe_exception
from modse_jax.planning import gpu_compiler

# The most GPUs that NVLink connects on one host, for all GPUs of gpu_compiler.GPU_TARGETS.
MAX_GPUS_PER_HOST = 8

GPUS = ", ".join(f"gpu:{gpu}" for gpu in gpu_compiler.GPU_TARGETS)

KNOWN = (
    "v4:2x2x1 ... v4:8x8x16, v5e:1x1 ... v5e:16x16, v5p:2x2x1 ... v5p:16x16x16, "
    f"v6e:1x1 ... v6e:16x16, cpu:N, and {GPUS}, each alone, with xN for N devices of one host, "
    "or with :HOSTSxN (gpu:h100:2x8)"
)

# Matches v5e:4x4 and v5p:2x2x4.
TPU_NAME = re.compile(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)")

# Matches cpu:8.
CPU_NAME = re.compile(r"cpu:([1-9]\d*)")

# Matches gpu:h100, gpu:h100x8 and gpu:h100:2x8.
GPU_NAME = re.compile(r"gpu:(\w+?)(?:x([1-9]\d*)|:([1-9]\d*)x([1-9]\d*))?")


class Topology(NamedTuple):
    """The devices that a step is planned for."""

    name: str
    kind: str  # "tpu", "gpu" or "cpu"
    chip: str  # its name in chips.CHIPS, or "cpu"
    num_hosts: int  # 1 for a TPU slice, whose links also connect its hosts
    devices_per_host: int  # 0 for a TPU slice


def parse_topology(name: str) -> Topology:
    """Parses the name of a topology, such as "gpu:h100:2x8".

    Raises:
        UserError: the name has none of the forms in the description of this module.
    """
    tpu = TPU_NAME.fullmatch(name)
    if tpu:
        return Topology(name, "tpu", tpu.group(1), 1, 0)
    cpu = CPU_NAME.fullmatch(name)
    if cpu:
        return Topology(name, "cpu", "cpu", 1, int(cpu.group(1)))
    gpu = GPU_NAME.fullmatch(name)
    if not gpu or gpu.group(1) not in gpu_compiler.GPU_TARGETS:
        raise UserError(f"--plan={name!r} is not a topology; known: {KNOWN}")
    chip, alone, hosts, per_host = gpu.groups()
    topology = Topology(name, "gpu", chip, int(hosts or 1), int(per_host or alone or 1))
    if topology.devices_per_host > MAX_GPUS_PER_HOST:
        raise UserError(
            f"--plan={name!r} has {topology.devices_per_host} GPUs on a host, which can have at "
            f"most {MAX_GPUS_PER_HOST}; write gpu:{chip}:HOSTSxN for several hosts"
        )
    return topology


def list_devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the devices of a topology, for which a program can be compiled.

    Only CPU devices can also run programs; those of other topologies are descriptions.

    Raises:
        UserError: a compiler is missing, or does not know the topology.
    """
    if topology.kind == "gpu":
        return gpu_compiler.describe_topology(
            topology.chip, topology.num_hosts, topology.devices_per_host
        )
    if topology.kind == "tpu":
        return _list_tpu_devices(topology.name)
    return jax.devices()[: topology.devices_per_host]


def _list_tpu_devices(name: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies as jax_topologies

    try:
        return jax_topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu has no error type for this
        reason = describe_exception(error).splitlines()[0][:200]
        is_missing = "libtpu" in reason and "open" in reason
        hint = "pip install libtpu" if is_missing else f"known: {KNOWN}"
        raise UserError(
            f"--plan={name}: libtpu knows no such topology ({reason}); {hint}"
        ) from None
