"""Widths of experts (their numbers of hidden units): ratios, pairs, checks and offsets.

This module imports no array library, so that reading a config is fast.

Source: MoDSE (Mixture of Diverse Size Experts), Table 1 and Eq. 7-8.
"""

from collections.abc import Sequence
from fractions import Fraction

# Expert widths as multiples of the model dimension, pair by pair. Every pair sums to 5 (Table 1).
PAPER_PAIRS = ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))


def equal_widths(num_experts: int, width: int) -> tuple[int, ...]:
    """Returns the widths of a layer whose experts are all equally wide."""
    return (width,) * num_experts


def widths_from_ratio_pairs(pairs: Sequence[tuple[float, float]], dim: int) -> tuple[int, ...]:
    """Returns the widths of experts given as pairs of multiples of the model dimension.

    Args:
        pairs: ratios, for example ((4.5, 0.5), (4.0, 1.0)). The widths are in this order.
        dim: model dimension D.

    Raises:
        ValueError: a ratio times dim is not a positive integer.
    """
    ratios = [ratio for pair in pairs for ratio in pair]
    fractional = [ratio for ratio in ratios if ratio * dim != int(ratio * dim)]
    if fractional:
        raise ValueError(f"ratios {fractional} times model width {dim} are not whole numbers")
    return check_widths([int(ratio * dim) for ratio in ratios])


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Checks that all widths are integers, and returns them as a tuple of int.

    Width 0 is that of a zero expert or a copy expert.

    Raises:
        ValueError: a width is not an integer or negative, or all are 0. The message names the
            expert.
    """
    for expert, width in enumerate(widths):
        if width != int(width) or width < 0:
            raise ValueError(
                f"expert {expert} has width {width}; widths must be whole numbers, at least 0"
            )
    if not any(widths):
        raise ValueError("all experts have width 0; at least one needs hidden units")
    return tuple(int(width) for width in widths)


def check_copy_experts(copy_experts: Sequence[int], widths: Sequence[int]) -> None:
    """Checks the ids of the experts that copy the layer's input.

    Raises:
        ValueError: an id is not that of an expert, occurs twice, or its expert has hidden units.
    """
    for expert in copy_experts:
        if not 0 <= expert < len(widths):
            raise ValueError(
                f"copy expert {expert} does not exist; ids go from 0 to {len(widths) - 1}"
            )
        if widths[expert]:
            raise ValueError(
                f"copy expert {expert} has width {widths[expert]}; an expert that copies its input "
                "has no hidden units: set its width to 0"
            )
    if len(set(copy_experts)) < len(copy_experts):
        raise ValueError(f"the copy experts {tuple(copy_experts)} name an expert twice")


def check_pairs(widths: Sequence[int], width: int) -> tuple[int, ...]:
    """Checks that the widths of experts 2j and 2j+1 sum to 2 * width for every j; returns them.

    A layer of such pairs has as many parameters as one of equal experts (MoDSE, Eq. 7-8).

    Raises:
        ValueError: a pair has another sum, or the number of experts is odd.
    """
    widths = check_widths(widths)
    if len(widths) % 2:
        raise ValueError(f"{len(widths)} experts cannot form pairs; give an even number")
    for first in range(0, len(widths), 2):
        a, b = widths[first : first + 2]
        if a + b != 2 * width:
            raise ValueError(
                f"experts {first} and {first + 1} of widths {a} + {b} = {a + b} must sum to "
                f"2 * width = {2 * width}"
            )
    return widths


def mean_active_width(widths: Sequence[int], pools: Sequence[tuple[int, int]]) -> Fraction:
    """Returns the sum of the widths of a token's experts, exactly.

    The experts of a pool are taken to receive equally many tokens, so that a token uses k times
    their mean width.

    Args:
        widths: hidden width of every expert, pool after pool.
        pools: (number of experts, experts per token) of every pool.
    """
    total = Fraction(0)
    first = 0
    for num_experts, top_k in pools:
        total += Fraction(top_k * sum(widths[first : first + num_experts]), num_experts)
        first += num_experts
    return total


def offsets(widths: Sequence[int]) -> tuple[int, ...]:
    """Returns the first hidden unit of every expert on the flat hidden axis."""
    firsts = []
    total = 0
    for width in widths:
        firsts.append(total)
        total += width
    return tuple(firsts)
