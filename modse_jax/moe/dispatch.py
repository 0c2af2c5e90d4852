"""Sorts routed tokens by expert, and combines the results of the experts.

Neither direction uses a scatter, in the forward or in the backward pass: a scatter-add is slow,
and not deterministic on GPU.

Legend: T tokens, K top-k, N = T * K routed tokens, D model, E experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DispatchPlan(NamedTuple):
    """The order of the routed tokens. Routed token t * K + k is the k-th choice of token t."""

    order_N: jax.Array  # sorted position -> routed token
    inverse_N: jax.Array  # routed token -> sorted position
    rows_E: jax.Array  # routed tokens of every expert; rows past their sum are padding rows
    dropped: jax.Array  # number of valid routed tokens over capacity


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Returns the largest number of tokens of an expert: ceil(factor * T * K / E).

    A factor of 0 gives 0, which means dropless. Source: Switch Transformer, Eq. 3.
    """
    return math.ceil(factor * tokens * top_k / num_experts)


def plan_dispatch(
    ids_TK: jax.Array, valid_T: jax.Array, num_experts: int, capacity: int = 0
) -> DispatchPlan:
    """Sorts the routed tokens by expert, stably.

    Padding tokens, tokens over capacity, and those whose id is num_experts (an expert of another
    shard) come last, as padding rows.

    With a capacity, first choices are served before second choices, and early tokens before late
    ones (GShard).
    """
    T, K = ids_TK.shape
    ids_TK = jnp.where(valid_T[:, None], ids_TK, num_experts)
    dropped = jnp.zeros((), jnp.int32)
    if capacity:
        fits_TK = _rank_in_expert(ids_TK, num_experts) < capacity
        dropped = jnp.sum(~fits_TK & (ids_TK < num_experts), dtype=jnp.int32)
        ids_TK = jnp.where(fits_TK, ids_TK, num_experts)
    ids_N = ids_TK.reshape(T * K)
    order_N = stable_argsort(ids_N, num_experts + 1)
    inverse_N = _invert_permutation(order_N)
    is_expert_NE = ids_N[:, None] == jnp.arange(num_experts)[None, :]
    rows_E = jnp.sum(is_expert_NE, axis=0, dtype=jnp.int32)
    return DispatchPlan(order_N, inverse_N, rows_E, dropped)


def dispatch(x_TD: jax.Array, plan: DispatchPlan) -> jax.Array:
    """Returns x_ND, the routed tokens sorted by expert."""
    top_k = plan.order_N.shape[0] // x_TD.shape[0]
    return _gather_tokens(x_TD, plan.order_N, plan.inverse_N, top_k)


def combine(y_ND: jax.Array, gates_TK: jax.Array, plan: DispatchPlan) -> jax.Array:
    """Returns y_TD, the sum over k of gate * expert output.

    The sum is taken in float32 and returned in the type of y_ND. Padding rows must be 0.
    """
    y_ND = _permute(y_ND, plan.inverse_N, plan.order_N)
    y_TKD = y_ND.reshape(*gates_TK.shape, y_ND.shape[1])
    y_TD = jnp.einsum("tkd,tk->td", y_TKD, gates_TK, preferred_element_type=jnp.float32)
    return y_TD.astype(y_ND.dtype)


def stable_argsort(ids_N: jax.Array, bound: int) -> jax.Array:
    """Returns the stable argsort of ids in 0 : bound.

    The id and the position are packed into one integer key if it fits, because a sort of one
    operand is faster than a sort of two.
    """
    N = ids_N.shape[0]
    if bound * N >= 2**31:
        return jnp.argsort(ids_N, stable=True).astype(jnp.int32)
    return jnp.sort(ids_N * N + jnp.arange(N, dtype=jnp.int32)) % N


def _invert_permutation(order_N: jax.Array) -> jax.Array:
    positions_N = jnp.arange(order_N.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(order_N).at[order_N].set(positions_N, unique_indices=True)


def _rank_in_expert(ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """Returns how many routed tokens are served before each one by the same expert, [T, K]."""
    T, K = ids_TK.shape
    ids_N = ids_TK.T.reshape(K * T)
    order_N = stable_argsort(ids_N, num_experts + 1)
    sorted_ids_N = ids_N[order_N]
    expert_range = jnp.arange(num_experts + 1, dtype=sorted_ids_N.dtype)
    first_E = jnp.searchsorted(sorted_ids_N, expert_range)
    sorted_rank_N = jnp.arange(K * T) - first_E[sorted_ids_N]
    rank_N = jnp.zeros_like(sorted_rank_N).at[order_N].set(sorted_rank_N, unique_indices=True)
    return rank_N.reshape(K, T).T


@jax.custom_vjp
def _permute(x_ND: jax.Array, index_N: jax.Array, inverse_N: jax.Array) -> jax.Array:
    """Returns x_ND[index_N]. The gradient of a permutation is a gather by its inverse."""
    return x_ND[index_N]


def _permute_forward(
    x_ND: jax.Array, index_N: jax.Array, inverse_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return x_ND[index_N], inverse_N


def _permute_backward(inverse_N: jax.Array, dy_ND: jax.Array) -> tuple[jax.Array, None, None]:
    return dy_ND[inverse_N], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _gather_tokens_primal(
    x_TD: jax.Array, order_N: jax.Array, inverse_N: jax.Array, top_k: int
) -> jax.Array:
    return x_TD[order_N // top_k]


# The gradient of a token is the sum over its K copies, which a gather brings side by side.
_gather_tokens = jax.custom_vjp(_gather_tokens_primal, nondiff_argnums=(3,))


def _gather_tokens_forward(
    x_TD: jax.Array, order_N: jax.Array, inverse_N: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
    return _gather_tokens_primal(x_TD, order_N, inverse_N, top_k), inverse_N


def _gather_tokens_backward(
    top_k: int, inverse_N: jax.Array, dy_ND: jax.Array
) -> tuple[jax.Array, None, None]:
    dy_TKD = dy_ND[inverse_N].reshape(-1, top_k, dy_ND.shape[1])
    dx_TD = jnp.sum(dy_TKD.astype(jnp.float32), axis=1)
    return dx_TD.astype(dy_ND.dtype), None, None


_gather_tokens.defvjp(_gather_tokens_forward, _gather_tokens_backward)
