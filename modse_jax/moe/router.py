"""The router: the experts of every token, their gates, and the auxiliary losses.

All computations are in float32. The load-balancing loss and the router z-loss are returned
unweighted; the training step multiplies them by their weights.

Legend: T tokens, D model, E experts, K top-k, P pools.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from modse_jax.moe.layer_options import RouterOptions
from modse_jax.runtime import chips

# Rematerialization saves the chosen experts under this name. Recomputed logits could differ in
# the last bit, and a near tie would then send a token to another expert in the backward pass.
ROUTING = "routing"


class RouterWeights(NamedTuple):
    """The parameters of a router; the last two are None unless router_noise is "learned"."""

    w_gate: jax.Array  # [D, E]
    w_noise: jax.Array | None = None  # [D, E]
    noise_scale: jax.Array | None = None  # [E]


class RouterStatistics(NamedTuple):
    """Sums over the valid tokens of one layer, over all devices that share the batch."""

    counts_KE: jax.Array  # int32: tokens whose k-th choice is expert e
    gates_E: jax.Array  # float32: sum of the gates of all tokens that chose expert e
    entropy_P: jax.Array  # float32: entropy of the softmax over a pool's logits, nats, summed
    tokens: jax.Array  # int32: valid tokens
    dropped_P: jax.Array  # int32: routed tokens of a pool over capacity, filled in by the layer


class Routing(NamedTuple):
    """The result of routing the tokens of one layer."""

    gates_TK: jax.Array  # float32, in the order of ids_TK
    ids_TK: jax.Array  # int32, the expert with the largest logit first
    balance_loss: jax.Array  # unweighted load-balancing loss
    z_loss: jax.Array  # unweighted router z-loss
    width_penalty: jax.Array  # unweighted width penalty
    statistics: RouterStatistics


def compute_logits(x_TD: jax.Array, weights: RouterWeights, eps: float) -> jax.Array:
    """Returns the router logits H = x W_g [+ RMSNorm(Softplus(x W_n))], [T, E], in float32.

    Source: MoDSE, Eq. 1-4. The second term has no random part, as the paper prints it.
    """
    x_TD = x_TD.astype(jnp.float32)
    logits_TE = jnp.einsum("td,de->te", x_TD, weights.w_gate, precision="highest")
    if weights.w_noise is None:
        return logits_TE
    noise_TE = jax.nn.softplus(jnp.einsum("td,de->te", x_TD, weights.w_noise, precision="highest"))
    rms_T1 = jnp.sqrt(jnp.mean(noise_TE * noise_TE, axis=-1, keepdims=True) + eps)
    return logits_TE + noise_TE / rms_T1 * weights.noise_scale[None, :]


def top_k_ids(logits_TE: jax.Array, top_k: int, chip: str) -> jax.Array:
    """Returns the ids [T, K] of the k largest logits, in the order of `jax.lax.top_k`.

    That order is: the largest logit first, the lowest id among equal logits, 0 above -0, and NaN
    above infinity (below -infinity if its sign bit is set).

    XLA for GPU compiles `lax.top_k` of a few experts to a sort with one block of threads per
    token. A maximum in each of k rounds fuses into one or two kernels, so it is used on GPU up to
    k = 8. On CPU it is 5 times as fast at 8 experts and k = 2, equally fast at 64 experts and
    k = 2, and slower beyond, so it is used up to k * E = 128. TPUs use `lax.top_k`.

    Args:
        chip: the name of the chip; see chips.chip_name.
    """
    num_experts = logits_TE.shape[1]
    if chips.is_gpu(chip) and top_k <= 8:
        return top_k_ids_in_rounds(logits_TE, top_k)
    if chip == "cpu" and top_k * num_experts <= 128:
        return top_k_ids_in_rounds(logits_TE, top_k)
    return jax.lax.top_k(logits_TE, top_k)[1]


def top_k_ids_in_rounds(logits_TE: jax.Array, top_k: int) -> jax.Array:
    """Returns what `jax.lax.top_k` returns for float32 logits, by k rounds of a maximum."""
    bits_TE = jax.lax.bitcast_convert_type(logits_TE, jnp.int32)
    # The keys are integers in the order of the floats. The smallest integer marks experts that
    # were chosen before. It would be the key of one NaN, which gets the next integer instead.
    taken = jnp.iinfo(jnp.int32).min
    keys_TE = jnp.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    keys_TE = jnp.maximum(keys_TE, taken + 1)
    id_TE = jax.lax.broadcasted_iota(jnp.int32, logits_TE.shape, 1)
    num_experts = logits_TE.shape[1]
    ids = []
    for _ in range(top_k):
        largest_T1 = jnp.max(keys_TE, axis=1, keepdims=True)
        candidates_TE = jnp.where(keys_TE == largest_T1, id_TE, num_experts)
        id_T1 = jnp.min(candidates_TE, axis=1, keepdims=True)
        keys_TE = jnp.where(id_TE == id_T1, taken, keys_TE)
        ids.append(id_T1)
    return jnp.concatenate(ids, axis=1)


def compute_gates(
    logits_TE: jax.Array,
    top_k: int,
    gate: str,
    chip: str,
    router_bias_E: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (gates_TK, ids_TK) of the k chosen experts of every token.

    Without a bias these are the experts with the largest logits. With one, they are the experts
    with the largest softmax probability plus bias; the gates do not depend on the bias otherwise
    (loss-free balancing, Wang et al. 2024).

    Args:
        gate: one of
            "top_k_softmax": softmax over the k chosen logits (MoDSE, Eq. 5-6);
            "softmax_top_k": softmax over all logits, of which k are kept, so that the gates of a
                token sum to less than 1 (Switch Transformer, OLMoE);
            "softmax_top_k_renormalized": the same, divided by their sum. In exact arithmetic this
                equals the first; it exists because other stacks compute it this way.
        chip: see `top_k_ids`.
        router_bias_E: the bias of every expert; None for none.
    """
    scores_TE = jax.lax.stop_gradient(logits_TE)
    if router_bias_E is not None:
        scores_TE = jax.nn.softmax(scores_TE, axis=-1) + router_bias_E[None, :]
    ids_TK = checkpoint_name(top_k_ids(scores_TE, top_k, chip), ROUTING)
    is_chosen_TKE = ids_TK[:, :, None] == jnp.arange(logits_TE.shape[1])[None, None, :]

    def choose(values_TE: jax.Array) -> jax.Array:
        # A sum over a mask instead of a gather, whose gradient would be a scatter.
        return jnp.sum(jnp.where(is_chosen_TKE, values_TE[:, None, :], 0), axis=-1)

    if gate == "top_k_softmax":
        return jax.nn.softmax(choose(logits_TE), axis=-1), ids_TK
    gates_TK = choose(jax.nn.softmax(logits_TE, axis=-1))
    if gate == "softmax_top_k_renormalized":
        gates_TK = gates_TK / jnp.sum(gates_TK, axis=-1, keepdims=True)
    elif gate != "softmax_top_k":
        raise ValueError(f"gate={gate!r} is unknown")
    return gates_TK, ids_TK


def balance_loss(
    counts_KE: jax.Array, probability_sum_E: jax.Array, tokens: jax.Array, count: str
) -> jax.Array:
    """Returns the load-balancing loss E * sum_i f_i P_i (MoDSE, Eq. 9-12), unweighted.

    Its value at perfect balance is K with count="top_k" and 1 with count="argmax".

    Args:
        counts_KE: number of valid tokens whose k-th choice is expert e.
        probability_sum_E: sum over the tokens of the softmax over all logits.
        tokens: number of valid tokens that both are summed over.
        count: "top_k" counts all K choices of a token in f_i, which the paper's tables show;
            "argmax" counts the first choice alone, as its Eq. 10 prints.
    """
    chosen_E = counts_KE[0] if count == "argmax" else jnp.sum(counts_KE, axis=0)
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    fraction_E = jax.lax.stop_gradient(chosen_E.astype(jnp.float32)) / tokens
    num_experts = counts_KE.shape[1]
    return num_experts * jnp.sum(fraction_E * probability_sum_E / tokens)


def route(
    x_TD: jax.Array,
    valid_T: jax.Array,
    weights: RouterWeights,
    options: RouterOptions,
    chip: str,
    reduce: Callable = lambda sums: sums,
    router_bias_E: jax.Array | None = None,
) -> Routing:
    """Routes every token.

    Args:
        valid_T: False for padding tokens. They get experts and gates too, but do not count in
            the losses and statistics.
        chip: see `top_k_ids`.
        reduce: sums a tree of arrays over the devices that share the batch (psum), so that the
            losses are those of the global batch (the load-balancing loss only if
            options.balance_loss_scope is "batch"). The default is for a single device.
        router_bias_E: is added to the scores that experts are chosen by; None for no bias.
    """
    # Without this, NaN in padding would reach the gradient of the weights as 0 * NaN.
    x_TD = jnp.where(valid_T[:, None], x_TD, 0)
    logits_TE = compute_logits(x_TD, weights, options.norm_eps)
    gates_TK, ids_TK = compute_gates(logits_TE, options.top_k, options.gate, chip, router_bias_E)
    log_p_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    p_TE = jnp.exp(log_p_TE)
    z_T = jax.nn.logsumexp(logits_TE, axis=-1)

    is_chosen_TKE = ids_TK[:, :, None] == jnp.arange(logits_TE.shape[1])[None, None, :]
    is_chosen_TKE &= valid_T[:, None, None]
    chosen_gates_TKE = _mask(gates_TK[:, :, None], is_chosen_TKE)
    entropy_TE = _mask(p_TE * log_p_TE, valid_T[:, None])
    local = RouterStatistics(
        counts_KE=jnp.sum(is_chosen_TKE, axis=0, dtype=jnp.int32),
        gates_E=jax.lax.stop_gradient(jnp.sum(chosen_gates_TKE, axis=(0, 1))),
        entropy_P=jax.lax.stop_gradient(-jnp.sum(entropy_TE))[None],
        tokens=jnp.sum(valid_T, dtype=jnp.int32),
        dropped_P=jnp.zeros((1,), jnp.int32),
    )
    local_p_E = jnp.sum(_mask(p_TE, valid_T[:, None]), axis=0)
    local_z = jnp.sum(_mask(z_T * z_T, valid_T))
    batch, batch_p_E, batch_z = reduce((local, local_p_E, local_z))
    batch_tokens = jnp.maximum(batch.tokens, 1).astype(jnp.float32)

    count = options.balance_loss_count
    if options.balance_loss_scope == "batch":
        balance = balance_loss(batch.counts_KE, batch_p_E, batch.tokens, count)
    else:
        balance = balance_loss(local.counts_KE, local_p_E, local.tokens, count)
        balance = reduce(balance * local.tokens) / batch_tokens
    return Routing(
        gates_TK,
        ids_TK,
        balance_loss=balance,
        z_loss=batch_z / batch_tokens,
        width_penalty=jnp.zeros((), jnp.float32),
        statistics=batch,
    )


def _mask(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros((), values.dtype))
