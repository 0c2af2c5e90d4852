"""Every form of a block trains, resumes, evaluates, samples and reports."""

import dataclasses

import jax
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.moe import expert_placement
from modse_jax.runtime import sharding
from modse_jax.training import state_arrays, train_step
from modse_jax.training.checkpointing import Checkpoints
from tests.helpers import meshes
from tests.helpers.block_forms import config_of
from tests.helpers.steps import assert_close, batch

TRAINED_FORMS = [("in_layer", "pre"), ("parallel", "post"), ("dense", "post")]


def config_on(kind, norm_position, sizes, remat="none"):
    return dataclasses.replace(
        config_of(
            kind,
            norm_position,
            model=dict(remat=remat),
            moe=dict(
                num_experts=2,
                top_k=1,
                width=16,
                widths=(),
                pairs=False,
                placement="split",
                z_loss_weight=0.01,
            ),
            training=dict(batch_size=16),
        ),
        mesh=MeshConfig(*sizes),
    )


def list_order(config):
    """Returns the canonical index of each stored hidden unit of the experts."""
    placement = device_mesh.place_experts_on_mesh(config, meshes.compiled(config)[0])
    return expert_placement.hidden_unit_order(config.widths, placement)


def train(config, state, first_step, count):
    """Runs steps on the config's mesh; returns (state, losses)."""
    mesh, step, _ = meshes.compiled(config)
    state = jax.device_put(state, sharding.parameter_shardings(mesh, state))
    losses = []
    for number in range(first_step, first_step + count):
        rows = jax.device_put(batch(config, number), sharding.batch_sharding(mesh))
        state, metrics = step(state, rows)
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize("kind, norm_position", TRAINED_FORMS)
def test_a_form_trains_and_resumes_like_one_device_on_every_mesh(kind, norm_position, tmp_path):
    """Saved on 1 x 1 x 8 devices, resumed on 2 x 2 x 2 with rematerialization."""
    alone = config_on(kind, norm_position, (1, 1, 1))
    expected, expected_losses = train(alone, meshes.compiled(alone)[2], 0, 3)

    by_experts = config_on(kind, norm_position, (1, 1, 8))
    state, losses = train(by_experts, meshes.compiled(by_experts)[2], 0, 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if "w_ffn" in path[-1].key:
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
    saved = Checkpoints(tmp_path / "c", order=list_order(by_experts))
    saved.save(state, {"validation_loss": None})
    saved.close()

    mixed = config_on(kind, norm_position, (2, 2, 2), remat="full")
    restored = Checkpoints(tmp_path / "c", read_only=True, order=list_order(mixed))
    state, reason = restored.restore(2, train_step.state_shapes(mixed, meshes.compiled(mixed)[0]))
    restored.close()
    assert not reason
    state, last_losses = train(mixed, state, 2, 1)
    np.testing.assert_allclose(losses + last_losses, expected_losses, atol=1e-5)
    state = state_arrays.to_canonical_order(state, list_order(mixed))
    assert_close(jax.device_get(state.opt_state), jax.device_get(expected.opt_state), 2e-4)
