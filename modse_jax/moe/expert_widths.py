"""TODO"""

from collections.abc import Sequence

# Expert widths over the model width, pair by pair: every pair sums to 5 (MoDSE, Table 1).
PAPER_PAIRS = ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))


def equal_widths(num_experts: int, width: int) -> tuple[int, ...]:
    return (width,) * num_experts


def widths_from_ratio_pairs(pairs: Sequence[tuple[float, float]], dim: int) -> tuple[int, ...]:
    """Widths of experts given pair by pair as multiples of the model width (MoDSE, Table 1).

    Args: pairs: ((4.5, 0.5), (4.0, 1.0), ...); dim: model width D.
    Returns: the widths in the order of the pairs.
    Raises: ValueError where a ratio times dim is not a positive whole number.
    """
    widths = [ratio * dim for pair in pairs for ratio in pair]
    bad = [ratio for pair in pairs for ratio in pair if ratio * dim != int(ratio * dim)]
    if bad:
        raise ValueError(f"ratios {bad} times model width {dim} are not whole numbers")
    return check_widths([int(w) for w in widths])


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The widths, if every one is a positive whole number; else ValueError that names the expert."""
    for expert, width in enumerate(widths):
        if width != int(width) or width <= 0:
            raise ValueError(
                f"expert {expert} has width {width}; widths must be whole numbers above 0"
            )
    return tuple(int(w) for w in widths)


def check_pairs(widths: Sequence[int], width: int) -> tuple[int, ...]:
    """The widths, if experts 2j and 2j+1 sum to 2 * width for every j (MoDSE, Eq. 7-8); else ValueError."""
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


def offsets(widths: Sequence[int]) -> tuple[int, ...]:
    """First column of every expert on the flat hidden axis."""
    out, total = [], 0
    for width in widths:
        out.append(total)
        total += width
    return tuple(out)
