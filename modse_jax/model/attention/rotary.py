"""TODO"""

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.config.options import ModelConfig


def rotary(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(sine, cosine) [L, C / 2] of the rotary angles (RoFormer) of positions 0 to L - 1, float32.

    A table known before compilation: XLA for CPU moves sines into what reads them, and works them out for every head.
    """
    half = config.dim // config.num_heads // 2
    frequency_C = config.rope_base ** (-np.arange(half) / half)
    angle_LC = np.arange(length)[:, None] * frequency_C[None, :]
    return np.sin(angle_LC).astype(np.float32), np.cos(angle_LC).astype(np.float32)


def rotate(x_BLAC: jax.Array, sin_BL1C: jax.Array, cos_BL1C: jax.Array) -> jax.Array:
    """Rotary embedding (first half with second half, as Llama 2 checkpoints in common use), in float32."""
    first, second = jnp.split(x_BLAC.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate(
        (first * cos_BL1C - second * sin_BL1C, second * cos_BL1C + first * sin_BL1C), axis=-1
    )
    return out.astype(x_BLAC.dtype)
