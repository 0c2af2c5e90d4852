"""The auxiliary losses that depend on how many tokens each expert of a pool gets.

They are returned unweighted; the training step multiplies them by their weights.

Legend: E experts of a pool, K top-k of the pool.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.runtime import choices

# {count: number of choices of a token that the load-balancing loss counts; None for all}.
COUNTED_CHOICES = {"top_k": None, "argmax": 1}

OVER_CHOICES = ("sum", "mean")

# {scale: the width that the width penalty divides all widths by}.
WIDTH_UNITS: dict[str, Callable[[Sequence[int]], float]] = {
    "mean": lambda widths: sum(widths) / len(widths),
    "max": max,
}


class Loads(NamedTuple):
    """Sums over the valid tokens of a group, for the experts of one pool."""

    counts_KE: jax.Array  # int32: tokens whose k-th choice is expert e
    probability_sum_E: jax.Array  # float32: probabilities of expert e
    tokens: jax.Array  # int32: number of tokens


def balance_loss(
    counts_KE: jax.Array,
    probability_sum_E: jax.Array,
    tokens: jax.Array,
    count: str,
    over_choices: str = "sum",
) -> jax.Array:
    """Returns the load-balancing loss E * sum_i f_i P_i (MoDSE, Eq. 9-12), unweighted.

    Its value at perfect balance is the number of counted choices, which is K with count="top_k" and
    1 with count="argmax". With over_choices="mean" it is 1.

    Args:
        counts_KE: number of valid tokens whose k-th choice is expert e.
        probability_sum_E: sum over the tokens of the router's probabilities of all experts.
        tokens: number of valid tokens that both are summed over.
        count: "top_k" counts all K choices of a token in f_i, which the paper's tables show;
            "argmax" counts the first choice alone, as its Eq. 10 prints.
        over_choices: "mean" divides by the number of counted choices.
    """
    counted_KE = counts_KE[: choices.look_up(COUNTED_CHOICES, "count", count)]
    chosen_E = jnp.sum(counted_KE, axis=0)
    num_experts = counts_KE.shape[1]
    loss = num_experts * jnp.sum(_load_products(chosen_E, probability_sum_E, tokens))
    choices.check(OVER_CHOICES, "over_choices", over_choices)
    return loss / counted_KE.shape[0] if over_choices == "mean" else loss


def width_penalty(
    counts_KE: jax.Array,
    probability_sum_E: jax.Array,
    tokens: jax.Array,
    widths: Sequence[int],
    scale: str,
) -> jax.Array:
    """Returns the width penalty E * sum_i f_i P_i w_i, unweighted.

    Source: the P-penalty of HMoE (arXiv 2408.10681). It is the load-balancing loss with the share
    of each expert multiplied by its width, so it favors narrow experts. With equal widths it
    equals the load-balancing loss with count="top_k".

    Args:
        counts_KE, probability_sum_E, tokens: see `balance_loss`.
        widths: hidden units of every expert. All of them 0 gives 0.
        scale: w_i is the width divided by the "mean" or the "max" (largest) width.
    """
    unit = choices.look_up(WIDTH_UNITS, "scale", scale)(widths)
    relative_E = jnp.asarray([width / unit if unit else 0.0 for width in widths], jnp.float32)
    chosen_E = jnp.sum(counts_KE, axis=0)
    products_E = _load_products(chosen_E, probability_sum_E, tokens)
    return len(widths) * jnp.sum(products_E * relative_E)


def _load_products(
    chosen_E: jax.Array, probability_sum_E: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Returns f_i P_i of every expert. f_i has no gradient."""
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    fraction_E = jax.lax.stop_gradient(chosen_E.astype(jnp.float32)) / tokens
    return fraction_E * probability_sum_E / tokens
