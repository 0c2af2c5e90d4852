"""Sorts routed tokens by expert, and combines the results of the experts.

Neither direction uses a scatter, in the forward or in the backward pass: a scatter-add is slow,
and not deterministic on GPU.

Legend: T tokens, K top-k, N = T * K routed tokens, D model, E experts.
"""

import fractions
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import chosen_experts
from modse_jax.moe.layer_options import CAPACITY_ORDERS, Pool
from modse_jax.runtime import choices

# Capacity factors are rational numbers with denominators up to this one. A factor that is written
# with up to five decimals is one exactly.
MAX_DENOMINATOR = 100_000


class DispatchPlan(NamedTuple):
    """The order of the routed tokens. Routed token t * K + k is the k-th choice of token t."""

    order_N: jax.Array  # sorted position -> routed token
    inverse_N: jax.Array  # routed token -> sorted position
    rows_E: jax.Array  # routed tokens of every expert; rows past their sum are padding rows
    dropped_K: jax.Array  # number of valid k-th choices over capacity


class Capacity(NamedTuple):
    """The limit on the number of tokens of an expert.

    Attributes:
        limit_K: int32, the largest number of tokens of every expert that can be a k-th choice.
        order: which routed tokens come first; see ExpertOptions.capacity_order.
    """

    limit_K: jax.Array
    order: str


def expert_capacity(num_tokens: int, pool: Pool, factor: float) -> int:
    """Returns the largest number of tokens of an expert of a pool: ceil(factor * T * k / E).

    It is computed with integers, so that no rounding can move it. Source: Switch Transformer,
    Eq. 3.

    Args:
        num_tokens: number of valid tokens T.
        pool: k and E.
        factor: the capacity factor; see layer_options.check_capacity_factor.
    """
    ratio = _capacity_ratio(pool, factor)
    return -(-num_tokens * ratio.numerator // ratio.denominator)


def expert_capacities(valid_T: jax.Array, pools: Sequence[Pool], factor: float) -> jax.Array:
    """Returns the capacity of the experts that can be a k-th choice, int32 [K], for each choice.

    The number of valid tokens is only known at run time. `expert_capacity` of every number that it
    can have is looked up in a table, because 32 bits are too few for the exact product.
    """
    num_valid = jnp.sum(valid_T, dtype=jnp.int32)
    limits = [
        jnp.full((pool.top_k,), _capacity_table(valid_T.shape[0], pool, factor)[num_valid])
        for pool in pools
    ]
    return jnp.concatenate(limits)


def _capacity_table(max_tokens: int, pool: Pool, factor: float) -> jax.Array:
    ratio = _capacity_ratio(pool, factor)
    num_tokens = np.arange(max_tokens + 1, dtype=np.int64)
    capacities = -(-num_tokens * ratio.numerator // ratio.denominator)
    return jnp.asarray(np.minimum(capacities, max_tokens), jnp.int32)


def _capacity_ratio(pool: Pool, factor: float) -> fractions.Fraction:
    exact_factor = fractions.Fraction(factor).limit_denominator(MAX_DENOMINATOR)
    return exact_factor * pool.top_k / pool.num_experts


def plan_dispatch(
    ids_TK: jax.Array,
    valid_T: jax.Array,
    num_experts: int,
    chip: str,
    capacity: Capacity | None = None,
) -> DispatchPlan:
    """Sorts the routed tokens by expert, stably.

    Padding tokens, tokens over capacity, and those whose id is num_experts (an expert of another
    shard, or one without hidden units) come last, as padding rows.

    Args:
        chip: the name of the chip; see chips.chip_name.
        capacity: None if no token is dropped.
    """
    T, K = ids_TK.shape
    ids_TK = jnp.where(valid_T[:, None], ids_TK, num_experts)
    dropped_K = jnp.zeros((K,), jnp.int32)
    form = chosen_experts.choose_form(num_experts, K, chip)
    if capacity is not None:
        rank_TK = _rank_in_expert(ids_TK, num_experts, form, capacity.order)
        fits_TK = rank_TK < capacity.limit_K[None, :]
        dropped_K = jnp.sum(~fits_TK & (ids_TK < num_experts), axis=0, dtype=jnp.int32)
        ids_TK = jnp.where(fits_TK, ids_TK, num_experts)
    order_N = stable_argsort(ids_TK.reshape(T * K), num_experts + 1)
    inverse_N = _invert_permutation(order_N)
    rows_E = _count_rows(ids_TK, num_experts, form)
    return DispatchPlan(order_N, inverse_N, rows_E, dropped_K)


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


def _count_rows(ids_TK: jax.Array, num_experts: int, form: str) -> jax.Array:
    """Returns the routed tokens of every expert, int32 [E]."""
    return jnp.sum(chosen_experts.count(ids_TK, num_experts, form)[0], axis=0)


def _rank_in_expert(ids_TK: jax.Array, num_experts: int, form: str, order: str) -> jax.Array:
    """Returns how many routed tokens are served before each one by the same expert, [T, K].

    Args:
        order: see ExpertOptions.capacity_order.
    """
    choices.check(CAPACITY_ORDERS, "order", order)
    T, K = ids_TK.shape
    ids_N = ids_TK.T.reshape(K * T) if order == "choice" else ids_TK.reshape(T * K)
    order_N = stable_argsort(ids_N, num_experts + 1)
    # The routed tokens of id num_experts, which no expert serves, come after those of all experts.
    end_E = jnp.cumsum(_count_rows(ids_TK, num_experts, form))
    first_E = jnp.concatenate([jnp.zeros((1,), end_E.dtype), end_E])
    sorted_rank_N = jnp.arange(K * T) - first_E[ids_N[order_N]]
    rank_N = sorted_rank_N[_invert_permutation(order_N)]
    return rank_N.reshape(K, T).T if order == "choice" else rank_N.reshape(T, K)


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
