"""The Mixture-of-Diverse-Size-Experts layer: route -> dispatch -> expert_ffn -> combine. The only shard_map.

Legend: B batch, L length, T tokens, D model, K top-k, N = T * K routed rows.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from modse_jax import mesh as meshes
from modse_jax.config import Config
from modse_jax.mesh import DATA
from modse_jax.moe import dispatch, expert_ffn, router


class MoELayer(nnx.Module):
    """(x_BLD, valid_BL) -> (y_BLD, balance loss, z-loss, router statistics).

    Four stages: route every token, sort the routed rows by expert, run every expert over its rows, weight and sum.
    Both losses come unweighted; with a mesh they, and the statistics, are those of the batch over all devices.
    """

    def __init__(self, config: Config, mesh: Mesh | None, rngs: nnx.Rngs):
        D, E = config.model.dim, config.moe.num_experts
        self.config, self.mesh, self.widths = config.moe, mesh, config.widths
        self.eps = config.model.norm_eps
        normal = functools.partial(_normal, rngs)
        self.w_gate, self.w_up = (nnx.Param(normal((D, sum(self.widths)), D**-0.5)) for _ in range(2))
        self.w_down = nnx.Param(_down_projection(normal, self.widths, D, config.model.num_layers))
        self.router_gate = nnx.Param(normal((D, E), D**-0.5))
        if config.moe.gate_term == "learned":
            self.router_noise = nnx.Param(normal((D, E), 0.1 * D**-0.5))
            self.router_noise_scale = nnx.Param(jnp.ones((E,)))

    def __call__(self, x_BLD, valid_BL):
        routed = router.RouterWeights(self.router_gate[...])
        if self.config.gate_term == "learned":
            routed = router.RouterWeights(
                self.router_gate[...], self.router_noise[...], self.router_noise_scale[...])
        experts = expert_ffn.ExpertWeights(self.w_gate[...], self.w_up[...], self.w_down[...])
        if self.mesh is None or self.mesh.size == 1:
            return self._local(x_BLD, valid_BL, routed, experts, lambda sums: sums)
        reduce = functools.partial(jax.lax.psum, axis_name=DATA)
        rows, whole = PartitionSpec(DATA), PartitionSpec()
        return jax.shard_map(
            functools.partial(self._local, reduce=reduce), mesh=self.mesh, in_specs=(rows, rows, whole, whole),
            out_specs=(rows, whole, whole, whole), check_vma=False)(x_BLD, valid_BL, routed, experts)

    def _local(self, x_BLD, valid_BL, routed, experts, reduce):
        B, L, D = x_BLD.shape
        x_TD, valid_T = x_BLD.reshape(B * L, D), valid_BL.reshape(B * L)
        routing = router.route(x_TD, valid_T, routed, self.config, self.eps, reduce)
        limit = dispatch.capacity(B * L, len(self.widths), self.config.top_k, self.config.capacity_factor)
        plan = dispatch.plan(routing.ids_TK, valid_T, len(self.widths), limit)
        blocks = expert_ffn.Blocks(self.config.block_rows, self.config.tail_rows, self.config.saved_activations)
        y_ND = expert_ffn.expert_ffn(dispatch.dispatch(x_TD, plan), plan.rows_E, experts, self.widths,
                                     self.config.backend, blocks, meshes.chip(self.mesh))
        y_TD = dispatch.combine(y_ND, routing.gates_TK, plan)
        statistics = routing.statistics._replace(dropped=reduce(plan.dropped))
        return y_TD.reshape(B, L, D), routing.balance_loss, routing.z_loss, statistics


def _normal(rngs, shape, std):
    return std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)


def _down_projection(normal, widths, dim, num_layers):
    """std 1/sqrt(h_e) for expert e, so that wide and narrow experts start with the same output variance (the paper does
    not say; with one std for all, a wide expert speaks louder by its width), over sqrt(2 * layers) for the residual."""
    std_H1 = jnp.repeat(jnp.asarray([w**-0.5 for w in widths]), jnp.asarray(widths),
                        total_repeat_length=sum(widths))[:, None]
    return normal((sum(widths), dim), 1.0) * std_H1 / (2 * num_layers) ** 0.5


