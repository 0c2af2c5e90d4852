"""Loss-free balancing: the update of the router bias, and where the bias is used.

Legend: L layers, K choices, E experts, T tokens, A arms of an experiment, in place of layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import router
from modse_jax.moe.layer_options import Pool
from modse_jax.training import loss_free_balancing


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def loads_of_stream(
    num_experts: int, top_k: int, rule: str, steps: int, rate_A1: jax.Array
) -> jax.Array:
    """Returns the load imbalance (max/mean) of each rate, summed over the last 50 steps.

    Every step routes 2,048 tokens with the logits N(0, 1) + linspace(2.5, 0, num_experts), as the
    router does, and then updates the bias, as the training step does.
    """
    mean_E = jnp.linspace(2.5, 0, num_experts)
    num_arms = rate_A1.shape[0]

    def count_choices(logits_TE: jax.Array, bias_E: jax.Array) -> jax.Array:
        _, ids_TK = router.compute_gates(logits_TE, top_k, "softmax_top_k", "cpu", bias_E)
        return jnp.zeros(num_experts, jnp.int32).at[ids_TK.reshape(-1)].add(1)

    def run_step(bias_AE: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_TE = jax.random.normal(key, (2048, num_experts)) + mean_E[None, :]
        counts_AE = jnp.stack([count_choices(logits_TE, bias_E) for bias_E in bias_AE])
        pools = (Pool(num_experts, top_k),)
        bias_AE = loss_free_balancing.update_bias(
            bias_AE, counts_AE, pools, rule, rate_A1, recenter=False
        )
        return bias_AE, counts_AE

    keys = jax.random.split(jax.random.key(0, impl="rbg"), steps)
    _, counts = jax.lax.scan(run_step, jnp.zeros((num_arms, num_experts)), keys)
    total_AE = jnp.sum(counts[-50:], axis=0)
    return jnp.max(total_AE, axis=1) / jnp.mean(total_AE, axis=1)


def test_both_rules_balance_a_skewed_stream(compiled_with_care):
    """With a rate of 0, the bias stays 0."""
    rates = jnp.array([[1e-3], [0.0]])
    for rule in ("sign", "proportional"):
        balanced, unbalanced = loads_of_stream(32, 4, rule, 400, rates)
        assert balanced <= 1.10
        assert unbalanced >= 3.2


def test_the_rate_of_the_sign_rule_must_fall_with_the_number_of_experts(compiled_with_care):
    """The scores are about 1 / E, so a rate of 1e-3 overshoots with 1,024 experts."""
    rates = jnp.array([[1e-3], [1e-3 * 32 / 1024]])
    too_fast, scaled = loads_of_stream(1024, 8, "sign", 300, rates)
    assert too_fast >= 1.5
    assert scaled <= 1.4
