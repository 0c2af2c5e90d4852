"""The MoE layer as a loop over tokens in float64: slow, and nothing to get wrong.

All functions also take complex arrays, so that `complex_step_derivative` can differentiate them.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def silu(z):
    return z * sigmoid(z)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.real.max())
    return e / e.sum()


def log_sum_exp(z):
    return np.log(np.exp(z - z.real.max()).sum()) + z.real.max()


def expert(x, w, first, width):
    s = slice(first, first + width)
    return (silu(x @ w["w_gate"][:, s]) * (x @ w["w_up"][:, s])) @ w["w_down"][s]


class Pool(NamedTuple):
    num_experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a layer; see RouterOptions and ExpertOptions for those of the same name."""

    widths: tuple[int, ...]
    pools: tuple[Pool, ...]
    gate: str
    gate_scale: float = 1.0
    eps: float = 1e-5
    count: str = "top_k"
    over_choices: str = "sum"
    sequences: int = 1  # the losses are means over this many sequences, weighted by tokens
    width_penalty_scale: str = "mean"
    copy_experts: tuple[int, ...] = ()
    capacity_factor: str = "0"  # a decimal number
    capacity_order: str = "choice"


class Output(NamedTuple):
    y_TD: np.ndarray
    balance_loss: complex
    z_loss: complex
    width_penalty: complex
    dropped_P: np.ndarray


class Route(NamedTuple):
    """One choice of one token."""

    token: int
    choice: int  # over all pools
    expert: int  # over all pools
    pool: int
    gate: complex


def layer(x_TD, w, options: Options, valid_T=None, bias_E=None) -> Output:
    """Computes one layer.

    Args:
        w: w_gate, w_up, w_down, router_gate, and for the learned term router_noise and
            router_noise_scale.
        valid_T: False for padding.
        bias_E: is added to the scores that experts are chosen by.
    """
    T = len(x_TD)
    valid_T = np.ones(T, bool) if valid_T is None else np.asarray(valid_T)
    bias_E = np.zeros(len(options.widths)) if bias_E is None else np.asarray(bias_E)
    routes: list[Route] = []
    balance = penalty = z = 0.0
    first_expert = first_choice = 0
    total_k = sum(pool.top_k for pool in options.pools)
    for number, pool in enumerate(options.pools):
        experts = slice(first_expert, first_expert + pool.num_experts)
        chosen_by_token, p_by_token = {}, {}
        for t in np.flatnonzero(valid_T):
            logits = router_logits(x_TD[t], w, experts, options.eps)
            p_by_token[t] = probabilities(logits, options.gate)
            chosen = choose(logits, bias_E[experts], pool.top_k, options.gate)
            chosen_by_token[t] = chosen
            z += log_sum_exp(logits) ** 2
            for i, (e, gate) in enumerate(zip(chosen, gates(logits, chosen, options.gate))):
                weight = gate * options.gate_scale * pool.top_k / total_k
                routes.append(Route(t, first_choice + i, first_expert + e, number, weight))
        for sequence in range(options.sequences):
            tokens = [t for t in p_by_token if t * options.sequences // T == sequence]
            terms = balance_terms(
                [chosen_by_token[t] for t in tokens], [p_by_token[t] for t in tokens], pool, options
            )
            widths = np.array(options.widths[experts], float)
            unit = widths.mean() if options.width_penalty_scale == "mean" else widths.max()
            relative = widths / unit if unit else widths
            share = len(tokens) / valid_T.sum()
            balance += share * terms.balance
            penalty += share * sum(terms.products * relative)
        first_expert += pool.num_experts
        first_choice += pool.top_k
    kept, dropped_P = serve(routes, options, int(valid_T.sum()))
    y_TD = sum_outputs(kept, x_TD, w, options)
    return Output(y_TD, balance, z / valid_T.sum(), penalty, dropped_P)


def router_logits(x, w, experts, eps):
    logits = x @ w["router_gate"][:, experts]
    if "router_noise" not in w:
        return logits
    term = np.log1p(np.exp(x @ w["router_noise"][:, experts]))
    return logits + w["router_noise_scale"][experts] * term / np.sqrt((term**2).mean() + eps)


def probabilities(logits, gate):
    """Returns the scores, divided by their sum."""
    if gate.startswith("sigmoid"):
        return sigmoid(logits) / sigmoid(logits).sum()
    return softmax(logits)


def choose(logits, bias, top_k, gate):
    scores = sigmoid(logits) if gate.startswith("sigmoid") else softmax(logits)
    return np.argsort(-(scores.real + bias), kind="stable")[:top_k]


def gates(logits, chosen, gate):
    if gate == "top_k_softmax":
        return softmax(logits[chosen])
    if gate == "uniform":
        return np.full(len(chosen), 1 / len(chosen))
    scores = sigmoid(logits) if gate.startswith("sigmoid") else softmax(logits)
    gates = scores[chosen]
    return gates / gates.sum() if gate.endswith("renormalized") else gates


class BalanceTerms(NamedTuple):
    balance: complex  # E * sum_i f_i P_i
    products: np.ndarray  # E * f_i P_i of every expert, with all choices counted in f_i


def balance_terms(chosen, p, pool: Pool, options: Options) -> BalanceTerms:
    """Computes the balance loss of a pool over some tokens from their choices and probabilities."""
    E = pool.num_experts
    tokens = max(len(p), 1)
    f, f_all, p_sum = np.zeros(E), np.zeros(E), np.zeros(E)
    for experts, probability in zip(chosen, p):
        f_all[experts] += 1
        f[experts if options.count == "top_k" else experts[:1]] += 1
        p_sum = p_sum + probability
    counted = pool.top_k if options.count == "top_k" else 1
    balance = E * sum(f / tokens * p_sum / tokens)
    if options.over_choices == "mean":
        balance /= counted
    return BalanceTerms(balance, E * f_all / tokens * p_sum / tokens)


def serve(routes: Sequence[Route], options: Options, tokens: int):
    """Returns (routes within the capacity of their experts, number of dropped ones per pool)."""
    dropped_P = np.zeros(len(options.pools), int)
    factor = fractions.Fraction(options.capacity_factor)
    if not factor:
        return list(routes), dropped_P
    by_choice = options.capacity_order == "choice"
    order = sorted(routes, key=lambda r: (r.choice, r.token) if by_choice else (r.token, r.choice))
    served = dict.fromkeys(range(len(options.widths)), 0)
    kept = []
    for route in order:
        pool = options.pools[route.pool]
        limit = math.ceil(factor * tokens * pool.top_k / pool.num_experts)
        if options.widths[route.expert] and served[route.expert] >= limit:
            dropped_P[route.pool] += 1
            continue
        served[route.expert] += 1
        kept.append(route)
    return kept, dropped_P


def sum_outputs(routes: Sequence[Route], x_TD, w, options: Options):
    """Returns the sum of gate * output over the routes of every token."""
    firsts = np.cumsum((0, *options.widths))[:-1]
    y_TD = np.zeros(x_TD.shape, np.result_type(x_TD, *w.values()))
    for route in routes:
        x, e = x_TD[route.token], route.expert
        if options.widths[e]:
            y_TD[route.token] += route.gate * expert(x, w, firsts[e], options.widths[e])
        elif e in options.copy_experts:
            y_TD[route.token] += route.gate * x
    return y_TD


def complex_step_derivative(function: Callable, arrays: dict, direction: dict, step=1e-30) -> float:
    """Returns the derivative of function(arrays) along `direction`, by a complex step.

    Unlike a difference of two values, it has no rounding error, and the step is too small to move
    a choice of the router.
    """
    return function({k: v + 1j * step * direction[k] for k, v in arrays.items()}).imag / step


def directional_derivative(function, arrays, direction, step=1e-5):
    """Central difference of function(arrays) along `direction`, a dict of arrays like `arrays`."""
    plus = function({k: v + step * direction[k] for k, v in arrays.items()})
    minus = function({k: v - step * direction[k] for k, v in arrays.items()})
    return (plus - minus) / (2 * step)
