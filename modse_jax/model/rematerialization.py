"""Activation checkpointing: which activations a block of the transformer saves for backward."""

from collections.abc import Callable

import jax
import jax.extend
from jax.sharding import Mesh

from modse_jax.config.options import REMATS
from modse_jax.moe.router import ROUTING
from modse_jax.runtime import choices, sharding


def checkpoint_policy(remat: str, mesh: Mesh | None) -> Callable | None:
    """Returns the policy for `jax.checkpoint`, or None to save all activations.

    Every policy saves the routing decisions. If they were recomputed, XLA might add in another
    order, and a near tie could send a token to another expert than in the forward pass.

    Args:
        remat: the option model.remat:
            "none": saves all activations. With fully sharded data parallelism, a block all-gathers
                its weights again in the backward pass; otherwise the gathered weights of all layers
                would be in memory at once.
            "full": recomputes each block, saving only its routing decisions.
            "save_routing_and_dots": like "full", but also saves the results of matmuls without
                batch dimensions.
        mesh: the devices; None for one device.
    """
    choices.check(REMATS, "model.remat", remat)
    if remat == "none":
        gathers_weights = mesh is not None and mesh.shape[sharding.FSDP] > 1
        return _save_all_but_gathered_weights if gathers_weights else None
    save_routing = jax.checkpoint_policies.save_only_these_names(ROUTING)
    if remat == "full":
        return save_routing
    save_matmuls = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint_policies.save_from_both_policies(save_routing, save_matmuls)


def _save_all_but_gathered_weights(primitive: jax.extend.core.Primitive, *_, **params) -> bool:
    return not (primitive.name == "all_gather" and sharding.FSDP in params["axis_name"])
