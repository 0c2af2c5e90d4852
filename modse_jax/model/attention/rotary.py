"""Rotary position embeddings (RoFormer, Su et al. 2021).

Legend: B batch, L length, A heads, C head size, H = C / 2 rotated pairs of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.config.options import ModelConfig


def rotary_tables(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sine, cosine) of the rotary angles of positions 0 to length - 1, float32 [L, H].

    They are computed with numpy, so that they are constants of the compiled code. XLA for CPU would
    otherwise fuse sines into the operations that read them, and compute them again for every head.
    """
    num_pairs = config.dim // config.num_heads // 2
    frequency_H = config.rope_base ** (-np.arange(num_pairs) / num_pairs)
    angle_LH = np.arange(length)[:, None] * frequency_H[None, :]
    return np.sin(angle_LH).astype(np.float32), np.cos(angle_LH).astype(np.float32)


def rotate(x_BLAC: jax.Array, sin_BL1H: jax.Array, cos_BL1H: jax.Array) -> jax.Array:
    """Applies rotary positions to queries or keys, in float32; returns the dtype of x_BLAC.

    Element i of the first half of a head is rotated with element i of its second half, as in
    Llama 2 checkpoints in the format of Hugging Face.

    Args:
        x_BLAC: queries or keys.
        sin_BL1H, cos_BL1H: sine and cosine of the rotary angles of the positions; B may be 1.
    """
    first_BLAH, second_BLAH = jnp.split(x_BLAC.astype(jnp.float32), 2, axis=-1)
    rotated_first_BLAH = first_BLAH * cos_BL1H - second_BLAH * sin_BL1H
    rotated_second_BLAH = second_BLAH * cos_BL1H + first_BLAH * sin_BL1H
    out_BLAC = jnp.concatenate((rotated_first_BLAH, rotated_second_BLAH), axis=-1)
    return out_BLAC.astype(x_BLAC.dtype)
