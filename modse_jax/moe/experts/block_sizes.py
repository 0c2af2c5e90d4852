"""The block sizes of the `blocked` backend, which computes an expert's tokens block by block.

This module imports no array library, because reading a config imports it and must be fast.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Sizes of the blocks into which the rows (routed tokens) of an expert are divided.

    Attributes:
        body: the largest number of rows in a block.
        tail: the smallest number of rows in a block.
        saved: size of the buffer of gate and up activations that are saved for the backward pass,
            relative to what balanced routing needs. Activations that do not fit are recomputed.
            0 saves none.
    """

    body: int
    tail: int
    saved: float = 0.0


DEFAULT_BLOCKS = Blocks(body=1024, tail=64, saved=1.25)
