"""The router: the experts of every token, their gates, and the auxiliary losses.

A layer has one or more pools of experts, side by side on the axis of experts and on the axis of
choices. Each has its own softmax, top-k and losses, as if it had a router of its own.

All computations are in float32. The losses are returned unweighted; the training step multiplies
them by their weights.

Legend: T tokens, D model, E experts, K top-k, P pools, G groups of tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from modse_jax.moe import balancing, chosen_experts, gates
from modse_jax.moe.layer_options import PoolRange, RouterOptions, pool_ranges
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
    entropy_P: jax.Array  # float32: entropies of the probabilities of a pool's experts, in nats
    tokens: jax.Array  # int32: valid tokens
    dropped_P: jax.Array  # int32: routed tokens of a pool over capacity, filled in by the layer


class Routing(NamedTuple):
    """The result of routing the tokens of one layer."""

    gates_TK: jax.Array  # float32, in the order of ids_TK
    ids_TK: jax.Array  # int32, within a pool the expert with the largest logit first
    balance_loss: jax.Array  # unweighted load-balancing loss, summed over pools
    z_loss: jax.Array  # unweighted router z-loss, summed over pools
    width_penalty: jax.Array  # unweighted width penalty, summed over pools
    statistics: RouterStatistics


def compute_logits(
    x_TD: jax.Array, weights: RouterWeights, eps: float, pools: Sequence[PoolRange]
) -> jax.Array:
    """Returns the router logits H = x W_g [+ RMSNorm(Softplus(x W_n))], [T, E], in float32.

    Source: MoDSE, Eq. 1-4. The second term has no random part, as the paper prints it. Its norm is
    taken over the experts of each pool.
    """
    x_TD = x_TD.astype(jnp.float32)
    logits_TE = jnp.einsum("td,de->te", x_TD, weights.w_gate, precision="highest")
    if weights.w_noise is None:
        return logits_TE
    noise_TE = jax.nn.softplus(jnp.einsum("td,de->te", x_TD, weights.w_noise, precision="highest"))
    normed = [_divide_by_rms(_slice(noise_TE, pool.experts), eps) for pool in pools]
    return logits_TE + _concatenate(normed, axis=1) * weights.noise_scale[None, :]


def _divide_by_rms(noise_TE: jax.Array, eps: float) -> jax.Array:
    rms_T1 = jnp.sqrt(jnp.mean(noise_TE * noise_TE, axis=-1, keepdims=True) + eps)
    return noise_TE / rms_T1


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
    """Returns (gates_TK, ids_TK) of the k chosen experts of every token of a pool.

    Without a bias these are the experts with the largest logits. With one, they are the experts
    with the largest score plus bias; the gates do not depend on the bias otherwise (loss-free
    balancing, Wang et al. 2024).

    Args:
        logits_TE: the logits of the experts of the pool.
        gate: one of gates.GATES.
        chip: see `top_k_ids`.
        router_bias_E: the bias of every expert; None for none.
    """
    weights = gates.find_gate(gate).weights
    ranked_TE = jax.lax.stop_gradient(logits_TE)
    if router_bias_E is not None:
        ranked_TE = gates.compute_scores(ranked_TE, gate) + router_bias_E[None, :]
    ids_TK = checkpoint_name(top_k_ids(ranked_TE, top_k, chip), ROUTING)
    form = chosen_experts.choose_form(logits_TE.shape[1], top_k, chip)
    select = functools.partial(chosen_experts.select, ids_TK=ids_TK, form=form)
    return weights(logits_TE, select), ids_TK


def choose_experts(
    logits_TE: jax.Array,
    options: RouterOptions,
    chip: str,
    router_bias_E: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (gates_TK, ids_TK) of the chosen experts of every token, pool after pool.

    The gates of pool i are multiplied by k_i / sum(k), so that the layer's output is the mean of
    the pools' outputs, weighted by k_i.

    Args: see `route` and `compute_gates`.
    """
    pools = pool_ranges(options.pools_of(logits_TE.shape[1]))
    total_k = pools[-1].choices.stop
    all_gates = []
    all_ids = []
    for pool in pools:
        bias_E = None if router_bias_E is None else router_bias_E[pool.experts]
        gates_TK, ids_TK = compute_gates(
            _slice(logits_TE, pool.experts), pool.top_k, options.gate, chip, bias_E
        )
        factor = options.gate_scale * pool.top_k / total_k
        all_gates.append(gates_TK if factor == 1 else gates_TK * factor)
        all_ids.append(ids_TK + pool.experts.start)
    return _concatenate(all_gates, axis=1), _concatenate(all_ids, axis=1)


class PoolSums(NamedTuple):
    """Sums over the valid tokens of one device, for one pool."""

    loads_G: balancing.Loads  # with a leading axis of groups of tokens
    gates_E: jax.Array  # float32: gates of the tokens that chose expert e
    entropy: jax.Array  # float32: entropies of the probabilities of the experts
    z: jax.Array  # float32: squares of the logsumexp of the logits


def route(
    x_TD: jax.Array,
    valid_T: jax.Array,
    weights: RouterWeights,
    options: RouterOptions,
    widths: Sequence[int],
    chip: str,
    reduce: Callable = lambda sums: sums,
    router_bias_E: jax.Array | None = None,
    num_sequences: int = 1,
) -> Routing:
    """Routes every token.

    Args:
        valid_T: False for padding tokens. They get experts and gates too, but do not count in
            the losses and statistics.
        widths: hidden units of every expert, for the width penalty.
        chip: see `top_k_ids`.
        reduce: sums a tree of arrays over the devices that share the batch (psum), so that the
            losses are those of the global batch; see options.balance_loss_scope for exceptions.
            The default is for a single device.
        router_bias_E: is added to the scores that experts are chosen by; None for no bias.
        num_sequences: the tokens are those of this many sequences of equal length, one after
            another.
    """
    # Without this, NaN in padding would reach the gradient of the weights as 0 * NaN.
    x_TD = jnp.where(valid_T[:, None], x_TD, 0)
    pools = pool_ranges(options.pools_of(len(widths)))
    logits_TE = compute_logits(x_TD, weights, options.norm_eps, pools)
    gates_TK, ids_TK = choose_experts(logits_TE, options, chip, router_bias_E)
    num_groups = num_sequences if options.balance_loss_scope == "sequence" else 1
    sums = [
        _sum_over_tokens(
            _slice(logits_TE, pool.experts),
            _slice(gates_TK, pool.choices),
            _slice(ids_TK, pool.choices) - pool.experts.start,
            valid_T,
            options.gate,
            chip,
            num_groups,
        )
        for pool in pools
    ]
    return _reduce_losses(gates_TK, ids_TK, sums, valid_T, pools, options, widths, reduce)


def _reduce_losses(
    gates_TK: jax.Array,
    ids_TK: jax.Array,
    sums: Sequence[PoolSums],
    valid_T: jax.Array,
    pools: Sequence[PoolRange],
    options: RouterOptions,
    widths: Sequence[int],
    reduce: Callable,
) -> Routing:
    """Returns the routing with the losses and statistics of all devices.

    Args:
        gates_TK, ids_TK: the gates and the experts of every token of this device.
        sums: the sums over the tokens of this device, for every pool.
        valid_T, options, widths, reduce: see `route`.
        pools: the experts and the choices of every pool.
    """
    local = _make_statistics(sums, pools, valid_T)
    local_p = [jnp.sum(pool.loads_G.probability_sum_E, axis=0) for pool in sums]
    local_z = _add([pool.z for pool in sums])
    batch, batch_p, batch_z = reduce((local, local_p, local_z))
    batch_tokens = jnp.maximum(batch.tokens, 1).astype(jnp.float32)

    balancing_losses = functools.partial(
        _balancing_losses, pools=pools, widths=widths, options=options
    )
    if options.balance_loss_scope == "batch":
        loads = [
            balancing.Loads(batch.counts_KE[pool.choices, pool.experts], p_E, batch.tokens)
            for pool, p_E in zip(pools, batch_p)
        ]
        balance, penalty = balancing_losses(loads)
    else:
        totals = _sum_over_groups(balancing_losses, [pool.loads_G for pool in sums])
        balance, penalty = (total / batch_tokens for total in reduce(totals))
    return Routing(
        gates_TK,
        ids_TK,
        balance_loss=balance,
        z_loss=batch_z / batch_tokens,
        width_penalty=penalty,
        statistics=batch,
    )


def _sum_over_tokens(
    logits_TE: jax.Array,
    gates_TK: jax.Array,
    ids_TK: jax.Array,
    valid_T: jax.Array,
    gate: str,
    chip: str,
    num_groups: int,
) -> PoolSums:
    """Returns the sums over the valid tokens, of the experts and choices of one pool."""
    T, E = logits_TE.shape
    form = chosen_experts.choose_form(E, ids_TK.shape[1], chip)
    log_p_TE = gates.log_probabilities(logits_TE, gate)
    p_TE = jnp.exp(log_p_TE)
    z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    counted_ids_TK = jnp.where(valid_T[:, None], ids_TK, E)
    counted_gates_TK = jax.lax.stop_gradient(_mask(gates_TK, valid_T[:, None]))
    p_GTE = _mask(p_TE, valid_T[:, None]).reshape(num_groups, T // num_groups, E)
    valid_GT = valid_T.reshape(num_groups, T // num_groups)
    loads_G = balancing.Loads(
        counts_KE=chosen_experts.count(counted_ids_TK, E, form, num_groups),
        probability_sum_E=jnp.sum(p_GTE, axis=1),
        tokens=jnp.sum(valid_GT, axis=1, dtype=jnp.int32),
    )
    entropy_TE = _mask(p_TE * log_p_TE, valid_T[:, None])
    return PoolSums(
        loads_G,
        gates_E=jnp.sum(chosen_experts.place(counted_gates_TK, ids_TK, E, form), axis=0),
        entropy=jax.lax.stop_gradient(-jnp.sum(entropy_TE)),
        z=jnp.sum(_mask(z_T * z_T, valid_T)),
    )


def _make_statistics(
    sums: Sequence[PoolSums], pools: Sequence[PoolRange], valid_T: jax.Array
) -> RouterStatistics:
    """Joins the sums of all pools. A pool's experts are never the choice of another pool."""
    shape = (pools[-1].choices.stop, pools[-1].experts.stop)
    counts = [jnp.sum(pool.loads_G.counts_KE, axis=0) for pool in sums]
    counts_KE = counts[0]
    if len(pools) > 1:
        counts_KE = jnp.zeros(shape, jnp.int32)
        for pool, pool_counts_KE in zip(pools, counts):
            counts_KE = counts_KE.at[pool.choices, pool.experts].set(pool_counts_KE)
    return RouterStatistics(
        counts_KE,
        gates_E=_concatenate([pool.gates_E for pool in sums], axis=0),
        entropy_P=jnp.stack([pool.entropy for pool in sums]),
        tokens=jnp.sum(valid_T, dtype=jnp.int32),
        dropped_P=jnp.zeros((len(pools),), jnp.int32),
    )


def _balancing_losses(
    loads: Sequence[balancing.Loads],
    pools: Sequence[PoolRange],
    widths: Sequence[int],
    options: RouterOptions,
) -> tuple[jax.Array, jax.Array]:
    """Returns (load-balancing loss, width penalty) of one group of tokens, summed over pools."""
    balances = [
        balancing.balance_loss(
            *pool_loads, options.balance_loss_count, options.balance_loss_over_choices
        )
        for pool_loads in loads
    ]
    penalties = [
        balancing.width_penalty(*pool_loads, widths[pool.experts], options.width_penalty_scale)
        for pool, pool_loads in zip(pools, loads)
    ]
    return _add(balances), _add(penalties)


def _sum_over_groups(
    losses: Callable, loads_G: Sequence[balancing.Loads]
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums over groups of each loss, times the group's number of tokens.

    Args:
        losses: computes the losses of one group from the loads of every pool.
        loads_G: loads with a leading axis of groups.
    """
    tokens_G = loads_G[0].tokens
    if len(tokens_G) == 1:
        of_group = losses(jax.tree.map(lambda a_G: a_G[0], loads_G))
        return tuple(loss * tokens_G[0] for loss in of_group)
    of_groups = jax.vmap(losses)(loads_G)
    return tuple(jnp.sum(loss_G * tokens_G) for loss_G in of_groups)


def _mask(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _add(values: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)


def _slice(array: jax.Array, columns: slice) -> jax.Array:
    """Returns some columns. All of them are no slice, so that one pool costs what no pools did."""
    is_whole = columns == slice(0, array.shape[1])
    return array if is_whole else array[:, columns]


def _concatenate(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)
