"""TODO"""

import jax
import jax.numpy as jnp


def matmul(x_BLX, w_XY, chip):
    """x w, as a product of two matrices: of more axes XLA for CPU would transpose the gradient, to multiply it by x."""
    product = product_on_cpu if chip == "cpu" else jnp.dot
    return product(x_BLX.reshape(-1, x_BLX.shape[-1]), w_XY).reshape(*x_BLX.shape[:-1], -1)


@jax.custom_vjp
def product_on_cpu(x_NX, w_XY):
    """jnp.dot. Its gradient by w is a product over both leading axes, at which XLA for CPU is 1.2 times as slow as at
    transposing x first; and if the two were not kept apart, it would make them one again."""
    return jnp.dot(x_NX, w_XY)


def product_backward(saved, dy_NY):
    x_NX, w_XY = saved
    return jnp.dot(dy_NY, w_XY.T), jnp.dot(jax.lax.optimization_barrier(x_NX.T), dy_NY)


product_on_cpu.defvjp(lambda x_NX, w_XY: (jnp.dot(x_NX, w_XY), (x_NX, w_XY)), product_backward)
