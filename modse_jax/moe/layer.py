"""The mixture-of-experts layer: route, dispatch, expert FFN, combine.

    route(x_TD)                      -> gates_TK, ids_TK, losses, statistics      router.py
    plan_dispatch(ids_TK)            -> order_N, rows_E, dropped_K                dispatch.py
    expert_ffn(x_ND, rows_E, weights) -> y_ND                                     experts/
    combine(y_ND, gates_TK, plan)    -> y_TD                                      dispatch.py

The experts may be divided into pools, each with its own router. All pools share the dispatch, the
expert FFN and the combination. Experts of width 0 take part in the routing alone: their output is
0, or the input of the layer ("copy experts").

On a mesh, the layer runs inside one shard_map over all axes. Tokens are sharded over every axis;
the router is replicated; the experts' weights are sharded over `expert` along the flat hidden
axis (expert parallelism) and over `fsdp` along the model dimension.

Legend: B batch, L length, T tokens, D model, E experts, H flat hidden axis, K top-k, P pools,
N = T * K routed tokens, R routed tokens before they are sent, S slots of a shard.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from modse_jax.moe import dispatch, exchange, expert_placement, expert_widths, router
from modse_jax.moe.experts import select
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.moe.layer_options import ExpertOptions, RouterOptions, pool_ranges
from modse_jax.runtime import sharding


class LayerOutput(NamedTuple):
    """The result of a layer. Losses and statistics are those of the batch over all devices."""

    y_BLD: jax.Array
    balance_loss: jax.Array  # load-balancing loss, unweighted
    z_loss: jax.Array  # router z-loss, unweighted
    width_penalty: jax.Array  # width penalty, unweighted
    statistics: router.RouterStatistics


class MoELayer(nnx.Module):
    """A mixture-of-experts layer whose experts may have different widths.

    Every expert is a SwiGLU FFN without biases. The weights of all experts lie side by side on one
    flat hidden axis, so that no memory is spent on padding to the widest expert.

    Args:
        dim: model dimension D.
        widths: number of hidden units of every expert; 0 for a zero or copy expert.
        router: how tokens are routed; None for the default options.
        experts: how the experts are computed; None for the default options.
        num_layers: layers of the entire model. The output of the experts is initialized
            1 / sqrt(2 * num_layers) as large, as residual branches often are.
        init_std: standard deviation of every initial matrix; 0 for the rule of each matrix.
        mesh: the devices, with the axes `data`, `fsdp` and `expert` (see runtime/sharding.py);
            None for one device.
        rngs: a source of `params` keys. The initial weights do not depend on the mesh.
    """

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        router: RouterOptions | None = None,
        experts: ExpertOptions | None = None,
        *,
        num_layers: int = 1,
        init_std: float = 0.0,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.widths = tuple(widths)
        self.router_options = router or RouterOptions()
        self.options = experts or ExpertOptions()
        self.mesh = mesh
        num_experts = len(self.widths)
        self.pools = self.router_options.pools_of(num_experts)
        expert_widths.check_copy_experts(self.options.copy_experts, self.widths)
        shards = 1 if mesh is None else mesh.shape[sharding.EXPERT]
        self.placement = expert_placement.place_experts(self.widths, shards, self.options.placement)

        num_hidden = sum(self.widths)
        # Weights are drawn in the order of the experts and stored in the order of the placement,
        # so that the model is the same on every mesh.
        order = np.array(expert_placement.hidden_unit_order(self.widths, self.placement))
        input_std = init_std or dim**-0.5
        w_gate = _draw_normal(rngs, (dim, num_hidden), input_std)
        self.w_gate = nnx.Param(w_gate[:, order])
        w_up = _draw_normal(rngs, (dim, num_hidden), input_std)
        self.w_up = nnx.Param(w_up[:, order])
        if init_std:
            w_down = _draw_normal(rngs, (num_hidden, dim), init_std)
        else:
            w_down = _draw_down_projection(rngs, self.widths, dim, num_layers)
        self.w_down = nnx.Param(w_down[order])
        self.router_gate = nnx.Param(_draw_normal(rngs, (dim, num_experts), input_std))
        if self.router_options.router_noise == "learned":
            noise_std = init_std or 0.1 * dim**-0.5
            noise = _draw_normal(rngs, (dim, num_experts), noise_std)
            self.router_noise = nnx.Param(noise)
            self.router_noise_scale = nnx.Param(jnp.ones((num_experts,)))

    def __call__(
        self,
        x_BLD: jax.Array,
        valid_BL: jax.Array | None = None,
        router_bias_E: jax.Array | None = None,
    ) -> LayerOutput:
        """Runs the layer.

        Args:
            valid_BL: False for padding, which is routed to no expert; None if there is none.
            router_bias_E: is added to the scores that experts are chosen by; None for no bias.
        """
        if valid_BL is None:
            valid_BL = jnp.ones(x_BLD.shape[:2], bool)
        router_weights = self._router_weights()
        experts = ExpertWeights(self.w_gate[...], self.w_up[...], self.w_down[...])
        if self.mesh is None or self.mesh.size == 1:
            return self._run_on_device(
                x_BLD, valid_BL, router_bias_E, router_weights, experts, reduce=lambda sums: sums
            )
        batch = sharding.partition_spec(("batch",))
        replicated = PartitionSpec()
        expert_specs = ExpertWeights(
            *(sharding.parameter_partition_spec(name, rank=2) for name in experts._fields)
        )
        sum_over_mesh = functools.partial(jax.lax.psum, axis_name=sharding.AXES)
        run = jax.shard_map(
            functools.partial(self._run_on_device, reduce=sum_over_mesh),
            mesh=self.mesh,
            in_specs=(batch, batch, replicated, replicated, expert_specs),
            out_specs=LayerOutput(batch, *[replicated] * (len(LayerOutput._fields) - 1)),
            check_vma=False,
        )
        return run(x_BLD, valid_BL, router_bias_E, router_weights, experts)

    def choose_experts(
        self, x_BLD: jax.Array, router_bias_E: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns gates and ids of the experts that __call__ chooses, both [B, L, K]."""
        options = self.router_options
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        logits_TE = router.compute_logits(
            x_TD, self._router_weights(), options.norm_eps, pool_ranges(self.pools)
        )
        gates_TK, ids_TK = router.choose_experts(
            logits_TE, options, sharding.chip_name(self.mesh), router_bias_E
        )
        shape = (*x_BLD.shape[:2], self.top_k)
        return gates_TK.reshape(shape), ids_TK.reshape(shape)

    @property
    def top_k(self) -> int:
        """The number of experts that a token is routed to, over all pools."""
        return sum(pool.top_k for pool in self.pools)

    def _router_weights(self) -> router.RouterWeights:
        if self.router_options.router_noise == "none":
            return router.RouterWeights(self.router_gate[...])
        return router.RouterWeights(
            self.router_gate[...], self.router_noise[...], self.router_noise_scale[...]
        )

    def _run_on_device(
        self,
        x_BLD: jax.Array,
        valid_BL: jax.Array,
        router_bias_E: jax.Array | None,
        router_weights: router.RouterWeights,
        experts: ExpertWeights,
        reduce: Callable,
    ) -> LayerOutput:
        """Runs the layer for the tokens of one device, with its shard of the experts."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        valid_T = valid_BL.reshape(-1)
        chip = sharding.chip_name(self.mesh)
        routing = router.route(
            x_TD,
            valid_T,
            router_weights,
            self.router_options,
            self.widths,
            chip,
            reduce,
            router_bias_E,
            num_sequences=x_BLD.shape[0],
        )
        experts = self._all_gather_weights(experts, x_BLD.dtype)
        if len(self.placement.experts) == 1:
            slot_ids_TK = _local_slots(self.placement, self.widths, 0, routing.ids_TK)
            y_TD, dropped_K = self._run_local_experts(
                x_TD, routing.gates_TK, slot_ids_TK, valid_T, experts, shard=0
            )
        elif self._uses_all_to_all():
            y_TD, dropped_K = self._exchange_all_to_all(x_TD, routing, valid_T, experts)
        else:
            y_TD, dropped_K = self._exchange_all_gather(x_TD, routing, valid_T, experts)
        y_TD = self._add_copies(y_TD, x_TD, routing, valid_T)
        dropped_P = jnp.stack([jnp.sum(dropped_K[p.choices]) for p in pool_ranges(self.pools)])
        statistics = routing.statistics._replace(dropped_P=reduce(dropped_P))
        return LayerOutput(
            y_TD.reshape(x_BLD.shape),
            routing.balance_loss,
            routing.z_loss,
            routing.width_penalty,
            statistics,
        )

    def _add_copies(
        self, y_TD: jax.Array, x_TD: jax.Array, routing: router.Routing, valid_T: jax.Array
    ) -> jax.Array:
        """Adds the outputs of the copy experts: the input, times the sum of their gates."""
        if not self.options.copy_experts:
            return y_TD
        is_copy_E = np.zeros(len(self.widths), bool)
        is_copy_E[list(self.options.copy_experts)] = True
        is_copy_TK = jnp.asarray(is_copy_E)[routing.ids_TK] & valid_T[:, None]
        gate_T1 = jnp.sum(jnp.where(is_copy_TK, routing.gates_TK, 0), axis=1, keepdims=True)
        # Padding may hold NaN.
        x_TD = jnp.where(valid_T[:, None], x_TD, 0).astype(jnp.float32)
        return (y_TD.astype(jnp.float32) + gate_T1 * x_TD).astype(y_TD.dtype)

    def _all_gather_weights(self, experts: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
        """All-gathers the expert weights over the `fsdp` axis, along the model dimension.

        They are cast to the compute dtype first, which halves the traffic in bfloat16.
        """
        experts = ExpertWeights(*(w.astype(dtype) for w in experts))
        if self.mesh is None or self.mesh.shape[sharding.FSDP] == 1:
            return experts
        all_gather = functools.partial(jax.lax.all_gather, axis_name=sharding.FSDP, tiled=True)
        return ExpertWeights(
            w_gate=all_gather(experts.w_gate, axis=0),
            w_up=all_gather(experts.w_up, axis=0),
            w_down=all_gather(experts.w_down, axis=1),
        )

    def _uses_all_to_all(self) -> bool:
        """Decides between the two exchanges.

        On n shards, an all-to-all sends 2 K (n - 1) / n token vectors per token, and an all-gather
        with a reduce-scatter sends 2 (n - 1). "auto" takes the cheaper one of those that can run:
        an all-to-all needs whole experts, no capacity and a native collective.
        """
        if self.options.exchange != "auto":
            return self.options.exchange == "all_to_all"
        has_whole_experts = self.options.placement == "whole"
        is_dropless = not self.options.capacity_factor
        is_cheaper = self.top_k < len(self.placement.experts)
        return has_whole_experts and is_dropless and self._has_native_all_to_all() and is_cheaper

    def _has_native_all_to_all(self) -> bool:
        return self.mesh.devices.flat[0].platform in ("tpu", "gpu")

    def _exchange_all_to_all(
        self,
        x_TD: jax.Array,
        routing: router.Routing,
        valid_T: jax.Array,
        experts: ExpertWeights,
    ) -> tuple[jax.Array, jax.Array]:
        """Sends every routed token to the shard of its expert, and the result back.

        Returns (y_TD, dropped tokens of every choice [K]).
        """
        shards = len(self.placement.experts)
        slots = self.placement.slots
        is_native = self._has_native_all_to_all()
        slot_ids_TK = _global_slots(self.placement, len(self.widths))[routing.ids_TK]
        chip = sharding.chip_name(self.mesh)
        plan = dispatch.plan_dispatch(slot_ids_TK, valid_T, shards * slots, chip)
        outbound, inbound, rows_S = exchange.plan_sends(
            plan.rows_E.reshape(shards, slots), sharding.EXPERT
        )
        x_RD = dispatch.dispatch(x_TD, plan)
        # Each token of every shard can come here once for each of its experts on this shard.
        max_rows = shards * x_TD.shape[0] * min(self.top_k, slots)
        x_ND = exchange.send(x_RD, outbound, inbound, max_rows, sharding.EXPERT, is_native)
        shard = jax.lax.axis_index(sharding.EXPERT)
        y_ND = self._expert_ffn(x_ND, rows_S, experts, shard)
        y_RD = exchange.send(y_ND, inbound, outbound, x_RD.shape[0], sharding.EXPERT, is_native)
        return dispatch.combine(y_RD, routing.gates_TK, plan), plan.dropped_K

    def _exchange_all_gather(
        self,
        x_TD: jax.Array,
        routing: router.Routing,
        valid_T: jax.Array,
        experts: ExpertWeights,
    ) -> tuple[jax.Array, jax.Array]:
        """All-gathers the tokens, runs the experts of this shard, and reduce-scatters the sums.

        It sends 2 (n - 1) token vectors per token on n shards, whatever the routing. Returns
        (y_TD, dropped tokens of every choice [K]).
        """
        all_gather = functools.partial(jax.lax.all_gather, axis_name=sharding.EXPERT, tiled=True)
        shard = jax.lax.axis_index(sharding.EXPERT)
        slot_ids_TK = _local_slots(self.placement, self.widths, shard, all_gather(routing.ids_TK))
        y_TD, dropped_K = self._run_local_experts(
            all_gather(x_TD),
            all_gather(routing.gates_TK),
            slot_ids_TK,
            all_gather(valid_T),
            experts,
            shard,
        )
        if self.options.placement == "split":
            # Every shard has a slice of every expert, so all of them counted the same drops.
            dropped_K = jnp.where(shard == 0, dropped_K, 0)
        return jax.lax.psum_scatter(y_TD, sharding.EXPERT, tiled=True), dropped_K

    def _run_local_experts(
        self,
        x_TD: jax.Array,
        gates_TK: jax.Array,
        slot_ids_TK: jax.Array,
        valid_T: jax.Array,
        experts: ExpertWeights,
        shard: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the experts of a shard.

        Returns (sum over the shard's experts of gate * output [T, D], dropped tokens of every
        choice [K]).

        Args:
            slot_ids_TK: the chosen experts as slots of this shard; placement.slots for others.
        """
        capacity = None
        if self.options.capacity_factor:
            capacity = dispatch.Capacity(
                dispatch.expert_capacities(valid_T, self.pools, self.options.capacity_factor),
                self.options.capacity_order,
            )
        chip = sharding.chip_name(self.mesh)
        plan = dispatch.plan_dispatch(slot_ids_TK, valid_T, self.placement.slots, chip, capacity)
        x_ND = dispatch.dispatch(x_TD, plan)
        y_ND = self._expert_ffn(x_ND, plan.rows_E, experts, shard)
        return dispatch.combine(y_ND, gates_TK, plan), plan.dropped_K

    def _expert_ffn(
        self, x_ND: jax.Array, rows_E: jax.Array, experts: ExpertWeights, shard: jax.Array | int
    ) -> jax.Array:
        return select.expert_ffn(
            x_ND,
            rows_E,
            experts,
            self.placement,
            self.options.backend,
            self.options.blocks,
            sharding.chip_name(self.mesh),
            shard,
        )


def _global_slots(placement: expert_placement.Placement, num_experts: int) -> jax.Array:
    """Returns the slot of every expert over all shards, int32 [E].

    It is shard * placement.slots plus the expert's position on its shard. That of an expert without
    hidden units, which is on no shard, is the number of all slots.
    """
    num_slots = len(placement.experts) * placement.slots
    slot_E = np.full(num_experts, num_slots, np.int32)
    for shard, experts in enumerate(placement.experts):
        slot_E[list(experts)] = shard * placement.slots + np.arange(len(experts))
    return jnp.asarray(slot_E)


def _local_slots(
    placement: expert_placement.Placement,
    widths: Sequence[int],
    shard: jax.Array | int,
    ids_TK: jax.Array,
) -> jax.Array:
    """Returns the positions of chosen experts on a shard, int32 [T, K].

    The position is placement.slots if the expert is not on the shard.
    """
    if placement.experts == (tuple(range(len(widths))),):
        return ids_TK  # a single shard has all experts, in order
    slots = np.full((len(placement.experts), len(widths)), placement.slots, np.int32)
    for number, experts in enumerate(placement.experts):
        slots[number, list(experts)] = np.arange(len(experts))
    return jnp.asarray(slots)[shard][ids_TK]


def _draw_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """Returns normal numbers truncated at 3 standard deviations, float32."""
    return std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)


def _draw_down_projection(
    rngs: nnx.Rngs, widths: Sequence[int], dim: int, num_layers: int
) -> jax.Array:
    """Returns the initial w_down [H, D].

    Expert e has standard deviation 1 / sqrt(width of e), over sqrt(2 * num_layers). The paper does
    not specify the initialization. With one standard deviation for all experts, the output
    variance would grow with the expert's width.
    """
    num_hidden = sum(widths)
    std_H = jnp.repeat(
        jnp.asarray([w**-0.5 if w else 0.0 for w in widths]),
        jnp.asarray(widths),
        total_repeat_length=num_hidden,
    )
    normal_HD = _draw_normal(rngs, (num_hidden, dim), 1.0)
    return normal_HD * std_H[:, None] / (2 * num_layers) ** 0.5
