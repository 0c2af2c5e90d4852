"""The chunked losses of the vocabulary equal those that hold the logits of all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.training import losses


@pytest.mark.parametrize("chunk", [1, 6, 10, 1000])
def test_chunked_loss_and_gradients_match_the_reference(chunk):
    rng = np.random.default_rng(0)
    x_BLD = jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32)
    w_DV = jnp.asarray(rng.normal(size=(4, 11)), jnp.float32)
    targets_BL = jnp.asarray(rng.integers(0, 11, (2, 7)))
    weights_BL = jnp.asarray(rng.integers(0, 2, (2, 7)), jnp.float32) / 3

    def chunked(x_BLD, w_DV):
        return 5 * losses.cross_entropy(x_BLD, w_DV, targets_BL, weights_BL, chunk)

    def reference(x_BLD, w_DV):
        return 5 * losses.reference_cross_entropy(x_BLD, w_DV, targets_BL, weights_BL)

    def value_and_gradients(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(x_BLD, w_DV)

    actual = value_and_gradients(chunked)
    expected = value_and_gradients(reference)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=1e-5)
    # Without a gradient the loss is computed by a different function.
    np.testing.assert_allclose(chunked(x_BLD, w_DV), expected[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [6, 1000])
def test_vocabulary_losses_and_gradients_match_the_reference(chunk):
    """The weight is large, so that the gradient of the z-loss outweighs that of cross-entropy."""
    rng = np.random.default_rng(0)
    x_BLD = jnp.asarray(rng.normal(size=(2, 7, 4)), jnp.float32)
    w_DV = jnp.asarray(rng.normal(size=(4, 11)), jnp.float32)
    targets_BL = jnp.asarray(rng.integers(0, 11, (2, 7)))
    weights_BL = jnp.asarray(rng.integers(0, 2, (2, 7)), jnp.float32) / 3

    def chunked(x_BLD, w_DV):
        found = losses.vocabulary_losses(x_BLD, w_DV, targets_BL, weights_BL, chunk, None, 0.7)
        return 5 * found.total, found

    def reference(x_BLD, w_DV):
        found = losses.reference_vocabulary_losses(x_BLD, w_DV, targets_BL, weights_BL, 0.7)
        return 5 * found.total, found

    def value_and_gradients(function):
        with_gradients = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
        return jax.jit(with_gradients)(x_BLD, w_DV)

    actual = value_and_gradients(chunked)
    expected = value_and_gradients(reference)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    (_, found), gradients = actual
    assert float(found.total) == pytest.approx(float(found.cross_entropy + 0.7 * found.z_loss))
    cross_entropy, plain = jax.value_and_grad(
        lambda x_BLD: 5 * losses.cross_entropy(x_BLD, w_DV, targets_BL, weights_BL, chunk)
    )(x_BLD)
    assert float(5 * found.cross_entropy) == pytest.approx(float(cross_entropy))
    assert np.abs(gradients[0] - plain).max() > 1


def test_positions_of_weight_zero_do_not_count_even_if_nan():
    x_BLD = jnp.ones((1, 4, 3)).at[0, 2:].set(jnp.nan)
    w_DV = jnp.ones((3, 5))
    targets_BL = jnp.zeros((1, 4), jnp.int32)
    weights_BL = jnp.array([[1.0, 1, 0, 0]])

    def loss(x_BLD, w_DV):
        return losses.cross_entropy(x_BLD, w_DV, targets_BL, weights_BL, 2)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x_BLD, w_DV)
    assert float(value) == pytest.approx(2 * np.log(5))
    for gradient in gradients:
        assert bool(jnp.isfinite(gradient).all())

    found = losses.vocabulary_losses(x_BLD, w_DV, targets_BL, weights_BL, 2, None, 0.1)
    assert float(found.z_loss) == pytest.approx(2 * (3 + np.log(5)) ** 2)
