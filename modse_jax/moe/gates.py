"""Gates: the weights of the chosen experts of a token, as functions of the router logits of a pool.

Legend: T tokens, E experts of a pool, K top-k of the pool.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Reads the values of the chosen experts: [T, E] -> [T, K].
Select = Callable[[jax.Array], jax.Array]


def top_k_softmax(logits_TE: jax.Array, select: Select) -> jax.Array:
    """Softmax over the K chosen logits (MoDSE, Eq. 5-6)."""
    return jax.nn.softmax(select(logits_TE), axis=-1)


def softmax_top_k(logits_TE: jax.Array, select: Select) -> jax.Array:
    """Softmax over all logits, of which K are kept (Switch Transformer, OLMoE).

    The gates of a token sum to less than 1.
    """
    return select(jax.nn.softmax(logits_TE, axis=-1))


def softmax_top_k_renormalized(logits_TE: jax.Array, select: Select) -> jax.Array:
    """`softmax_top_k`, divided by the sum over the chosen experts.

    In exact arithmetic this equals `top_k_softmax`. It exists because other stacks compute it this
    way.
    """
    gates_TK = softmax_top_k(logits_TE, select)
    return gates_TK / jnp.sum(gates_TK, axis=-1, keepdims=True)


def sigmoid(logits_TE: jax.Array, select: Select) -> jax.Array:
    """Sigmoid of the chosen logits."""
    return jax.nn.sigmoid(select(logits_TE))


def sigmoid_renormalized(logits_TE: jax.Array, select: Select) -> jax.Array:
    """`sigmoid`, divided by the sum over the chosen experts (DeepSeek-V3).

    It is computed as the softmax of log sigmoid, which stays finite if all sigmoids underflow.
    """
    return jax.nn.softmax(jax.nn.log_sigmoid(select(logits_TE)), axis=-1)


def uniform(logits_TE: jax.Array, select: Select) -> jax.Array:
    """1 / K for every chosen expert. The logits only decide which experts are chosen."""
    chosen_TK = select(logits_TE)
    return jnp.full_like(chosen_TK, 1 / chosen_TK.shape[1])


GATES: dict[str, Callable[[jax.Array, Select], jax.Array]] = {
    "top_k_softmax": top_k_softmax,
    "softmax_top_k": softmax_top_k,
    "softmax_top_k_renormalized": softmax_top_k_renormalized,
    "sigmoid": sigmoid,
    "sigmoid_renormalized": sigmoid_renormalized,
    "uniform": uniform,
}

# The score of an expert is the sigmoid of its logit for these gates, and the softmax for others.
SIGMOID_GATES = ("sigmoid", "sigmoid_renormalized")


def compute_scores(logits_TE: jax.Array, gate: str) -> jax.Array:
    """Returns the scores that a router bias is added to (Wang et al. 2024, section 2)."""
    if gate in SIGMOID_GATES:
        return jax.nn.sigmoid(logits_TE)
    return jax.nn.softmax(logits_TE, axis=-1)


def log_probabilities(logits_TE: jax.Array, gate: str) -> jax.Array:
    """Returns the logarithms of the scores, divided by their sum over the experts.

    The auxiliary losses and the entropy are computed from them.
    """
    if gate in SIGMOID_GATES:
        logits_TE = jax.nn.log_sigmoid(logits_TE)
    return jax.nn.log_softmax(logits_TE, axis=-1)
