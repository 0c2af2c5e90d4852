"""Device meshes, logical axes, and how arrays are sharded over a mesh.

A logical axis is the meaning of an array dimension, such as "batch" or "vocab". This module alone
defines the names of the mesh axes, and over which of them each logical axis is sharded. Batches are
sharded over every mesh axis. The three mesh axes differ in what they do to parameters:

  data    data parallelism: parameters are replicated.
  fsdp    fully sharded data parallelism: the model dimension of parameters is sharded.
  expert  expert parallelism: the hidden dimension of the experts is sharded, according to
          `moe.placement`; the model dimension of all other parameters is sharded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modse_jax.errors import UserError
from modse_jax.runtime import chips, processes

DATA = "data"
FSDP = "fsdp"
EXPERT = "expert"
AXES = (DATA, FSDP, EXPERT)

# The mesh axes over which each logical axis of an array is sharded.
AXIS_RULES = {
    "batch": (DATA, FSDP, EXPERT),
    "embed": (FSDP, EXPERT),  # model dimension of all parameters except the experts'
    "expert_embed": (FSDP,),  # model dimension of the experts
    "flat": (EXPERT,),  # hidden units of all experts, concatenated
    "hidden": (),  # hidden units of a dense FFN
    "vocab": (),
    "heads": (),
    "head": (),
}

# {name of a parameter: logical axes of its last dimensions}. A dimension before these, that of
# layers, is not sharded. Parameters that are not listed are small and replicated.
PARAMETER_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "w_query": ("embed", "heads", "head"),
    "w_key": ("embed", "heads", "head"),
    "w_value": ("embed", "heads", "head"),
    "w_out": ("heads", "head", "embed"),
    "w_ffn_gate": ("embed", "hidden"),
    "w_ffn_up": ("embed", "hidden"),
    "w_ffn_down": ("hidden", "embed"),
    "w_gate": ("expert_embed", "flat"),
    "w_up": ("expert_embed", "flat"),
    "w_down": ("flat", "expert_embed"),
}


def build_batch_mesh(batch_size: int) -> Mesh:
    """Returns a mesh for evaluation on any machine, with parameters replicated.

    The mesh has as many devices as possible such that the batch size is divisible by their number.

    Raises:
      UserError: there are several processes and some devices would remain unused.
    """
    devices = jax.devices()
    size = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if processes.is_multi_process() and size < len(devices):
        raise UserError(
            f"--batch_size={batch_size} is not divisible by {len(devices)}, the number of devices "
            "of all processes; choose a multiple of it"
        )
    return make_mesh(devices[:size], (size, 1, 1))


def make_mesh(devices: Sequence[jax.Device], sizes: Sequence[int]) -> Mesh:
    """Returns a mesh with axes `AXES` of the given sizes."""
    axis_types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=axis_types)


def chip_name(mesh: Mesh | None) -> str:
    """Returns the name of the chip of a mesh, such as "cpu" or "h100"; None: the default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return chips.chip_name(device)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis is sharded over all devices."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Returns which rows of a batch this process has to load: those of its own devices.

    Args:
      mesh: the mesh.
      count: number of rows of the batch.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    indices = [index for index in slices if index is not None]  # a device of the mesh has one
    return sorted({row for (rows,) in indices for row in range(*rows.indices(count))})


def shard_batch(mesh: Mesh, rows: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
    """Shards a batch of `count` rows over all devices.

    Args:
      mesh: the mesh.
      rows: arrays that hold the rows of this process, as given by `local_rows`.
      count: number of rows of the batch on all processes.
    """
    target = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(target, array, (count, *array.shape[1:]))
        for name, array in rows.items()
    }


def partition_spec(logical_axes: Sequence[str]) -> PartitionSpec:
    """Returns over which mesh axes an array is sharded, given the logical axis of each dimension.

    Raises:
      ValueError: a mesh axis would shard two dimensions of the array.
    """
    mesh_axes = [AXIS_RULES[axis] for axis in logical_axes]
    used = [axis for group in mesh_axes for axis in group]
    if len(set(used)) < len(used):
        raise ValueError(
            f"logical axes {tuple(logical_axes)} would be sharded over {used}; a mesh axis can "
            "shard only one dimension of an array"
        )
    return PartitionSpec(*mesh_axes)


def parameter_partition_spec(name: str, rank: int) -> PartitionSpec:
    """Returns over which mesh axes a parameter, or its optimizer moments, are sharded.

    Args:
      name: the name of the parameter, as in `PARAMETER_AXES`.
      rank: the number of its dimensions, with that of layers if there is one.
    """
    logical_axes = PARAMETER_AXES.get(name, ())
    leading = [None] * (rank - len(logical_axes))
    return PartitionSpec(*leading, *partition_spec(logical_axes))


def flat_axis_of(name: str) -> int | None:
    """Returns the dimension of a parameter that holds the hidden units of all experts.

    The dimension is counted from the end (negative). None if the parameter has no such dimension.
    """
    logical_axes = PARAMETER_AXES.get(name, ())
    if "flat" not in logical_axes:
        return None
    return logical_axes.index("flat") - len(logical_axes)


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the tree of shardings of parameters, gradients or optimizer moments.

    Args:
      mesh: the mesh.
      tree: a tree of arrays, or of their shapes. The last key in the path of an array is the name
        of its parameter.
    """

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", ""))
        return NamedSharding(mesh, parameter_partition_spec(name, len(leaf.shape)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)
