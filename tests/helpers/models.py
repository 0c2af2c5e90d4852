"""Tiny models for tests: parameters, forward passes and random tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modse_jax.config.options import Config
from modse_jax.model import transformer


@functools.cache
def build_forward(config: Config) -> tuple[dict, Callable]:
    """Returns (parameters, jitted forward pass of (parameters, tokens, segments)).

    The weights of the blocks are enlarged, so that their outputs matter beside the residual.
    """

    def init() -> dict:
        params = nnx.to_pure_dict(nnx.split(transformer.build_model(config))[1])
        return jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params)

    graph, _ = transformer.build_abstract_model(config)

    @jax.jit
    def forward(params: dict, tokens_BL: jax.Array, segments_BL: jax.Array):
        return nnx.merge(graph, params)(tokens_BL, segments_BL)

    return jax.jit(init)(), forward


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Returns token ids of the byte tokenizer, without its special tokens."""
    return jnp.asarray(np.random.default_rng(seed).integers(3, 259, shape), jnp.int32)
