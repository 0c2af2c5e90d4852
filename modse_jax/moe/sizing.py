"""Widths of the experts of a layer, in plain integers: ratios, pairs, lists, offsets on the flat axis, size classes."""
import functools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

# Expert widths over the model width, pair by pair: every pair sums to 5 (MoDSE, Table 1).
PAPER_PAIRS = ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))


class Placement(NamedTuple):
    """Which columns of the flat hidden axis every shard of an expert axis holds: equally many."""
    experts: tuple[tuple[int, ...], ...]    # shard -> its experts, in the order of their columns
    widths: tuple[tuple[int, ...], ...]     # shard -> how many columns it has of each

    @property
    def num_experts(self) -> int:
        return len({e for shard in self.experts for e in shard})

    @property
    def slots(self) -> int:
        """Most experts of a shard."""
        return max(len(shard) for shard in self.experts)


class SizeClass(NamedTuple):
    """Experts with equally many columns on a shard: by shard, their places among the shard's experts and first columns
    there, in order. Shards that have fewer are filled up with the place `Placement.slots`, which has no rows."""
    width: int
    places: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]


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
            raise ValueError(f"expert {expert} has width {width}; widths must be whole numbers above 0")
    return tuple(int(w) for w in widths)


def check_pairs(widths: Sequence[int], width: int) -> tuple[int, ...]:
    """The widths, if experts 2j and 2j+1 sum to 2 * width for every j (MoDSE, Eq. 7-8); else ValueError."""
    widths = check_widths(widths)
    if len(widths) % 2:
        raise ValueError(f"{len(widths)} experts cannot form pairs; give an even number")
    for first in range(0, len(widths), 2):
        a, b = widths[first:first + 2]
        if a + b != 2 * width:
            raise ValueError(f"experts {first} and {first + 1} of widths {a} + {b} = {a + b} must sum to "
                             f"2 * width = {2 * width}")
    return widths


def offsets(widths: Sequence[int]) -> tuple[int, ...]:
    """First column of every expert on the flat hidden axis."""
    out, total = [], 0
    for width in widths:
        out.append(total)
        total += width
    return tuple(out)


def size_classes(placement: Placement) -> tuple[SizeClass, ...]:
    """Experts grouped by width, widest first: a program needs one loop per class, not per expert."""
    classes = []
    for width in sorted({w for shard in placement.widths for w in shard}, reverse=True):
        places = [[i for i, w in enumerate(shard) if w == width] for shard in placement.widths]
        firsts = [[offsets(shard)[i] for i in p] for shard, p in zip(placement.widths, places)]
        most = max(map(len, places))
        classes.append(SizeClass(width, tuple((*p, *[placement.slots] * (most - len(p))) for p in places),
                                 tuple((*f, *[0] * (most - len(f))) for f in firsts)))
    return tuple(classes)


def place(widths: Sequence[int], shards: int, kind: str) -> Placement:
    """Experts on the shards of an expert axis.

    Args: kind: "pairs": whole experts, equally many columns on every shard: neighbours in the order given where that
      comes out (pairs do, MoDSE section 3.3), else found by search. "columns": equally many columns of every expert.
    Raises: ValueError where it cannot be done, with the numbers of shards that can.
    """
    widths = check_widths(widths)
    if kind == "columns":
        if any(w % shards for w in widths):
            bad = sorted({w for w in widths if w % shards})
            common = math.gcd(*widths)
            raise ValueError(f"columns of widths {bad} do not divide over {shards} shards; numbers that do: "
                             f"{_listed(n for n in range(1, common + 1) if common % n == 0)}")
        return Placement((tuple(range(len(widths))),) * shards, (tuple(w // shards for w in widths),) * shards)
    groups = partition(widths, shards)
    if groups is None:
        able = _listed(n for n in range(1, min(len(widths), 64) + 1) if partition(widths, n, tries=2))
        raise ValueError(f"no way was found to put experts of widths {widths[:16]} on {shards} shards with equally "
                         f"many columns; numbers of shards that can be: {able}; or moe.placement=columns")
    return Placement(groups, tuple(tuple(widths[e] for e in group) for group in groups))


@functools.cache
def partition(widths: tuple[int, ...], shards: int, tries: int = 32) -> tuple[tuple[int, ...], ...] | None:
    """Experts in `shards` groups of equal total width; None where none was found.

    Runs of neighbours where they come out. Else shard by shard: the widest expert left, and others that fill the shard
    up (subset sum), in `tries` different orders. Not exhaustive: that would take exponential time.
    """
    total = sum(widths)
    if total % shards or shards > len(widths) or max(widths) > total // shards:
        return None
    share = total // shards
    ends = [first + width for first, width in zip(offsets(widths), widths)]
    cuts = [ends.index(share * (s + 1)) + 1 for s in range(shards) if share * (s + 1) in ends]
    if len(cuts) == shards:
        return tuple(tuple(range(a, b)) for a, b in zip([0, *cuts], cuts))
    rng, order = random.Random(0), sorted(range(len(widths)), key=lambda e: -widths[e])
    for _ in range(tries):
        groups, left = [], list(order)
        while left and len(groups) <= shards:
            widest = max(left, key=lambda e: widths[e])
            left.remove(widest)
            rest = _subset(left, widths, share - widths[widest])
            if rest is None:
                break
            groups.append(tuple(sorted((widest, *rest))))
            left = [e for e in left if e not in rest]
        if not left and len(groups) == shards:
            return tuple(sorted(groups))
        rng.shuffle(order)
    return None


def _subset(experts, widths, target):
    """Experts whose widths sum to target, the first ones preferred; None if there are none. One bit per sum."""
    reach, mask = [1], (1 << (target + 1)) - 1
    for e in experts:
        reach.append((reach[-1] | reach[-1] << widths[e]) & mask)
    if not reach[-1] >> target & 1:
        return None
    chosen = set()
    for i in range(len(experts), 0, -1):
        if not reach[i - 1] >> target & 1:
            chosen.add(experts[i - 1])
            target -= widths[experts[i - 1]]
    return chosen


def column_order(widths: Sequence[int], placement: Placement) -> list[int]:
    """Canonical column (experts in order, one after another) of every stored column, shard after shard."""
    first, taken, order = offsets(widths), [0] * len(widths), []
    for experts, columns in zip(placement.experts, placement.widths):
        for e, n in zip(experts, columns):
            order.extend(range(first[e] + taken[e], first[e] + taken[e] + n))
            taken[e] += n
    return order


def straggler(counts: Sequence[float], placement: Placement) -> float:
    """Largest over mean load of the shards of one expert axis; load is tokens times columns, summed over a shard's
    experts. 1 without tokens."""
    loads = [sum(counts[e] * w for e, w in zip(experts, columns))
             for experts, columns in zip(placement.experts, placement.widths)]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def placements_compared(widths: Sequence[int]) -> dict[str, Placement]:
    """What the straggler factor is shown for: the paper's pairs on E / 2 devices, neighbours in the order of size there
    (its bad example), one expert per device, and columns. Those that the widths do not allow are left out."""
    experts = range(len(widths))

    def grouped(order, size):
        groups = tuple(tuple(order[i:i + size]) for i in range(0, len(order), size))
        return Placement(groups, tuple(tuple(widths[e] for e in g) for g in groups))

    out = {}
    if len(widths) % 2 == 0:
        out["pairs"] = grouped(list(experts), 2)
        out["sorted"] = grouped(sorted(experts, key=lambda e: -widths[e]), 2)
    out["one_per_device"] = grouped(list(experts), 1)
    out["columns"] = Placement((tuple(experts),) * 2, (tuple(widths),) * 2)
    return out


def _listed(numbers):
    return ", ".join(map(str, list(numbers)[:16]))
