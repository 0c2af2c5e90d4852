"""The dense FFN: against an expert of the same width, and what its activation saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.model import feed_forward
from modse_jax.moe.experts import expert_weights, reference_ffn
from tests.helpers.configs import tiny_config


def plain_activation(gate, up):
    """Returns silu(gate) * up, differentiated by JAX."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return hidden.astype(gate.dtype)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_feed_forward_equals_an_expert_of_the_same_width_with_gradients(dtype, tolerance):
    """In bfloat16 it is compared with the expert in float32."""
    config = tiny_config(model=dict(dtype=dtype)).model
    layer = feed_forward.FeedForward(config, 24, None, nnx.Rngs(0))
    graph, state = nnx.split(layer)
    weights = {name: 2 * leaf for name, leaf in nnx.to_pure_dict(state).items()}
    x_BLD, dy_BLD = jax.random.normal(jax.random.key(0), (2, 2, 11, 16))

    def loss(weights, x_BLD):
        y_BLD = nnx.merge(graph, weights)(x_BLD.astype(dtype))
        assert y_BLD.dtype == dtype
        return jnp.sum(y_BLD.astype(jnp.float32) * dy_BLD)

    def expert_loss(weights, x_BLD):
        expert = expert_weights.ExpertWeights(
            w_gate=weights["w_ffn_gate"], w_up=weights["w_ffn_up"], w_down=weights["w_ffn_down"]
        )
        y_ND = reference_ffn.reference(x_BLD.reshape(22, 16), jnp.array([22]), expert, (24,))
        return jnp.sum(y_ND.reshape(dy_BLD.shape) * dy_BLD)

    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, x_BLD)
    want = jax.jit(jax.value_and_grad(expert_loss, (0, 1)))(weights, x_BLD)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(jnp.abs(other).max()))


def test_activation_saves_its_two_arguments_alone():
    """JAX's own derivative saves five arrays in float32."""
    gate, up = jax.random.normal(jax.random.key(0), (2, 4, 8), jnp.bfloat16)

    def list_saved(activation):
        _, pull_back = jax.vjp(activation, gate, up)
        return [str(array.dtype) for array in jax.tree.leaves(pull_back) if array.shape == (4, 8)]

    assert list_saved(feed_forward.activate) == 2 * ["bfloat16"]
    assert list_saved(plain_activation) == 5 * ["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_has_the_gradient_of_jax(dtype):
    gate, up, dhidden = jax.random.normal(jax.random.key(1), (3, 1, 5, 64), dtype)

    def output_and_gradients(activation):
        hidden, pull_back = jax.vjp(activation, gate, up)
        return hidden, *pull_back(dhidden)

    got = jax.jit(lambda: output_and_gradients(feed_forward.activate))()
    want = jax.jit(lambda: output_and_gradients(plain_activation))()
    for one, other in zip(got, want):
        assert one.dtype == other.dtype == dtype
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(
            one, other, atol=1e-6, rtol=1e-2 if dtype == "bfloat16" else 1e-5
        )
