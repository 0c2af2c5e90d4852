"""Reads, places and counts the chosen experts [T, K] in tables over all experts [T, E].

Every function has three forms with equal results, bit for bit:

    masks       compares every choice with every expert: work and arrays of T * K * E elements,
                which XLA fuses away for few experts.
    per_choice  does the same for one choice after another, with arrays of T * E elements. TPUs
                work on whole vectors, and process the elements of a gather or scatter one by one.
    gather      gathers, and scatters to unique places: work of T * K elements. The scatters of
                floats write every place once and those of counts add integers, so that they are
                deterministic on GPU, where a scatter-add of floats is not.

Legend: T tokens, E experts, K top-k, G groups of tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.runtime import chips, choices

MASKS = "masks"
PER_CHOICE = "per_choice"
GATHER = "gather"
FORMS = (MASKS, PER_CHOICE, GATHER)

# The masked form is used up to this number of comparisons per token, K * E. On CPU, gathers and
# scatters are faster from 128 on: at 4,096 tokens, 64 experts and K = 8, 0.2 to 0.3 ms instead of
# 2.4 to 4 ms. On GPU and TPU the limit has not been measured; it is the largest shape that was in
# use (64 experts, K = 8) before the other forms existed.
MAX_MASKED_ON_CPU = 128
MAX_MASKED = 512


def choose_form(num_experts: int, top_k: int, chip: str) -> str:
    """Returns the form for a number of experts on a chip; see chips.chip_name."""
    if num_experts * top_k <= (MAX_MASKED_ON_CPU if chip == "cpu" else MAX_MASKED):
        return MASKS
    return GATHER if chip == "cpu" or chips.is_gpu(chip) else PER_CHOICE


def select(values_TE: jax.Array, ids_TK: jax.Array, form: str) -> jax.Array:
    """Returns values_TE[t, ids_TK[t, k]] as [T, K].

    Args:
        ids_TK: different experts of every token.
    """
    choices.check(FORMS, "form", form)
    if form == MASKS:
        is_chosen_TKE = _compare(ids_TK, values_TE.shape[1])
        return jnp.sum(jnp.where(is_chosen_TKE, values_TE[:, None, :], 0), axis=-1)
    if form == PER_CHOICE:
        chosen = [
            jnp.sum(jnp.where(is_chosen_TE, values_TE, 0), axis=1)
            for is_chosen_TE in _compare_choices(ids_TK, values_TE.shape[1])
        ]
        return jnp.stack(chosen, axis=1)
    return _gather(values_TE, ids_TK, values_TE.shape[1])


def place(values_TK: jax.Array, ids_TK: jax.Array, num_experts: int, form: str) -> jax.Array:
    """Returns [T, E] that holds values_TK at the chosen experts, and 0 elsewhere.

    Args:
        ids_TK: different experts of every token.
    """
    choices.check(FORMS, "form", form)
    if form == MASKS:
        is_chosen_TKE = _compare(ids_TK, num_experts)
        return jnp.sum(jnp.where(is_chosen_TKE, values_TK[:, :, None], 0), axis=1)
    if form == PER_CHOICE:
        placed_TE = jnp.zeros((ids_TK.shape[0], num_experts), values_TK.dtype)
        for k, is_chosen_TE in enumerate(_compare_choices(ids_TK, num_experts)):
            placed_TE = jnp.where(is_chosen_TE, values_TK[:, k, None], placed_TE)
        return placed_TE
    return _scatter(values_TK, ids_TK, num_experts)


def count(ids_TK: jax.Array, num_experts: int, form: str, num_groups: int = 1) -> jax.Array:
    """Returns how many tokens of every group have expert e as their k-th choice, int32 [G, K, E].

    Args:
        ids_TK: an id of num_experts is not counted.
        num_groups: the tokens are divided into this many groups of consecutive tokens.
    """
    choices.check(FORMS, "form", form)
    T, K = ids_TK.shape
    if form == MASKS:
        is_chosen_TKE = _compare(ids_TK, num_experts)
        is_chosen_GTKE = is_chosen_TKE.reshape(num_groups, -1, K, num_experts)
        return jnp.sum(is_chosen_GTKE, axis=1, dtype=jnp.int32)
    if form == PER_CHOICE:
        counts_of_choices = [
            jnp.sum(is_chosen_TE.reshape(num_groups, -1, num_experts), axis=1, dtype=jnp.int32)
            for is_chosen_TE in _compare_choices(ids_TK, num_experts)
        ]
        return jnp.stack(counts_of_choices, axis=1)
    group_T = jnp.arange(T) // (T // num_groups)
    row_TK = group_T[:, None] * K + jnp.arange(K)[None, :]
    # One index per element, with a place for ids that are not counted at the end of every row.
    place_N = (row_TK * (num_experts + 1) + ids_TK).reshape(T * K)
    counts = jnp.zeros((num_groups * K * (num_experts + 1),), jnp.int32).at[place_N].add(1)
    return counts.reshape(num_groups, K, num_experts + 1)[:, :, :num_experts]


def _compare(ids_TK: jax.Array, num_experts: int) -> jax.Array:
    return ids_TK[:, :, None] == jnp.arange(num_experts)[None, None, :]


def _compare_choices(ids_TK: jax.Array, num_experts: int) -> list[jax.Array]:
    """Returns for every choice k whether it is expert e, bool [T, E]."""
    expert_1E = jnp.arange(num_experts)[None, :]
    return [ids_TK[:, k, None] == expert_1E for k in range(ids_TK.shape[1])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(values_TE: jax.Array, ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """Gathers. JAX would derive a scatter-add as the gradient; `_scatter` places instead."""
    return jnp.take_along_axis(values_TE, ids_TK, axis=1)


def _gather_forward(
    values_TE: jax.Array, ids_TK: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    return _gather(values_TE, ids_TK, num_experts), ids_TK


def _gather_backward(
    num_experts: int, ids_TK: jax.Array, d_TK: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    return _scatter(d_TK, ids_TK, num_experts), np.zeros(ids_TK.shape, jax.dtypes.float0)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(values_TK: jax.Array, ids_TK: jax.Array, num_experts: int) -> jax.Array:
    """Scatters to places that are all different, on a flat axis.

    One index per element instead of two takes half the time on CPU.
    """
    T, K = ids_TK.shape
    place_N = (jnp.arange(T)[:, None] * num_experts + ids_TK).reshape(T * K)
    flat = jnp.zeros((T * num_experts,), values_TK.dtype)
    flat = flat.at[place_N].set(values_TK.reshape(T * K), unique_indices=True)
    return flat.reshape(T, num_experts)
