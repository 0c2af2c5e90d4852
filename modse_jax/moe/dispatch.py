"""Tokens to rows sorted by expert and back. No parameters, no scatters on the way back.

Legend: T tokens, K top-k, N = T * K routed rows, D model, E experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DispatchPlan(NamedTuple):
    """Where every routed row goes. Routed row t * K + k is token t's k-th choice."""

    order_N: jax.Array  # sorted position -> routed row
    inverse_N: jax.Array  # routed row -> sorted position
    rows_E: jax.Array  # rows of every expert; rows past their sum belong to nobody
    dropped: jax.Array  # valid routed rows over capacity


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Rows an expert may take: ceil(factor * T * K / E); 0 (dropless) stays 0. Switch Transformer, Eq. 3."""
    return math.ceil(factor * tokens * top_k / num_experts)


def plan_dispatch(
    ids_TK: jax.Array, valid_T: jax.Array, num_experts: int, capacity: int = 0
) -> DispatchPlan:
    """Sorts the routed rows by expert, stably; rows of invalid tokens, rows over capacity and those whose id is
    num_experts (an expert of another shard) come last, ownerless.

    With a capacity, first choices are served before second ones, and early tokens before late ones (GShard).
    """
    T, K = ids_TK.shape
    ids_TK = jnp.where(valid_T[:, None], ids_TK, num_experts)
    dropped = jnp.zeros((), jnp.int32)
    if capacity:
        kept_TK = _rank_in_expert(ids_TK, num_experts) < capacity
        dropped = jnp.sum(~kept_TK & (ids_TK < num_experts), dtype=jnp.int32)
        ids_TK = jnp.where(kept_TK, ids_TK, num_experts)
    ids_N = ids_TK.reshape(T * K)
    order_N = _stable_argsort(ids_N, num_experts + 1)
    inverse_N = (
        jnp.zeros_like(order_N)
        .at[order_N]
        .set(jnp.arange(T * K, dtype=jnp.int32), unique_indices=True)
    )
    rows_E = jnp.sum(ids_N[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return DispatchPlan(order_N, inverse_N, rows_E, dropped)


def dispatch(x_TD: jax.Array, plan: DispatchPlan) -> jax.Array:
    """x_ND: the token of every sorted row."""
    top_k = plan.order_N.shape[0] // x_TD.shape[0]
    return _dispatch(x_TD, plan.order_N, plan.inverse_N, top_k)


def combine(y_ND: jax.Array, gates_TK: jax.Array, plan: DispatchPlan) -> jax.Array:
    """y_TD = sum over k of gate * row, summed in float32 and returned in y's type. Ownerless rows must be 0."""
    y_TKD = _permute(y_ND, plan.inverse_N, plan.order_N).reshape(*gates_TK.shape, y_ND.shape[1])
    y_TD = jnp.einsum("tkd,tk->td", y_TKD, gates_TK, preferred_element_type=jnp.float32)
    return y_TD.astype(y_ND.dtype)


def _stable_argsort(ids_N, bound):
    """argsort of small ids through one integer key that holds id and position: one operand sorts faster than two."""
    N = ids_N.shape[0]
    if bound * N >= 2**31:
        return jnp.argsort(ids_N, stable=True).astype(jnp.int32)
    return jnp.sort(ids_N * N + jnp.arange(N, dtype=jnp.int32)) % N


def _rank_in_expert(ids_TK, num_experts):
    """How many rows go before each in the queue of its expert."""
    T, K = ids_TK.shape
    order = _stable_argsort(ids_TK.T.reshape(K * T), num_experts + 1)
    ids = ids_TK.T.reshape(K * T)[order]
    first = jnp.searchsorted(ids, jnp.arange(num_experts + 1, dtype=ids.dtype))
    rank = jnp.arange(K * T) - first[ids]
    return jnp.zeros_like(rank).at[order].set(rank, unique_indices=True).reshape(K, T).T


# The gradient of a gather is a scatter-add: slow, and not deterministic on GPU. A permutation's is a gather.
@jax.custom_vjp
def _permute(x_ND, index_N, inverse_N):
    return x_ND[index_N]


def _permute_forward(x_ND, index_N, inverse_N):
    return x_ND[index_N], inverse_N


def _permute_backward(inverse_N, g_ND):
    return g_ND[inverse_N], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _dispatch_primal(x_TD, order_N, inverse_N, top_k):
    return x_TD[order_N // top_k]


_dispatch = jax.custom_vjp(_dispatch_primal, nondiff_argnums=(3,))


def _dispatch_forward(x_TD, order_N, inverse_N, top_k):
    return _dispatch_primal(x_TD, order_N, inverse_N, top_k), inverse_N


def _dispatch_backward(top_k, inverse_N, g_ND):
    g_TKD = g_ND[inverse_N].reshape(-1, top_k, g_ND.shape[1])
    return jnp.sum(g_TKD.astype(jnp.float32), axis=1).astype(g_ND.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
