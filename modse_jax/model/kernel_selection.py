"""The kernels of a run: resolves "auto" for experts and attention, and tests them on the device."""

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
    """The implementations that a run uses, with "auto" resolved."""

    experts: str  # a value of moe.backend other than "auto"; "none" for a dense model
    attention: str  # a value of model.attention other than "auto"
    # Why "auto" does not use the chip's kernels for experts, or how many FLOPs they add by padding;
    # else empty.
    note: str

    def line(self) -> str:
        """Returns the line about the implementations that a run prints when it starts."""
        note = f" ({self.note})" if self.note else ""
        return f"experts: {self.experts}{note}; attention: {self.attention}"


def select_kernels(config: Config, mesh: Mesh) -> SelectedKernels:
    """Resolves "auto": returns the implementations of experts and attention for training on a mesh.

    Raises:
        UserError: a requested implementation cannot run on the mesh.
    """
    model = config.model
    chip = sharding.chip_name(mesh)
    experts, note = ("none", "") if config.is_dense else _select_experts(config, mesh, chip)
    head_size = model.dim // model.num_heads
    query_shape = (1, config.data.sequence_length, model.num_heads, head_size)
    attention = selection.select_attention(model.attention, query_shape, chip, model.dtype)
    return SelectedKernels(experts, attention, note)


def _select_experts(config: Config, mesh: Mesh, chip: str) -> tuple[str, str]:
    """Returns the implementation of the experts, and a note on the choice."""
    dtype = config.model.dtype
    backend = config.moe.backend
    placement = device_mesh.place_experts_on_mesh(config, mesh)
    shape_ND = (max_rows_per_device(config, mesh), config.model.dim)
    try:
        select.check_backend(backend, placement, shape_ND, chip, dtype)
    except ValueError as error:
        raise UserError(str(error)) from None
    return select.select_backend(backend, placement, shape_ND, chip, dtype)


def check_kernels(config: Config, mesh: Mesh) -> SelectedKernels:
    """Returns `select_kernels(config, mesh)` after a test of the kernels on this device.

    Expert kernels and cuDNN's attention are run once and compared with their references, because
    a new device or a new version of a library may compute wrong results.

    Raises:
        UserError: the kernels cannot run, or their results are wrong.
    """
    model = config.model
    kernels = select_kernels(config, mesh)
    if kernels.experts in select.KERNELS:
        placement = device_mesh.place_experts_on_mesh(config, mesh)
        chip = sharding.chip_name(mesh)
        try:
            select.self_test_kernels(kernels.experts, placement, model.dim, chip, model.dtype)
        except RuntimeError as error:
            raise UserError(str(error)) from None
    if kernels.attention == "cudnn":
        num_groups = model.num_kv_heads or model.num_heads
        shape = (model.num_heads, num_groups, model.dim // model.num_heads)
        cudnn_attention.check_cudnn(shape, config.data.sequence_length)
    return kernels


def for_evaluation(config: Config) -> Config:
    """Returns the config of the same model for validation and scoring, on any device.

    Backends that need a certain chip become "auto". Experts have the capacity
    `evaluation.capacity_factor`, by default an unlimited one. With a limit, the score of a token
    depends on the other tokens of its batch.
    """
    attention = "blocks" if config.model.attention == "blocks" else "auto"
    backend = config.moe.backend if config.moe.backend in ANYWHERE else "auto"
    capacity_factor = config.evaluation.capacity_factor
    exchange = config.moe.exchange
    if capacity_factor and exchange == "all_to_all":
        exchange = "gather"  # an all-to-all has no capacity
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention),
        moe=dataclasses.replace(
            config.moe, capacity_factor=capacity_factor, backend=backend, exchange=exchange
        ),
    )


def for_generation(config: Config) -> Config:
    """Returns the config of the same model for samples and benchmark tasks: always dropless.

    Their texts are batched by length, so with a capacity the result of a text would depend on
    which other texts happen to share its batch.
    """
    evaluation = dataclasses.replace(config.evaluation, capacity_factor=0.0)
    return for_evaluation(dataclasses.replace(config, evaluation=evaluation))


def max_rows_per_device(config: Config, mesh: Mesh) -> int:
    """Returns the largest number of routed tokens that one device may have to process at a time.

    Routing may send all tokens of the devices along the expert axis to the experts of one device.
    The arrays of the expert FFN have this many rows; those that are not needed are padding.
    """
    micro_batch = config.training.batch_size // config.training.gradient_accumulation
    tokens_per_device = micro_batch * config.data.sequence_length // mesh.size
    return mesh.shape[sharding.EXPERT] * tokens_per_device * config.top_k
