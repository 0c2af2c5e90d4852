"""Devices to a mesh, and where arrays live on it. The one place that knows axis names and axis types."""
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modse_jax import chips
from modse_jax.config import Config, UserError

DATA = "data"


def build(config: Config) -> Mesh:
    """A mesh over the first mesh.data devices (all of them for -1). Raises UserError where they do not exist or the
    batch does not divide over them."""
    devices = jax.devices()
    size = len(devices) if config.mesh.data == -1 else config.mesh.data
    if size > len(devices):
        raise UserError(f"mesh.data={size} but this process sees {len(devices)} {devices[0].platform} device(s)")
    micro = config.training.batch_size // config.training.gradient_accumulation
    for name, batch in (("training.batch_size / training.gradient_accumulation", micro),
                        ("evaluation.batch_size", config.evaluation.batch_size)):
        if batch % size:
            raise UserError(f"{name}={batch} does not divide over mesh.data={size} devices")
    return _mesh(devices[:size])


def for_batch(batch_size: int) -> Mesh:
    """A mesh over as many devices as divide a batch: evaluation runs on any machine."""
    devices = jax.devices()
    return _mesh(devices[:max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)])


def _mesh(devices):
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def chip(mesh: Mesh | None) -> str:
    """What the mesh (None: the default device) is made of: see chips.name."""
    return chips.name(mesh.devices.flat[0] if mesh is not None else jax.devices()[0])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
    """Leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def request_determinism(config: Config) -> None:
    """Sets the XLA flag for deterministic GPU operations; must run before the first use of a device."""
    flag = "--xla_gpu_deterministic_ops=true"
    if config.training.deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
