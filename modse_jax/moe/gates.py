"""Gates: the weights of the chosen experts of a token, as functions of the router logits of a pool.

Legend: T tokens, E experts of a pool, K top-k of the pool.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modse_jax.runtime import choices

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


class Gate(NamedTuple):
    """The functions of a gate.

    Attributes:
        weights: the weights of the chosen experts, from the logits of all experts.
        score: the scores of all experts, [T, E] -> [T, E]. A router bias is added to them.
        log_score: the logarithms of the scores, up to a constant for each token.
    """

    weights: Callable[[jax.Array, Select], jax.Array]
    score: Callable[[jax.Array], jax.Array]
    log_score: Callable[[jax.Array], jax.Array]


def _softmax(logits_TE: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits_TE, axis=-1)


def _identity(logits_TE: jax.Array) -> jax.Array:
    return logits_TE


GATES = {
    "top_k_softmax": Gate(top_k_softmax, _softmax, _identity),
    "softmax_top_k": Gate(softmax_top_k, _softmax, _identity),
    "softmax_top_k_renormalized": Gate(softmax_top_k_renormalized, _softmax, _identity),
    "sigmoid": Gate(sigmoid, jax.nn.sigmoid, jax.nn.log_sigmoid),
    "sigmoid_renormalized": Gate(sigmoid_renormalized, jax.nn.sigmoid, jax.nn.log_sigmoid),
    "uniform": Gate(uniform, _softmax, _identity),
}


def find_gate(name: str) -> Gate:
    """Returns the gate of a name. Raises ValueError if there is none."""
    return choices.look_up(GATES, "gate", name)


def compute_scores(logits_TE: jax.Array, gate: str) -> jax.Array:
    """Returns the scores that a router bias is added to (Wang et al. 2024, section 2)."""
    return find_gate(gate).score(logits_TE)


def log_probabilities(logits_TE: jax.Array, gate: str) -> jax.Array:
    """Returns the logarithms of the scores, divided by their sum over the experts.

    The auxiliary losses and the entropy are computed from them.
    """
    return jax.nn.log_softmax(find_gate(gate).log_score(logits_TE), axis=-1)
