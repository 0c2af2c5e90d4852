"""Configs on meshes of virtual CPU devices, and their compiled steps."""

import dataclasses
import functools

import jax

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.training import train_step
from tests.helpers.configs import tiny_config

MESHES = {  # (data, fsdp, expert), placement
    "8 data": ((8, 1, 1), "whole"),
    "8 fsdp": ((1, 8, 1), "whole"),
    "2 data x 4 expert": ((2, 1, 4), "whole"),
    "2 x 2 x 2": ((2, 2, 2), "whole"),
    "8 expert, split": ((1, 1, 8), "split"),
    "2 data x 4 expert, rows sent": ((2, 1, 4), "whole", "all_to_all"),
}


WIDTHS = (16, 32, 8, 16, 16, 16, 8, 16)  # placed by search; not as many experts on every shard


def config_on(sizes=(1, 1, 1), placement="whole", exchange="auto", **moe):
    config = tiny_config(
        training=dict(batch_size=16),
        advanced=dict(loss_chunk=16, saved_activations=1.25 if sizes == (2, 1, 4) else 0.0),
        moe=dict(
            dict(
                num_experts=8,
                widths=WIDTHS,
                pairs=False,
                backend="blocked",
                router_noise="learned",
                z_loss_weight=0.01,
                placement=placement,
                exchange=exchange,
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
