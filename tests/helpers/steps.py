"""Helpers for tests of training steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.config.options import Config
from modse_jax.training import train_step


def batch(config: Config, seed: int = 0) -> dict[str, jax.Array]:
    """Returns a random batch with two documents per row.

    Only the last row has padding, so micro-batches differ in their number of targets.
    """
    rng = np.random.default_rng(seed)
    rows = config.training.batch_size
    length = config.data.sequence_length + 1
    row = np.where(np.arange(length) < 20, 1, 2)
    segments = row * np.ones((rows, 1), np.int32)
    segments[-1, 25:] = 0
    return {
        "tokens": jnp.asarray(rng.integers(3, 259, (rows, length)), jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
    }


@functools.cache
def initial_state(config: Config) -> train_step.State:
    """Returns the initial state of a config on the default device."""
    return jax.jit(lambda: train_step.init_state(config))()


def assert_close(actual: Any, expected: Any, atol: float) -> None:
    """Compares two trees of arrays; `atol` is relative to the largest element if that is over 1."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=atol * max(1, np.abs(other).max()))
