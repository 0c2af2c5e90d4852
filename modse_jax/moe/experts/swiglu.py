"""SwiGLU and its gradient, the activation between the matmuls of an expert.

Both functions are element-wise and run in float32, inside kernels and outside of them.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202.
"""

from typing import NamedTuple

import jax


class SwigluBackward(NamedTuple):
    """The recomputed hidden activations and the gradients of SwiGLU's two inputs."""

    hidden: jax.Array
    dgate: jax.Array
    dup: jax.Array


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns the hidden activations silu(gate) * up."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_backward(gate: jax.Array, up: jax.Array, dhidden: jax.Array) -> SwigluBackward:
    """Returns the hidden activations and the gradients of gate and up.

    Args:
      gate, up: the inputs of `swiglu`.
      dhidden: the gradient of its output.
    """
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    # The order of operations is part of the contract: results are compared bit for bit.
    hidden = silu * up
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    dup = dhidden * silu
    return SwigluBackward(hidden, dgate, dup)
