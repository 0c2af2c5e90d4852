"""Loss-free load balancing (Wang et al. 2024, arXiv 2408.15664).

The router chooses experts by their score plus a bias, and computes the gates from the score alone.
After every training step, the bias of experts with more tokens than the mean falls and the bias of
the others rises. The bias is part of the state, but not of the parameters: it has no gradient, and
neither the optimizer nor weight decay nor gradient clipping sees it.

The tokens are counted over all micro-batches and devices. The counts are integers, so the bias does
not depend on the mesh as long as the router chooses the same experts.

Legend: L layers, K choices, E experts, N experts of one pool.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from modse_jax.config.options import Config
from modse_jax.model.variables import RouterBias, nest_router_bias, router_bias_array
from modse_jax.moe.layer_options import Pool
from modse_jax.runtime import choices

Update = Callable[[RouterBias, jax.Array, jax.Array, jax.Array], RouterBias]


def init_router_bias(config: Config) -> RouterBias:
    """Returns the bias before the first step, zeros; {} without a bias rule or without routers."""
    if config.moe.bias_rule == "none" or config.is_dense:
        return {}
    shape = (config.model.num_layers, config.num_experts)
    return nest_router_bias(jnp.zeros(shape, jnp.float32))


def make_update(config: Config, bias_rate: jax.Array | float | None = None) -> Update:
    """Returns update(router_bias, counts_LKE, updates, is_good), which returns the new bias.

    The arguments are the bias before the step; the tokens routed to each expert in the step, by
    choice and over all micro-batches and devices; the number of updates so far; and whether the
    step is good. After a bad step, the bias stays as it is. {} stays {}.

    Args:
      config: the config.
      bias_rate: the rate at the start; None for `moe.bias_rate`.
    """
    schedule = rate_schedule(config, bias_rate)

    def update(
        router_bias: RouterBias, counts_LKE: jax.Array, updates: jax.Array, is_good: jax.Array
    ) -> RouterBias:
        bias_LE = router_bias_array(router_bias)
        if bias_LE is None:
            return {}
        new_bias_LE = update_bias(
            bias_LE,
            jnp.sum(counts_LKE, axis=1),
            config.pools,
            config.moe.bias_rule,
            schedule(updates),
            config.moe.bias_recenter,
        )
        return nest_router_bias(jnp.where(is_good, new_bias_LE, bias_LE))

    return update


def range_by_layer(router_bias: RouterBias) -> jax.Array | None:
    """Returns the smallest and the largest bias of every layer, [layers, 2]; None for {}."""
    bias_LE = router_bias_array(router_bias)
    if bias_LE is None:
        return None
    return jnp.stack([jnp.min(bias_LE, axis=1), jnp.max(bias_LE, axis=1)], axis=1)


def rate_schedule(config: Config, bias_rate: jax.Array | float | None = None) -> optax.Schedule:
    """Returns the rate of the bias as a function of the number of updates so far."""
    rate = config.moe.bias_rate if bias_rate is None else bias_rate
    schedules: dict[str, Callable[..., optax.Schedule]] = {
        "constant": lambda rate, steps: optax.constant_schedule(rate),
        "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
        "cosine": optax.cosine_decay_schedule,
    }
    schedule = choices.look_up(schedules, "moe.bias_schedule", config.moe.bias_schedule)
    return schedule(rate, config.training.steps)


def update_bias(
    bias_LE: jax.Array,
    counts_LE: jax.Array,
    pools: Sequence[Pool],
    rule: str,
    rate: jax.Array | float,
    recenter: bool,
) -> jax.Array:
    """Returns the bias after a step.

    Within each pool, with the tokens c_i of expert i in the step, the bias grows by
      rate * sign(mean(c) - c_i) with the rule "sign" (DeepSeek-V3),
      rate * (mean(c) - c_i) / mean(c) with the rule "proportional".

    Args:
      bias_LE: the bias before the step.
      counts_LE: int32, tokens routed to each expert, before any are dropped.
      pools: the pools of experts, one after another on the axis E.
      rule: "sign" or "proportional".
      rate: the rate of the step.
      recenter: subtract the mean over the pool. It does not change which experts are chosen, but
        keeps the bias from drifting.
    """
    pieces = []
    first = 0
    for pool in pools:
        in_pool = slice(first, first + pool.num_experts)
        bias_LN = bias_LE[:, in_pool] + rate * _relative_deficit(counts_LE[:, in_pool], rule)
        if recenter:
            bias_LN -= jnp.mean(bias_LN, axis=1, keepdims=True)
        pieces.append(bias_LN)
        first += pool.num_experts
    return jnp.concatenate(pieces, axis=1)


def _relative_deficit(counts_LN: jax.Array, rule: str) -> jax.Array:
    """Returns how far each expert's count is below the mean of its pool: a sign, or a fraction."""
    mean_L1 = jnp.sum(counts_LN, axis=1, keepdims=True) / jnp.float32(counts_LN.shape[1])
    deficit_LN = mean_L1 - counts_LN
    choices.check(("sign", "proportional"), "rule", rule)
    if rule == "sign":
        return jnp.sign(deficit_LN)
    # A batch of padding alone has no counts, and then no deficit either.
    return deficit_LN / jnp.where(mean_L1 > 0, mean_L1, 1)
