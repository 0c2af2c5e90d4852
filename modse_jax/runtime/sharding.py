"""Devices to a mesh, and where arrays live on it. The one place that knows axis names and axis types, and the one table
from what an axis of an array means to the axes of the mesh.

A batch is spread over every axis. `data` copies parameters, `fsdp` and `expert` share them: outside the experts both
cut the model width; inside, `fsdp` cuts the model width and `expert` the flat hidden axis, by moe.placement.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modse_jax.errors import UserError
from modse_jax.runtime import chips, processes

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")


AXIS_RULES = {
    "batch": (DATA, FSDP, EXPERT),
    "embed": (FSDP, EXPERT),  # the model width of everything but experts
    "expert_embed": (FSDP,),  # the model width of experts
    "flat": (EXPERT,),  # the flat hidden axis
    "vocab": (),
    "heads": (),
    "head": (),
}


# What the last axes of a parameter mean, by its name; those not named here are small, and everywhere.
PARAMETER_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "w_query": ("embed", "heads", "head"),
    "w_key": ("embed", "heads", "head"),
    "w_value": ("embed", "heads", "head"),
    "w_out": ("heads", "head", "embed"),
    "w_gate": ("expert_embed", "flat"),
    "w_up": ("expert_embed", "flat"),
    "w_down": ("flat", "expert_embed"),
}


def build_batch_mesh(batch_size: int) -> Mesh:
    """A mesh over as many devices as divide a batch, parameters on each: evaluation runs on any machine. Raises
    UserError where several processes would not all have a part."""
    devices = jax.devices()
    size = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if processes.is_multi_process() and size < len(devices):
        raise UserError(
            f"a batch of {batch_size} does not divide over the {len(devices)} devices of all processes; "
            "give --batch_size that does"
        )
    return make_mesh(devices[:size], (size, 1, 1))


def make_mesh(devices, sizes):
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def chip_name(mesh: Mesh | None) -> str:
    """What the mesh (None: the default device) is made of: see chips.name."""
    return chips.chip_name(mesh.devices.flat[0] if mesh is not None else jax.devices()[0])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which rows of a batch of that many live on this process's devices."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in slices for row in range(*rows.indices(count))})


def shard_batch(mesh: Mesh, rows: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
    """A batch of `count` rows over all devices, from the rows of this process (local_rows)."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), a, (count, *a.shape[1:]))
        for name, a in rows.items()
    }


def partition_spec(meanings: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes of an array's axes. Raises ValueError where one mesh axis would cut two of them."""
    axes = [AXIS_RULES[m] for m in meanings]
    used = [a for group in axes for a in group]
    if len(set(used)) < len(used):
        raise ValueError(
            f"axes {meanings} would be cut over {used}: one mesh axis cuts one axis of an array"
        )
    return PartitionSpec(*axes)


def parameter_partition_spec(name: str, rank: int) -> PartitionSpec:
    """Of the parameter (or optimiser moment) of that name; axes before those of PARAMETERS are whole."""
    meanings = PARAMETER_AXES.get(name, ())
    return PartitionSpec(*[None] * (rank - len(meanings)), *partition_spec(meanings))


def flat_axis_of(name: str) -> int | None:
    """Which axis of the parameter of that name is the flat hidden one, from the end; None for those without."""
    meanings = PARAMETER_AXES.get(name, ())
    return meanings.index("flat") - len(meanings) if "flat" in meanings else None


def parameter_shardings(mesh: Mesh, tree):
    """NamedShardings for a tree of arrays, each by the last key of its path."""

    def one(path, leaf):
        return NamedSharding(
            mesh, parameter_partition_spec(str(getattr(path[-1], "key", "")), len(leaf.shape))
        )

    return jax.tree_util.tree_map_with_path(one, tree)
