"""Rotary position embeddings (RoFormer, Su et al. 2021).

Legend: B batch, L length, A heads, C head size, H = C / 2 rotated pairs of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.config.options import ModelConfig


def rotary_tables(length: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sine, cosine) of the rotary angles of positions 0 to length - 1, float32 [L, H].

    They are computed before compilation. XLA for CPU would fuse sines into the operations that
    read them, and would then compute them again for every head.
    """
    num_pairs = config.dim // config.num_heads // 2
    frequency_H = config.rope_base ** (-np.arange(num_pairs) / num_pairs)
    angle_LH = np.arange(length)[:, None] * frequency_H[None, :]
    return np.sin(angle_LH).astype(np.float32), np.cos(angle_LH).astype(np.float32)


def rotate(x_BLAC: jax.Array, sin_BL1H: jax.Array, cos_BL1H: jax.Array) -> jax.Array:
    """Returns the rotated queries or keys, in the type of x_BLAC; computed in float32.

    Element i of the first half of a head is rotated with element i of its second half, as in
    Llama 2 checkpoints in the format of Hugging Face.
    """
    first_BLAH, second_BLAH = jnp.split(x_BLAC.astype(jnp.float32), 2, axis=-1)
    rotated_first_BLAH = first_BLAH * cos_BL1H - second_BLAH * sin_BL1H
    rotated_second_BLAH = second_BLAH * cos_BL1H + first_BLAH * sin_BL1H
    out_BLAC = jnp.concatenate((rotated_first_BLAH, rotated_second_BLAH), axis=-1)
    return out_BLAC.astype(x_BLAC.dtype)
