"""The block sizes of the `blocked` backend.

This module imports no array library, so that reading options is fast.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """The block sizes that the rows of an expert are divided into.

    Attributes:
        body: the largest number of rows in a block.
        tail: the smallest number of rows in a block.
        saved: size of the buffer of saved hidden activations, as a multiple of what balanced
            routing needs. What does not fit is recomputed in the backward pass. 0: none.
    """

    body: int
    tail: int
    saved: float = 0.0


DEFAULT_BLOCKS = Blocks(body=1024, tail=64, saved=1.25)
