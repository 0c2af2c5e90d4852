"""TODO"""

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from modse_jax.config import device_mesh
from modse_jax.config.options import ANYWHERE, Config
from modse_jax.errors import UserError
from modse_jax.model.attention import cudnn_attention, selection
from modse_jax.moe.experts import select
from modse_jax.runtime import sharding


class SelectedKernels(NamedTuple):
    """What multiplies in training, "auto" decided. note: why "auto" does not take the chip's kernels for experts, or
    how much they pad."""

    experts: str
    attention: str
    note: str

    def line(self) -> str:
        """Returns the line that a run prints."""
        return (
            f"experts: {self.experts}{self.note and f' ({self.note})'}; attention: {self.attention}"
        )


def select_kernels(config: Config, mesh: Mesh) -> SelectedKernels:
    """Raises UserError where what is asked for does not run on the mesh."""
    m, chip, placement = (
        config.model,
        sharding.chip_name(mesh),
        device_mesh.place_experts_on_mesh(config, mesh),
    )
    job = config.moe.backend, placement, (max_rows_per_device(config, mesh), m.dim), chip, m.dtype
    try:
        select.check_backend(*job)
    except ValueError as error:
        raise UserError(str(error)) from None
    experts, note = select.select_backend(*job)
    shape = 1, config.data.sequence_length, m.num_heads, m.dim // m.num_heads
    return SelectedKernels(
        experts, selection.select_attention(m.attention, shape, chip, m.dtype), note
    )


def check_kernels(config: Config, mesh: Mesh) -> SelectedKernels:
    """Returns `kernels(config, mesh)` after those that have never run on hardware were checked on this device."""
    m, found = config.model, select_kernels(config, mesh)
    if found.experts in select.KERNELS:
        try:
            select.self_test_kernels(
                found.experts,
                device_mesh.place_experts_on_mesh(config, mesh),
                m.dim,
                sharding.chip_name(mesh),
                m.dtype,
            )
        except RuntimeError as error:  # they do not run, or their results are wrong
            raise UserError(str(error)) from None
    if found.attention == "cudnn":
        cudnn_attention.check_cudnn(
            (m.num_heads, m.num_kv_heads or m.num_heads, m.dim // m.num_heads),
            config.data.sequence_length,
        )
    return found


def for_evaluation(config: Config) -> Config:
    """The same model, dropless (with a capacity a token's score would depend on its batch mates), on any device."""
    backend = config.moe.backend if config.moe.backend in ANYWHERE else "auto"
    kind = "blocks" if config.model.attention == "blocks" else "auto"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=kind),
        moe=dataclasses.replace(config.moe, capacity_factor=0.0, backend=backend),
    )


def max_rows_per_device(config: Config, mesh: Mesh) -> int:
    """The most rows that one device's experts are given at once in training, those that belong to nobody included."""
    t = config.training
    tokens = t.batch_size // t.gradient_accumulation * config.data.sequence_length // mesh.size
    return mesh.shape[sharding.EXPERT] * tokens * config.moe.top_k
