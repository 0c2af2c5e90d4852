"""An MoE layer with pools, gates, capacity, zero and copy experts: a loop over tokens in float64.

It shares no code with the package. Sequences lie one after another.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tests.helpers.numpy_reference import expert, softmax


class LayerResult(NamedTuple):
    y_TD: np.ndarray
    balance_loss: float
    z_loss: float
    width_penalty: float
    dropped: int


class Choice(NamedTuple):
    """One expert that a token chose."""

    token: int
    rank: int  # first choice of its pool: 0
    pool: int
    expert: int
    gate: float


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


SCORES = {
    "top_k_softmax": softmax,
    "softmax_top_k": softmax,
    "softmax_top_k_renormalized": softmax,
    "sigmoid": sigmoid,
    "sigmoid_renormalized": sigmoid,
    "uniform": softmax,
}


def score(logits, gate):
    return SCORES[gate](logits)


def compute_gates(logits, chosen, gate):
    """The weights of the chosen experts, each from its definition."""
    scores = score(logits, gate)[chosen]
    weights = {
        "top_k_softmax": softmax(logits[chosen]),
        "softmax_top_k": scores,
        "softmax_top_k_renormalized": scores / scores.sum(),
        "sigmoid": scores,
        "sigmoid_renormalized": scores / scores.sum(),
        "uniform": np.full(len(chosen), 1 / len(chosen)),
    }
    return weights[gate]


def choose(x_TD, valid_T, w, pools, gate, scale, bias):
    """Returns the choices of all valid tokens, and per pool the logits of every token."""
    choices = []
    logits_of_pools = []
    total_k = sum(top_k for _, top_k in pools)
    first = 0
    for p, (num_experts, top_k) in enumerate(pools):
        own = slice(first, first + num_experts)
        logits_TE = x_TD @ w["router_gate"][:, own]
        logits_of_pools.append(logits_TE)
        for t in np.flatnonzero(valid_T):
            ranked = logits_TE[t] if bias is None else score(logits_TE[t], gate) + bias[own]
            chosen = np.argsort(-ranked, kind="stable")[:top_k]
            weights = compute_gates(logits_TE[t], chosen, gate) * scale * top_k / total_k
            for rank, (e, weight) in enumerate(zip(chosen, weights)):
                choices.append(Choice(int(t), rank, p, first + int(e), weight))
        first += num_experts
    return choices, logits_of_pools


def drop_over_capacity(choices, widths, pools, factor, order, num_valid):
    """Returns the choices that are served, and the number of the others."""
    if not factor:
        return choices, 0
    sort_keys = {
        "choice": lambda c: (c.rank, c.token),
        "token": lambda c: (c.token, c.rank),
    }
    queue = sorted(choices, key=sort_keys[order])
    served = []
    rows = [0] * len(widths)
    for choice in queue:
        num_experts, top_k = pools[choice.pool]
        limit = math.ceil(Fraction(str(factor)) * num_valid * top_k / num_experts)
        if widths[choice.expert] and rows[choice.expert] == limit:
            continue
        rows[choice.expert] += 1
        served.append(choice)
    return served, len(choices) - len(served)


def balance(choices, logits_of_pools, tokens, pools, widths, options):
    """Returns (balance loss, width penalty) of some tokens, summed over pools."""
    loss = penalty = 0.0
    first = 0
    for p, (num_experts, _) in enumerate(pools):
        own_widths = np.array(widths[first : first + num_experts], float)
        relative = own_widths / (own_widths.mean() or 1)
        chosen = np.zeros(num_experts)
        for choice in choices:
            if choice.pool == p and choice.token in tokens:
                chosen[choice.expert - first] += 1
        p_sum = np.zeros(num_experts)
        for t in tokens:
            scores = score(logits_of_pools[p][t], options["gate"])
            p_sum += scores / scores.sum()
        n = len(tokens)
        products = chosen / n * p_sum / n
        divisor = {"sum": 1, "mean": pools[p][1]}[options["over_choices"]]
        loss += num_experts * products.sum() / divisor
        penalty += num_experts * (products * relative).sum()
        first += num_experts
    return loss, penalty


def layer(x_TD, w, widths, pools, valid_T, options):
    """Returns the LayerResult of one layer.

    Args:
        w: w_gate, w_up, w_down of all experts side by side, and router_gate.
        pools: (number of experts, top_k) of every pool.
        options: gate, scale, bias (or None), factor, order, copies, over_choices, groups (lists of
            tokens that the balancing losses are computed over).
    """
    firsts = np.cumsum((0, *widths))[:-1]
    valid_tokens = [int(t) for t in np.flatnonzero(valid_T)]
    choices, logits = choose(
        x_TD, valid_T, w, pools, options["gate"], options["scale"], options["bias"]
    )
    served, dropped = drop_over_capacity(
        choices, widths, pools, options["factor"], options["order"], len(valid_tokens)
    )
    y = np.zeros_like(x_TD)
    for choice in served:
        x = x_TD[choice.token]
        if choice.expert in options["copies"]:
            y[choice.token] += choice.gate * x
        elif widths[choice.expert]:
            first, width = firsts[choice.expert], widths[choice.expert]
            y[choice.token] += choice.gate * expert(x, w, first, width)
    z = sum(
        (np.log(np.exp(logits_TE[t] - logits_TE[t].max()).sum()) + logits_TE[t].max()) ** 2
        for logits_TE in logits
        for t in valid_tokens
    )
    loss = penalty = 0.0
    for group in options["groups"]:
        tokens = [t for t in group if valid_T[t]]
        if tokens:
            of_group = balance(choices, logits, tokens, pools, widths, options)
            loss += of_group[0] * len(tokens) / len(valid_tokens)
            penalty += of_group[1] * len(tokens) / len(valid_tokens)
    return LayerResult(y, loss, z / len(valid_tokens), penalty, dropped)
