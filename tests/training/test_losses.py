"""Chunked cross-entropy against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.training import losses


@pytest.mark.parametrize("chunk", [1, 6, 10, 1000])
def test_chunks_change_nothing(chunk):
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 11)), jnp.float32),
    )
    targets, weights = (
        jnp.asarray(rng.integers(0, 11, (2, 7))),
        jnp.asarray(rng.integers(0, 2, (2, 7)), jnp.float32),
    )
    weights = weights / 3

    def both(f):
        return jax.jit(jax.value_and_grad(lambda x, w: 5 * f(x, w), argnums=(0, 1)))(x, w)

    got = both(lambda x, w: losses.cross_entropy(x, w, targets, weights, chunk))
    want = both(lambda x, w: losses.reference_cross_entropy(x, w, targets, weights))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    value = losses.cross_entropy(
        x, w, targets, weights, chunk
    )  # without a gradient another path runs
    np.testing.assert_allclose(5 * value, want[0], rtol=1e-5)


def test_what_has_no_weight_does_not_count_even_nan():
    x = jnp.ones((1, 4, 3)).at[0, 2:].set(jnp.nan)
    w, targets, weights = (
        jnp.ones((3, 5)),
        jnp.zeros((1, 4), jnp.int32),
        jnp.array([[1.0, 1, 0, 0]]),
    )
    value, (dx, dw) = jax.jit(
        jax.value_and_grad(
            lambda x, w: losses.cross_entropy(x, w, targets, weights, 2), argnums=(0, 1)
        )
    )(x, w)
    assert float(value) == pytest.approx(2 * np.log(5))
    assert bool(jnp.isfinite(dx).all() & jnp.isfinite(dw).all())
