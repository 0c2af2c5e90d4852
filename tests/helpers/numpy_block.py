"""One decoder block in float64: loops over documents and tokens, and nothing to get wrong.

Weights are a flat dict, with names such as "attention/w_query" and "moe/w_up".

Legend: L length, D model, A query heads, G key/value heads, C head size.
"""

from typing import NamedTuple

import numpy as np

from modse_jax.config.options import Config
from tests.helpers import numpy_reference


class BlockResult(NamedTuple):
    y_LD: np.ndarray
    balance_loss: float
    z_loss: float


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rotate(x_LAC, positions, base):
    """Rotates element i of the first half of a head with element i of the second half."""
    half = x_LAC.shape[-1] // 2
    angle = positions[:, None, None] * base ** (-np.arange(half) / half)
    first, second = x_LAC[..., :half], x_LAC[..., half:]
    return np.concatenate(
        (
            first * np.cos(angle) - second * np.sin(angle),
            first * np.sin(angle) + second * np.cos(angle),
        ),
        axis=-1,
    )


def attention(x_LD, w, segments, config):
    """Returns causal attention within each document; padding (segment 0) gives zeros."""
    model = config.model
    projected = [
        np.einsum("ld,dac->lac", x_LD, w[f"attention/w_{name}"])
        for name in ("query", "key", "value")
    ]
    query, key, value = projected
    if model.qk_norm == "full":
        length = len(x_LD)
        query, key = (
            rms_norm(
                x.reshape(length, -1), w[f"attention/{name}_norm/scale"], model.norm_eps
            ).reshape(x.shape)
            for name, x in (("query", query), ("key", key))
        )
    positions = np.arange(len(x_LD))
    query = rotate(query, positions, model.rope_base)
    key = rotate(key, positions, model.rope_base)
    heads_per_group = query.shape[1] // key.shape[1]
    y_LD = np.zeros_like(x_LD)
    for t in range(len(x_LD)):
        if segments[t] == 0:
            continue
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        for a in range(query.shape[1]):
            g = a // heads_per_group
            scores = key[seen, g] @ query[t, a] / np.sqrt(query.shape[-1])
            weights = numpy_reference.softmax(scores)
            y_LD[t] += (weights @ value[seen, g]) @ w["attention/w_out"][a]
    return y_LD


def feed_forward(x_LD, w, name):
    gate = x_LD @ w[f"{name}/w_ffn_gate"]
    up = x_LD @ w[f"{name}/w_ffn_up"]
    return (numpy_reference.silu(gate) * up) @ w[f"{name}/w_ffn_down"]


def block(x_LD, w, segments, config: Config) -> BlockResult:
    """Returns the output of a block and its auxiliary losses; rows of padding mean nothing."""
    is_pre = {"pre": True, "post": False}[config.model.norm_position]
    placement = config.moe.shared_placement
    losses = (0.0, 0.0)

    def norm(name, x):
        return rms_norm(x, w[f"{name}/scale"], config.model.norm_eps)

    def moe(x):
        nonlocal losses
        weights = {key[4:]: value for key, value in w.items() if key.startswith("moe/")}
        pools = tuple(numpy_reference.Pool(*pool) for pool in config.pools)
        options = numpy_reference.Options(config.widths, pools, config.moe.gate)
        out = numpy_reference.layer(x, weights, options, segments > 0)
        losses = (out.balance_loss, out.z_loss)
        return out.y_TD

    def shared(x):
        return feed_forward(x, w, "shared")

    if is_pre:
        h = x_LD + attention(norm("attention_norm", x_LD), w, segments, config)
    else:
        h = x_LD + norm("attention_norm", attention(x_LD, w, segments, config))
    if config.is_dense and is_pre:
        y = h + feed_forward(norm("feed_forward_norm", h), w, "feed_forward")
    elif config.is_dense:
        y = h + norm("feed_forward_norm", feed_forward(h, w, "feed_forward"))
    elif placement == "none" and is_pre:
        y = h + moe(norm("moe_norm", h))
    elif placement == "none":
        y = h + norm("moe_norm", moe(h))
    elif placement == "in_layer" and is_pre:
        y = h + moe(norm("moe_norm", h)) + shared(norm("moe_norm", h))
    elif placement == "in_layer":
        y = h + norm("moe_norm", moe(h) + shared(h))
    elif placement == "parallel" and is_pre:
        y = h + moe(norm("moe_norm", x_LD)) + shared(norm("shared_norm", h))
    elif placement == "parallel":
        y = h + norm("moe_norm", moe(x_LD)) + norm("shared_norm", shared(h))
    else:
        raise ValueError(f"shared_placement={placement!r} is unknown")
    return BlockResult(y, *losses)
