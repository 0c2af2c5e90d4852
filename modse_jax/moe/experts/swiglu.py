"""SwiGLU, the activation between the matmuls of an expert, and its gradient.

Both functions are element-wise and take and return float32. They are called inside the Pallas
kernels and in plain JAX code.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
"""

from typing import NamedTuple

import jax


class SwigluBackward(NamedTuple):
    """The result of `swiglu_backward`: hidden activations and the gradients of both inputs."""

    hidden: jax.Array
    dgate: jax.Array
    dup: jax.Array


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns the hidden activations silu(gate) * up."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_backward(gate: jax.Array, up: jax.Array, dhidden: jax.Array) -> SwigluBackward:
    """Returns the gradients of gate and up, and the hidden activations again.

    The gradient of the down projection needs the hidden activations, which are not saved.

    Args:
      gate, up: the inputs of `swiglu`.
      dhidden: the gradient with respect to its output.
    """
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    # Do not reorder these operations: tests compare the results of backends bit for bit.
    hidden = silu * up
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    dup = dhidden * silu
    return SwigluBackward(hidden, dgate, dup)
