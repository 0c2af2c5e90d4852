"""The selection of kernels for a run, and its self-test."""

import dataclasses

import jax

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.model import kernel_selection
from modse_jax.model.attention import cudnn_attention
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config


def test_evaluation_has_a_capacity_of_its_own_and_generation_has_none():
    config = tiny_config()
    with_capacity = tiny_config(moe=dict(capacity_factor=0.5))
    expected = dataclasses.replace(with_capacity, moe=config.moe)
    assert kernel_selection.for_evaluation(with_capacity) == expected
    with_both = tiny_config(moe=dict(exchange="all_to_all"), evaluation=dict(capacity_factor=1.5))
    evaluation = kernel_selection.for_evaluation(with_both).moe
    assert evaluation.capacity_factor == 1.5
    assert evaluation.exchange == "gather"
    generation = kernel_selection.for_generation(with_both).moe
    assert generation.capacity_factor == 0
    assert generation.exchange == "all_to_all"


def test_cudnn_attention_is_checked_before_training_and_evaluation(monkeypatch):
    """The check runs if the mesh is of a GPU with cuDNN, and only then."""
    config = tiny_config(model=dict(dim=128, num_heads=2, dtype="bfloat16"))
    one_device = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1))
    mesh = device_mesh.build_mesh(one_device, jax.devices()[:1])
    calls = []
    monkeypatch.setattr(cudnn_attention, "check_cudnn", lambda *args: calls.append(args))
    monkeypatch.setattr(cudnn_attention, "cudnn_version", lambda: 92801)
    assert kernel_selection.check_kernels(config, mesh).attention == "blocks"
    assert not calls
    monkeypatch.setattr(sharding, "chip_name", lambda _: "h100")
    for checked in (config, kernel_selection.for_evaluation(config)):
        assert kernel_selection.check_kernels(checked, mesh).attention == "cudnn"
    assert calls == 2 * [((2, 2, 64), config.data.sequence_length)]
