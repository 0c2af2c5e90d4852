"""The matmul of attention projections and dense FFNs, with a weight gradient that is fast on CPU.

The weight gradient of x w contracts the leading axis of both operands, x and dy. In XLA for CPU it
is 1.2 times as fast if x is transposed explicitly first. When that is no longer so, the file can be
deleted and `jnp.dot` used instead.

Legend: B batch, L length, N = B * L tokens, X input features, Y output features.
"""

import jax
import jax.numpy as jnp


def matmul(x_BLX: jax.Array, w_XY: jax.Array, chip: str) -> jax.Array:
    """Returns x w, [B, L, Y].

    The tokens are flattened to one axis. With two token axes, XLA for CPU would transpose the
    output gradient for the weight gradient, which is slower.

    Args:
        chip: the name of the chip; see chips.chip_name.
    """
    x_NX = x_BLX.reshape(-1, x_BLX.shape[-1])
    y_NY = matmul_on_cpu(x_NX, w_XY) if chip == "cpu" else jnp.dot(x_NX, w_XY)
    return y_NY.reshape(*x_BLX.shape[:-1], -1)


@jax.custom_vjp
def matmul_on_cpu(x_NX: jax.Array, w_XY: jax.Array) -> jax.Array:
    """Returns x w, [N, Y], with a weight gradient that transposes x explicitly.

    See the description of this module for the reason.
    """
    return jnp.dot(x_NX, w_XY)


def _matmul_forward(
    x_NX: jax.Array, w_XY: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.dot(x_NX, w_XY), (x_NX, w_XY)


def _matmul_backward(
    saved: tuple[jax.Array, jax.Array], dy_NY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_NX, w_XY = saved
    dx_NX = jnp.dot(dy_NY, w_XY.T)
    # The barrier keeps XLA from fusing the transpose back into the matmul.
    x_XN = jax.lax.optimization_barrier(x_NX.T)
    return dx_NX, jnp.dot(x_XN, dy_NY)


matmul_on_cpu.defvjp(_matmul_forward, _matmul_backward)
