"""Configs on meshes of virtual CPU devices, and their compiled steps."""

import dataclasses
import functools

import jax

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.training import train_step
from tests.helpers.configs import tiny_config

MESHES = {  # (data, fsdp, expert), placement
    "8 data": ((8, 1, 1), "pairs"),
    "8 fsdp": ((1, 8, 1), "pairs"),
    "2 data x 4 expert": ((2, 1, 4), "pairs"),
    "2 x 2 x 2": ((2, 2, 2), "pairs"),
    "8 expert, columns": ((1, 1, 8), "columns"),
    "2 data x 4 expert, rows sent": ((2, 1, 4), "pairs", "all_to_all"),
}


WIDTHS = (16, 32, 8, 16, 16, 16, 8, 16)  # placed by search; not as many experts on every shard


def config_on(sizes=(1, 1, 1), placement="pairs", exchange="auto", **moe):
    config = tiny_config(
        training=dict(batch_size=16, loss_chunk=16),
        moe=dict(
            dict(
                num_experts=8,
                widths=WIDTHS,
                pairs=False,
                backend="blocked",
                gate_term="learned",
                z_loss_weight=0.01,
                placement=placement,
                exchange=exchange,
                saved_activations=1.25 if sizes == (2, 1, 4) else 0.0,
            ),
            **moe,
        ),
    )
    model = dataclasses.replace(config.model, remat="full" if sizes == (2, 2, 2) else "none")
    return dataclasses.replace(config, mesh=MeshConfig(*sizes), model=model)


@functools.cache
def compiled(config):
    """Returns (mesh, compiled step, initial state) of a config.

    The state is on the host, because a step donates the state that it gets.
    """
    mesh = device_mesh.build_mesh(config)
    return (
        mesh,
        train_step.compile_train_step(config, mesh),
        jax.device_get(train_step.init_sharded_state(config, mesh)),
    )
