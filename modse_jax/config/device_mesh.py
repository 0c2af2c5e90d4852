"""Builds the device mesh of a run from its options."""

import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.moe import expert_placement
from modse_jax.runtime import processes
from modse_jax.runtime.sharding import AXES, AXIS_RULES, EXPERT, make_mesh


def build_mesh(config: Config, devices: Sequence[jax.Device] = ()) -> Mesh:
    """Returns the mesh of a run over the given devices, by default all of them.

    Raises:
        UserError: the axes do not fit the number of devices, or an array that is sharded over them
            is not divisible by their number.
    """
    devices = list(devices) or jax.devices()
    sizes = _sizes(config, devices)
    mesh = make_mesh(devices[: math.prod(sizes)], sizes)
    micro = config.training.batch_size // config.training.gradient_accumulation
    for name, number, axes in (
        ("training.batch_size / training.gradient_accumulation", micro, AXIS_RULES["batch"]),
        ("evaluation.batch_size", config.evaluation.batch_size, AXIS_RULES["batch"]),
        ("model.dim", config.model.dim, AXIS_RULES["embed"]),
    ):
        ways = math.prod(mesh.shape[a] for a in axes)
        if number % ways:
            over = " * ".join(f"mesh.{a}={mesh.shape[a]}" for a in axes)
            raise UserError(f"{name}={number} is not divisible by {over} = {ways} devices")
    try:
        place_experts_on_mesh(config, mesh)
    except ValueError as error:
        raise UserError(f"mesh.expert={mesh.shape[EXPERT]}: {error}") from None
    return mesh


def _sizes(config: Config, devices: Sequence[jax.Device]) -> list[int]:
    """Returns the size of every mesh axis, with -1 replaced by the remaining devices."""
    asked = [getattr(config.mesh, a) for a in AXES]
    known = math.prod(n for n in asked if n != -1)
    rest = len(devices) // known
    sizes = [rest if n == -1 else n for n in asked]
    text = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, asked))
    if -1 in asked and (rest == 0 or len(devices) % known):
        raise UserError(
            f"{text}: {known} does not divide the {len(devices)} {devices[0].platform} "
            "device(s) that this process sees"
        )
    if math.prod(sizes) > len(devices):
        raise UserError(
            f"{text} make {math.prod(sizes)}, but this process sees {len(devices)} "
            f"{devices[0].platform} device(s)"
        )
    if math.prod(sizes) < len(devices) and processes.is_multi_process():
        raise UserError(
            f"{text} make {math.prod(sizes)}, fewer than the {len(devices)} devices of all "
            "processes; set one axis to -1 to use all"
        )
    return sizes


def place_experts_on_mesh(config: Config, mesh: Mesh | None) -> expert_placement.Placement:
    """Returns how experts are sharded over the expert axis; ValueError if that is impossible.

    A dense model has no experts on any shard.
    """
    shards = mesh.shape[EXPERT] if mesh is not None else 1
    if config.is_dense:
        return expert_placement.Placement(experts=((),) * shards, widths=((),) * shards)
    return expert_placement.place_experts(config.widths, shards, config.moe.placement)


def request_determinism(config: Config) -> None:
    """Sets the XLA flag for deterministic GPU operations, before the first use of a device."""
    flag = "--xla_gpu_deterministic_ops=true"
    if config.training.deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
