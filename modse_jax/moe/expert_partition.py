"""Searches for a partition of experts into groups of equal total width, one group per shard.

`expert_placement` uses it to give every shard complete experts and equally many hidden units.
"""

import functools
import random
from collections.abc import Sequence

from modse_jax.moe import expert_widths

Groups = tuple[tuple[int, ...], ...]


@functools.cache
def partition_experts(widths: tuple[int, ...], shards: int, tries: int = 32) -> Groups | None:
    """Returns `shards` groups of expert numbers, or None if no such partition was found.

    The widths of every group have the same sum. Consecutive experts are grouped if that works
    (pairs do, MoDSE section 3.3). Otherwise the groups are filled one by one: each takes the widest
    expert that is left, and other remaining experts whose widths sum to the rest (subset sum). This
    is repeated with the experts in up to `tries` different orders. The search is not exhaustive,
    because that would take exponential time, so it may miss a partition.
    """
    total = sum(widths)
    if total % shards or shards > len(widths) or max(widths) > total // shards:
        return None
    share = total // shards
    consecutive = _partition_in_order(widths, shards, share)
    if consecutive is not None:
        return consecutive
    rng = random.Random(0)
    order = sorted(range(len(widths)), key=lambda expert: -widths[expert])
    for _ in range(tries):
        groups = _fill_groups(order, widths, shards, share)
        if groups is not None:
            return groups
        rng.shuffle(order)
    return None


def _partition_in_order(widths: Sequence[int], shards: int, share: int) -> Groups | None:
    """Returns `shards` groups of consecutive experts of total width `share`, or None.

    None means that some group border would have to lie inside an expert.
    """
    firsts = expert_widths.offsets(widths)
    ends = [first + width for first, width in zip(firsts, widths)]
    bounds = [0]
    for shard in range(1, shards + 1):
        if share * shard not in ends:
            return None
        bounds.append(ends.index(share * shard) + 1)
    return tuple(tuple(range(start, stop)) for start, stop in zip(bounds, bounds[1:]))


def _fill_groups(
    order: Sequence[int], widths: Sequence[int], shards: int, share: int
) -> Groups | None:
    """Fills groups of total width `share` one by one, or returns None if one cannot be filled."""
    groups: list[tuple[int, ...]] = []
    remaining = list(order)
    while remaining and len(groups) <= shards:
        widest = max(remaining, key=lambda expert: widths[expert])
        remaining.remove(widest)
        others = _find_subset(remaining, widths, share - widths[widest])
        if others is None:
            return None
        groups.append(tuple(sorted((widest, *others))))
        remaining = [expert for expert in remaining if expert not in others]
    if remaining or len(groups) != shards:
        return None
    return tuple(sorted(groups))


def _find_subset(experts: Sequence[int], widths: Sequence[int], target: int) -> set[int] | None:
    """Returns a subset of the experts whose widths sum to `target`, or None if there is none.

    If there are several, experts that come earlier in the list are preferred. Bit s of reachable[i]
    is set if some subset of the first i experts has the sum s.
    """
    mask = (1 << (target + 1)) - 1
    reachable = [1]
    for expert in experts:
        sums = reachable[-1]
        reachable.append((sums | sums << widths[expert]) & mask)
    if not reachable[-1] >> target & 1:
        return None
    chosen = set()
    for i in range(len(experts), 0, -1):
        if not reachable[i - 1] >> target & 1:
            chosen.add(experts[i - 1])
            target -= widths[experts[i - 1]]
    return chosen
