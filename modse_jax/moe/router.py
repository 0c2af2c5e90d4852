"""Which experts a token goes to, with which weight, and the auxiliary losses. Everything here is float32.

Legend: T tokens, D model, E experts, K top-k.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from modse_jax.config.options import MoEConfig
from modse_jax.runtime import chips

ROUTING = "routing"  # the name under which rematerialisation keeps the chosen experts


class RouterWeights(NamedTuple):
    """w_gate [D, E]; w_noise [D, E] and noise_scale [E] only with gate_term="learned" (else None)."""

    w_gate: jax.Array
    w_noise: jax.Array | None = None
    noise_scale: jax.Array | None = None


class RouterStatistics(NamedTuple):
    """Sums over the valid tokens of one layer; `reduce` has made them global."""

    counts_KE: jax.Array  # int32: tokens whose k-th choice is expert e
    gates_KE: jax.Array  # float32: the gates of those tokens, summed
    entropy: jax.Array  # float32: entropy of softmax(all logits), nats, summed over tokens
    tokens: jax.Array  # int32: valid tokens
    dropped: jax.Array  # int32: routed rows over capacity (filled in by the layer)


class Routing(NamedTuple):
    gates_TK: jax.Array  # float32, largest logit first
    ids_TK: jax.Array  # int32
    balance_loss: jax.Array  # unweighted
    z_loss: jax.Array  # unweighted
    statistics: RouterStatistics


def gate_logits(x_TD: jax.Array, weights: RouterWeights, eps: float) -> jax.Array:
    """H = x W_g [+ RMSNorm(Softplus(x W_n))], [T, E] (MoDSE, Eq. 1-4; the term has no random part as printed)."""
    x_TD = x_TD.astype(jnp.float32)
    logits_TE = jnp.einsum("td,de->te", x_TD, weights.w_gate, precision="highest")
    if weights.w_noise is None:
        return logits_TE
    term_TE = jax.nn.softplus(jnp.einsum("td,de->te", x_TD, weights.w_noise, precision="highest"))
    rms_T1 = jnp.sqrt(jnp.mean(term_TE * term_TE, axis=-1, keepdims=True) + eps)
    return logits_TE + term_TE / rms_T1 * weights.noise_scale[None, :]


def top_k_ids(logits_TE: jax.Array, top_k: int, chip: str) -> jax.Array:
    """Returns the ids [T, K] of the k largest logits, as `jax.lax.top_k` orders them: largest first, the lowest id
    among equal ones, 0 above -0, and NaN above infinity (or below -infinity where its sign bit is set).

    Args: chip: see meshes.chip.

    XLA for GPU makes `lax.top_k` of a few experts a sort with one block of threads per
    token; k rounds of a maximum fuse into one or two kernels, so they are used there up to k = 8. On CPU they are 5
    times as fast at 8 experts and k = 2, as fast at 64 and k = 2, and slower beyond: up to k * E = 128 they are used.
    TPUs keep `lax.top_k`.
    """
    E = logits_TE.shape[1]
    if (chips.is_gpu(chip) and top_k <= 8) or (chip == "cpu" and top_k * E <= 128):
        return top_k_ids_in_rounds(logits_TE, top_k)
    return jax.lax.top_k(logits_TE, top_k)[1]


def top_k_ids_in_rounds(logits_TE: jax.Array, top_k: int) -> jax.Array:
    """Returns what `jax.lax.top_k` of float32 numbers does, by k rounds of a maximum."""
    bits_TE = jax.lax.bitcast_convert_type(logits_TE, jnp.int32)
    # Integers that are in the order of the floats. The smallest one marks experts that are taken; it belongs to one of
    # the NaNs, which shares the next integer with another.
    taken = jnp.iinfo(jnp.int32).min
    keys_TE = jnp.maximum(jnp.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE), taken + 1)
    id_TE = jax.lax.broadcasted_iota(jnp.int32, logits_TE.shape, 1)
    ids = []
    for _ in range(top_k):
        largest_T1 = jnp.max(keys_TE, axis=1, keepdims=True)
        id_T1 = jnp.min(
            jnp.where(keys_TE == largest_T1, id_TE, logits_TE.shape[1]), axis=1, keepdims=True
        )
        keys_TE = jnp.where(id_TE == id_T1, taken, keys_TE)
        ids.append(id_T1)
    return jnp.concatenate(ids, axis=1)


def gates(logits_TE: jax.Array, top_k: int, gate: str, chip: str) -> tuple[jax.Array, jax.Array]:
    """Gates and ids [T, K] of the k largest logits. chip: see `top_k_ids`.

    top_k_softmax: softmax over the kept logits (MoDSE, Eq. 5-6). softmax_top_k: softmax over all, then keep k, so that
    the gates sum to less than 1 (Switch, OLMoE). softmax_top_k_renormalised: the same divided by its sum; equal to the
    first in exact arithmetic, kept because other stacks compute it so.
    """
    ids_TK = checkpoint_name(top_k_ids(jax.lax.stop_gradient(logits_TE), top_k, chip), ROUTING)
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(logits_TE.shape[1])[None, None, :]

    def kept(values_TE):  # no gather: its gradient would be a scatter
        return jnp.sum(jnp.where(chosen_TKE, values_TE[:, None, :], 0), axis=-1)

    if gate == "top_k_softmax":
        return jax.nn.softmax(kept(logits_TE), axis=-1), ids_TK
    gates_TK = kept(jax.nn.softmax(logits_TE, axis=-1))
    if gate == "softmax_top_k_renormalised":
        gates_TK = gates_TK / jnp.sum(gates_TK, axis=-1, keepdims=True)
    return gates_TK, ids_TK


def balance_loss(
    counts_KE: jax.Array, probability_sum_E: jax.Array, tokens: jax.Array, count: str
) -> jax.Array:
    """N * sum_i f_i P_i (MoDSE, Eq. 9-12): K at perfect balance with count="top_k", 1 with "argmax".

    Args:
      counts_KE: valid tokens whose k-th choice is expert e. probability_sum_E: softmax over all logits, summed.
      tokens: how many valid tokens both were summed over. count: "top_k" counts all K choices, which is what the
      paper's own tables show; "argmax" the first alone, as its Eq. 10 prints.
    """
    chosen_E = counts_KE[0] if count == "argmax" else jnp.sum(counts_KE, axis=0)
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    fraction_E = jax.lax.stop_gradient(chosen_E.astype(jnp.float32)) / tokens
    return counts_KE.shape[1] * jnp.sum(fraction_E * probability_sum_E / tokens)


def route(
    x_TD: jax.Array,
    valid_T: jax.Array,
    weights: RouterWeights,
    config: MoEConfig,
    eps: float,
    chip: str,
    reduce: Callable = lambda sums: sums,
) -> Routing:
    """Routes every token; those with valid_T False get gates too, but count for nothing in losses and statistics.

    Args: reduce: sums its argument over the devices that share the batch, so that the losses are the global batch's
    (the balance loss: unless config.balance_loss_scope says otherwise).
    """
    x_TD = jnp.where(
        valid_T[:, None], x_TD, 0
    )  # NaN in padding would reach the weights' gradient as 0 * NaN
    logits_TE = gate_logits(x_TD, weights, eps)
    gates_TK, ids_TK = gates(logits_TE, config.top_k, config.gate, chip)
    log_p_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    p_TE = jnp.exp(log_p_TE)
    z_T = jax.nn.logsumexp(logits_TE, axis=-1)

    def masked(values, mask):
        return jnp.where(mask, values, jnp.zeros((), values.dtype))

    chosen_TKE = ids_TK[:, :, None] == jnp.arange(logits_TE.shape[1])[None, None, :]
    chosen_TKE &= valid_T[:, None, None]
    statistics = RouterStatistics(
        counts_KE=jnp.sum(chosen_TKE, axis=0, dtype=jnp.int32),
        gates_KE=jax.lax.stop_gradient(jnp.sum(masked(gates_TK[:, :, None], chosen_TKE), axis=0)),
        entropy=jax.lax.stop_gradient(-jnp.sum(masked(p_TE * log_p_TE, valid_T[:, None]))),
        tokens=jnp.sum(valid_T, dtype=jnp.int32),
        dropped=jnp.zeros((), jnp.int32),
    )
    p_sum_E, mine = jnp.sum(masked(p_TE, valid_T[:, None]), axis=0), statistics
    statistics, p_batch_E, z_sum = reduce((mine, p_sum_E, jnp.sum(masked(z_T * z_T, valid_T))))
    if config.balance_loss_scope == "batch":
        balance = balance_loss(
            statistics.counts_KE, p_batch_E, statistics.tokens, config.balance_loss_count
        )
    else:
        balance = balance_loss(mine.counts_KE, p_sum_E, mine.tokens, config.balance_loss_count)
        balance = reduce(balance * mine.tokens) / jnp.maximum(statistics.tokens, 1).astype(
            jnp.float32
        )
    return Routing(
        gates_TK,
        ids_TK,
        balance_loss=balance,
        z_loss=z_sum / jnp.maximum(statistics.tokens, 1).astype(jnp.float32),
        statistics=statistics,
    )
