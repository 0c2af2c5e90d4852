"""The MoE layer as a loop over tokens in float64: slow, and nothing to get wrong."""

import numpy as np


def silu(z):
    return z / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def expert(x, w, first, width):
    s = slice(first, first + width)
    return (silu(x @ w["w_gate"][:, s]) * (x @ w["w_up"][:, s])) @ w["w_down"][s]


def layer(x_TD, w, widths, top_k, gate, eps=1e-5, valid_T=None, count="top_k"):
    """Returns (y_TD, load-balancing loss, router z-loss) of one layer.

    Args:
        w: w_gate, w_up, w_down, router_gate, and for the learned term router_noise and
            router_noise_scale.
    """
    T, E = len(x_TD), len(widths)
    firsts = np.cumsum((0, *widths))[:-1]
    y, f, p_sum, z = np.zeros_like(x_TD), np.zeros(E), np.zeros(E), 0.0
    tokens = 0
    for t in range(T):
        if valid_T is not None and not valid_T[t]:
            continue
        tokens += 1
        logits = x_TD[t] @ w["router_gate"]
        if "router_noise" in w:
            term = np.log1p(np.exp(x_TD[t] @ w["router_noise"]))
            logits = logits + w["router_noise_scale"] * term / np.sqrt((term**2).mean() + eps)
        p = softmax(logits)
        chosen = np.argsort(-logits, kind="stable")[:top_k]
        gates = {
            "top_k_softmax": softmax(logits[chosen]),
            "softmax_top_k": p[chosen],
            "softmax_top_k_renormalized": p[chosen] / p[chosen].sum(),
        }[gate]
        for e, g in zip(chosen, gates):
            y[t] += g * expert(x_TD[t], w, firsts[e], widths[e])
        f[{"top_k": chosen, "argmax": chosen[:1]}[count]] += 1
        p_sum += p
        z += (np.log(np.exp(logits - logits.max()).sum()) + logits.max()) ** 2
    return y, E * np.sum(f / tokens * p_sum / tokens), z / tokens


def directional_derivative(function, arrays, direction, step=1e-5):
    """Central difference of function(arrays) along `direction`, a dict of arrays like `arrays`."""
    plus = function({k: v + step * direction[k] for k, v in arrays.items()})
    minus = function({k: v - step * direction[k] for k, v in arrays.items()})
    return (plus - minus) / (2 * step)
