"""Devices to a mesh, and where arrays live on it. The one place that knows axis names and axis types, and the one table
from what an axis of an array means to the axes of the mesh.

A batch is spread over every axis. `data` copies parameters, `fsdp` and `expert` share them: outside the experts both
cut the model width; inside, `fsdp` cuts the model width and `expert` the flat hidden axis, by moe.placement.
"""
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modse_jax import chips, processes
from modse_jax.config import Config, UserError
from modse_jax.moe import sizing

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")

RULES = {
    "batch": (DATA, FSDP, EXPERT),
    "embed": (FSDP, EXPERT),       # the model width of everything but experts
    "expert_embed": (FSDP,),       # the model width of experts
    "flat": (EXPERT,),             # the flat hidden axis
    "vocab": (), "heads": (), "head": (),
}

# What the last axes of a parameter mean, by its name; those not named here are small, and everywhere.
PARAMETERS = {
    "embedding": ("vocab", "embed"), "head": ("embed", "vocab"),
    "w_query": ("embed", "heads", "head"), "w_key": ("embed", "heads", "head"),
    "w_value": ("embed", "heads", "head"), "w_out": ("heads", "head", "embed"),
    "w_gate": ("expert_embed", "flat"), "w_up": ("expert_embed", "flat"), "w_down": ("flat", "expert_embed"),
}


def build(config: Config, devices: Sequence[jax.Device] = ()) -> Mesh:
    """The mesh of a run over the given devices, or those there are. Raises UserError where its axes do not make that
    many, or what is cut over them does not divide."""
    devices = list(devices) or jax.devices()
    sizes = _sizes(config, devices)
    mesh = _mesh(devices[:math.prod(sizes)], sizes)
    micro = config.training.batch_size // config.training.gradient_accumulation
    for name, number, axes in (
            ("training.batch_size / training.gradient_accumulation", micro, RULES["batch"]),
            ("evaluation.batch_size", config.evaluation.batch_size, RULES["batch"]),
            ("model.dim", config.model.dim, RULES["embed"])):
        ways = math.prod(mesh.shape[a] for a in axes)
        if number % ways:
            over = " * ".join(f"mesh.{a}={mesh.shape[a]}" for a in axes)
            raise UserError(f"{name}={number} does not divide over {over} = {ways} devices")
    try:
        placement(config, mesh)
    except ValueError as error:
        raise UserError(f"mesh.expert={mesh.shape[EXPERT]}: {error}") from None
    return mesh


def _sizes(config, devices):
    asked = [getattr(config.mesh, a) for a in AXES]
    known = math.prod(n for n in asked if n != -1)
    rest = len(devices) // known
    sizes = [rest if n == -1 else n for n in asked]
    text = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, asked))
    if -1 in asked and (rest == 0 or len(devices) % known):
        raise UserError(f"{text}: {known} does not divide the {len(devices)} {devices[0].platform} device(s) that this "
                        "process sees")
    if math.prod(sizes) > len(devices):
        raise UserError(f"{text} make {math.prod(sizes)}, but this process sees {len(devices)} {devices[0].platform} "
                        "device(s)")
    if math.prod(sizes) < len(devices) and processes.several():
        raise UserError(f"{text} make {math.prod(sizes)}, fewer than the {len(devices)} devices of all processes; one "
                        "axis of -1 takes the rest")
    return sizes


def for_batch(batch_size: int) -> Mesh:
    """A mesh over as many devices as divide a batch, parameters on each: evaluation runs on any machine. Raises
    UserError where several processes would not all have a part."""
    devices = jax.devices()
    size = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if processes.several() and size < len(devices):
        raise UserError(f"a batch of {batch_size} does not divide over the {len(devices)} devices of all processes; "
                        "give --batch_size that does")
    return _mesh(devices[:size], (size, 1, 1))


def _mesh(devices, sizes):
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def placement(config: Config, mesh: Mesh | None) -> sizing.Placement:
    """The experts' columns on the shards of the expert axis. Raises ValueError where they cannot be placed."""
    return sizing.place(config.widths, mesh.shape[EXPERT] if mesh is not None else 1, config.moe.placement)


def chip(mesh: Mesh | None) -> str:
    """What the mesh (None: the default device) is made of: see chips.name."""
    return chips.name(mesh.devices.flat[0] if mesh is not None else jax.devices()[0])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices."""
    return NamedSharding(mesh, spec(("batch",)))


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which rows of a batch of that many live on this process's devices."""
    slices = batch(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in slices for row in range(*rows.indices(count))})


def place(mesh: Mesh, rows: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
    """A batch of `count` rows over all devices, from the rows of this process (local_rows)."""
    return {name: jax.make_array_from_process_local_data(batch(mesh), a, (count, *a.shape[1:]))
            for name, a in rows.items()}


def spec(meanings: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes of an array's axes. Raises ValueError where one mesh axis would cut two of them."""
    axes = [RULES[m] for m in meanings]
    used = [a for group in axes for a in group]
    if len(set(used)) < len(used):
        raise ValueError(f"axes {meanings} would be cut over {used}: one mesh axis cuts one axis of an array")
    return PartitionSpec(*axes)


def parameter_spec(name: str, rank: int) -> PartitionSpec:
    """Of the parameter (or optimiser moment) of that name; axes before those of PARAMETERS are whole."""
    meanings = PARAMETERS.get(name, ())
    return PartitionSpec(*[None] * (rank - len(meanings)), *spec(meanings))


def flat_axis(name: str) -> int | None:
    """Which axis of the parameter of that name is the flat hidden one, from the end; None for those without."""
    meanings = PARAMETERS.get(name, ())
    return meanings.index("flat") - len(meanings) if "flat" in meanings else None


def shardings(mesh: Mesh, tree):
    """NamedShardings for a tree of arrays, each by the last key of its path."""
    def one(path, leaf):
        return NamedSharding(mesh, parameter_spec(str(getattr(path[-1], "key", "")), len(leaf.shape)))
    return jax.tree_util.tree_map_with_path(one, tree)


def request_determinism(config: Config) -> None:
    """Sets the XLA flag for deterministic GPU operations; must run before the first use of a device."""
    flag = "--xla_gpu_deterministic_ops=true"
    if config.training.deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
