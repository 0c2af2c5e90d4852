"""The Mixture-of-Diverse-Size-Experts layer: route -> dispatch -> expert_ffn -> combine. The only shard_map.

Legend: B batch, L length, T tokens, D model, K top-k, N = T * K routed rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from modse_jax.config import device_mesh
from modse_jax.config.options import Config
from modse_jax.moe import dispatch, exchange, expert_placement, router
from modse_jax.moe.experts import blocked, expert_weights, select
from modse_jax.runtime import sharding


class MoELayer(nnx.Module):
    """(x_BLD, valid_BL) -> (y_BLD, balance loss, z-loss, router statistics).

    Four stages: route every token, sort the routed rows by expert, run every expert over its rows, weight and sum.
    Both losses come unweighted; with a mesh they, and the statistics, are those of the batch over all devices.
    """

    def __init__(self, config: Config, mesh: Mesh | None, rngs: nnx.Rngs):
        D, E = config.model.dim, config.moe.num_experts
        self.config, self.mesh, self.widths = config.moe, mesh, config.widths
        self.eps, self.placement = (
            config.model.norm_eps,
            device_mesh.place_experts_on_mesh(config, mesh),
        )
        normal = functools.partial(_normal, rngs)
        order = np.array(
            expert_placement.hidden_unit_order(self.widths, self.placement)
        )  # the same model on any mesh
        self.w_gate, self.w_up = (
            nnx.Param(normal((D, sum(self.widths)), D**-0.5)[:, order]) for _ in range(2)
        )
        self.w_down = nnx.Param(
            _down_projection(normal, self.widths, D, config.model.num_layers)[order]
        )
        self.router_gate = nnx.Param(normal((D, E), D**-0.5))
        if config.moe.gate_term == "learned":
            self.router_noise = nnx.Param(normal((D, E), 0.1 * D**-0.5))
            self.router_noise_scale = nnx.Param(jnp.ones((E,)))

    def __call__(self, x_BLD, valid_BL):
        routed = self._router()
        experts = expert_weights.ExpertWeights(self.w_gate[...], self.w_up[...], self.w_down[...])
        if self.mesh is None or self.mesh.size == 1:
            return self._local(x_BLD, valid_BL, routed, experts, lambda sums: sums)
        reduce = functools.partial(jax.lax.psum, axis_name=sharding.AXES)
        rows, whole = sharding.partition_spec(("batch",)), PartitionSpec()
        cut = expert_weights.ExpertWeights(
            *(sharding.parameter_partition_spec(name, 2) for name in experts._fields)
        )
        return jax.shard_map(
            functools.partial(self._local, reduce=reduce),
            mesh=self.mesh,
            in_specs=(rows, rows, whole, cut),
            out_specs=(rows, whole, whole, whole),
            check_vma=False,
        )(x_BLD, valid_BL, routed, experts)

    def choices(self, x_BLD):
        """(gates_BLK, ids_BLK) of every token: the same as __call__'s, for looking at."""
        logits_TE = router.gate_logits(x_BLD.reshape(-1, x_BLD.shape[-1]), self._router(), self.eps)
        gates_and_ids = router.gates(
            logits_TE, self.config.top_k, self.config.gate, sharding.chip_name(self.mesh)
        )
        return tuple(a.reshape(*x_BLD.shape[:2], -1) for a in gates_and_ids)

    def _router(self):
        if self.config.gate_term == "learned":
            return router.RouterWeights(
                self.router_gate[...], self.router_noise[...], self.router_noise_scale[...]
            )
        return router.RouterWeights(self.router_gate[...])

    def _local(self, x_BLD, valid_BL, routed, experts, reduce):
        """On one device: its tokens, all of the router, its share of the experts."""
        x_TD, valid_T = x_BLD.reshape(-1, x_BLD.shape[-1]), valid_BL.reshape(-1)
        routing = router.route(
            x_TD, valid_T, routed, self.config, self.eps, sharding.chip_name(self.mesh), reduce
        )
        experts = self._whole_width(
            expert_weights.ExpertWeights(*(w.astype(x_BLD.dtype) for w in experts))
        )
        if len(self.placement.experts) == 1:
            y_TD, dropped = self._experts(
                x_TD, routing.gates_TK, routing.ids_TK, valid_T, experts, 0
            )
        elif self._sends_rows():
            y_TD, dropped = self._sent(x_TD, routing, valid_T, experts)
        else:
            y_TD, dropped = self._gathered(x_TD, routing, valid_T, experts)
        statistics = routing.statistics._replace(dropped=reduce(dropped))
        return y_TD.reshape(x_BLD.shape), routing.balance_loss, routing.z_loss, statistics

    def _whole_width(self, experts):
        """Weights gathered along the model width, in the products' type: half the bytes where that is bfloat16."""
        if self.mesh is None or self.mesh.shape[sharding.FSDP] == 1:
            return experts
        gather = functools.partial(jax.lax.all_gather, axis_name=sharding.FSDP, tiled=True)
        return expert_weights.ExpertWeights(
            *(gather(w, axis=a) for w, a in zip(experts, (0, 0, 1)))
        )

    def _sends_rows(self):
        """moe.exchange, decided: by token vectors sent, 2 K (n - 1) / n against 2 (n - 1)."""
        c = self.config
        able = c.placement == "pairs" and not c.capacity_factor and self._native()
        return c.exchange == "all_to_all" or (
            c.exchange == "auto" and able and c.top_k < len(self.placement.experts)
        )

    def _native(self):
        return self.mesh.devices.flat[0].platform in ("tpu", "gpu")

    def _sent(self, x_TD, routing, valid_T, experts):
        """Every routed row to its expert's shard, and back (exchange.py)."""
        shards, slots = len(self.placement.experts), self.placement.slots
        plan = dispatch.plan_dispatch(
            _global_slots(self.placement)[routing.ids_TK], valid_T, shards * slots
        )
        there, back, rows_S = exchange.plan_sends(
            plan.rows_E.reshape(shards, slots), sharding.EXPERT
        )
        x_RD = dispatch.dispatch(x_TD, plan)
        room = shards * x_TD.shape[0] * min(self.config.top_k, slots)
        x_ND = exchange.send(x_RD, there, back, room, sharding.EXPERT, self._native())
        y_ND = self._products(x_ND, rows_S, experts, jax.lax.axis_index(sharding.EXPERT))
        y_RD = exchange.send(y_ND, back, there, x_RD.shape[0], sharding.EXPERT, self._native())
        return dispatch.combine(y_RD, routing.gates_TK, plan), plan.dropped

    def _gathered(self, x_TD, routing, valid_T, experts):
        """Every shard sees the tokens of all (gather), runs its experts over those that chose them, and the parts of a
        token's sum are added up where it came from (reduce-scatter): 2 (n - 1) token vectors a token, any routing."""
        gather = functools.partial(jax.lax.all_gather, axis_name=sharding.EXPERT, tiled=True)
        shard = jax.lax.axis_index(sharding.EXPERT)
        ids_TK = _local_slots(self.placement)[shard][gather(routing.ids_TK)]
        y_TD, dropped = self._experts(
            gather(x_TD), gather(routing.gates_TK), ids_TK, gather(valid_T), experts, shard
        )
        if self.config.placement == "columns":  # every shard has seen the same drops
            dropped = jnp.where(shard == 0, dropped, 0)
        return jax.lax.psum_scatter(y_TD, sharding.EXPERT, tiled=True), dropped

    def _experts(self, x_TD, gates_TK, ids_TK, valid_T, experts, shard):
        """(y_TD, dropped rows): the gated sum over the shard's experts. ids_TK are places on the shard."""
        limit = dispatch.capacity(
            x_TD.shape[0], len(self.widths), self.config.top_k, self.config.capacity_factor
        )
        plan = dispatch.plan_dispatch(ids_TK, valid_T, self.placement.slots, limit)
        y_ND = self._products(dispatch.dispatch(x_TD, plan), plan.rows_E, experts, shard)
        return dispatch.combine(y_ND, gates_TK, plan), plan.dropped

    def _products(self, x_ND, rows_E, experts, shard):
        blocks = blocked.Blocks(
            self.config.block_rows, self.config.tail_rows, self.config.saved_activations
        )
        return select.expert_ffn(
            x_ND,
            rows_E,
            experts,
            self.placement,
            self.config.backend,
            blocks,
            sharding.chip_name(self.mesh),
            shard,
        )


def _global_slots(placement):
    """Slot of every expert over all shards, int32 [E]: shard * placement.slots + its place there."""
    table = np.zeros(placement.num_experts, np.int32)
    for shard, experts in enumerate(placement.experts):
        table[list(experts)] = shard * placement.slots + np.arange(len(experts))
    return jnp.asarray(table)


def _local_slots(placement):
    """Place of every expert on every shard, int32 [shards, E]; placement.slots where it is not there."""
    table = np.full((len(placement.experts), placement.num_experts), placement.slots, np.int32)
    for shard, experts in enumerate(placement.experts):
        table[shard, list(experts)] = np.arange(len(experts))
    return jnp.asarray(table)


def _normal(rngs, shape, std):
    return std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)


def _down_projection(normal, widths, dim, num_layers):
    """std 1/sqrt(h_e) for expert e, so that wide and narrow experts start with the same output variance (the paper does
    not say; with one std for all, a wide expert speaks louder by its width), over sqrt(2 * layers) for the residual."""
    std_H1 = jnp.repeat(
        jnp.asarray([w**-0.5 for w in widths]), jnp.asarray(widths), total_repeat_length=sum(widths)
    )[:, None]
    return normal((sum(widths), dim), 1.0) * std_H1 / (2 * num_layers) ** 0.5
