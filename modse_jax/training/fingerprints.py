"""Fingerprints of arrays: hashes that do not depend on how an array is sharded.

A checkpoint holds one for each of its arrays. They are compared after a restore.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# {bytes of an element: unsigned integer type of that size}.
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

GOLDEN_RATIO = 0x9E3779B1  # 2^32 / golden ratio, the multiplier of Fibonacci hashing


def weighted_fingerprint(array: jax.Array) -> jax.Array:
    """Returns the fingerprint that checkpoints of format 2 hold, a uint32.

    For the bits b_i of element i and the constant c = `GOLDEN_RATIO` it is
    sum_i (b_i xor i c) (2 i + 1) mod 2^32. It is almost linear in the bits, so changes of the same
    bit of several elements can cancel. An even number of changed signs always does.
    """
    index, mixed = _bits_with_index(array)
    return _weighted_sum(index, mixed)


def fingerprint(array: jax.Array) -> jax.Array:
    """Returns the fingerprint of one array, a uint32.

    For the bits b_i of element i and the constant c = `GOLDEN_RATIO` it is
    sum_i f(b_i xor i c) (2 i + 1) mod 2^32. The function f is the finalizer of MurmurHash3, after
    which every bit depends on all 32 bits of its argument, so that changes of several elements do
    not cancel. Integer addition modulo 2^32 is associative, so the sum is the same in any order and
    on any mesh.
    """
    index, mixed = _bits_with_index(array)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return _weighted_sum(index, mixed)


# {format of a checkpoint: function that computed its fingerprints}. The newest is that of new
# checkpoints. The functions of older formats stay, so that their checkpoints can be verified.
FINGERPRINTS: dict[int, Callable[[jax.Array], jax.Array]] = {
    2: weighted_fingerprint,
    3: fingerprint,
}

FORMAT = max(FINGERPRINTS)  # of the checkpoints that this version writes


def _bits_with_index(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the flat index i of every element, and its bits xor i * `GOLDEN_RATIO`, uint32."""
    unsigned = UNSIGNED[array.dtype.itemsize]
    if array.dtype == bool:
        bits = array.astype(jnp.uint8)
    else:
        bits = jax.lax.bitcast_convert_type(array, unsigned)
    index = _flat_index(array.shape)
    return index, bits.astype(jnp.uint32) ^ (index * jnp.uint32(GOLDEN_RATIO))


def _weighted_sum(index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the sum of value * (2 * index + 1) modulo 2^32."""
    return jnp.sum(values * (2 * index + jnp.uint32(1)), dtype=jnp.uint32)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """Returns the index of each element in the flattened array, modulo 2^32.

    It is computed dimension by dimension: flattening a sharded array would all-gather it.
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += position * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index
