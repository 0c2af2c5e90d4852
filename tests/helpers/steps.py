"""TODO"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.training import train_step


def batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = config.training.batch_size, config.data.sequence_length + 1
    segments = np.where(np.arange(shape[1]) < 20, 1, 2) * np.ones((shape[0], 1), np.int32)
    segments[-1, 25:] = (
        0  # padding in one row only: micro-batches differ in their number of targets
    )
    return {
        "tokens": jnp.asarray(rng.integers(3, 259, shape), jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
    }


@functools.cache
def initial_state(config):
    return jax.jit(lambda: train_step.init_state(config))()


def assert_close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=atol * max(1, np.abs(y).max()))
