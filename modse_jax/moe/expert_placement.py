"""Widths of the experts of a layer, in plain integers: ratios, pairs, lists, offsets on the flat axis, size classes."""

import functools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from modse_jax.moe.expert_widths import check_widths, offsets


class Placement(NamedTuple):
    """Which columns of the flat hidden axis every shard of an expert axis holds: equally many."""

    experts: tuple[tuple[int, ...], ...]  # shard -> its experts, in the order of their columns
    widths: tuple[tuple[int, ...], ...]  # shard -> how many columns it has of each

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
    slots: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]


def size_classes(placement: Placement) -> tuple[SizeClass, ...]:
    """Experts grouped by width, widest first: a program needs one loop per class, not per expert."""
    classes = []
    for width in sorted({w for shard in placement.widths for w in shard}, reverse=True):
        places = [[i for i, w in enumerate(shard) if w == width] for shard in placement.widths]
        firsts = [[offsets(shard)[i] for i in p] for shard, p in zip(placement.widths, places)]
        most = max(map(len, places))
        classes.append(
            SizeClass(
                width,
                tuple((*p, *[placement.slots] * (most - len(p))) for p in places),
                tuple((*f, *[0] * (most - len(f))) for f in firsts),
            )
        )
    return tuple(classes)


def place_experts(widths: Sequence[int], shards: int, kind: str) -> Placement:
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
            raise ValueError(
                f"columns of widths {bad} do not divide over {shards} shards; numbers that do: "
                f"{_listed(n for n in range(1, common + 1) if common % n == 0)}"
            )
        return Placement(
            (tuple(range(len(widths))),) * shards, (tuple(w // shards for w in widths),) * shards
        )
    groups = partition_experts(widths, shards)
    if groups is None:
        able = _listed(
            n for n in range(1, min(len(widths), 64) + 1) if partition_experts(widths, n, tries=2)
        )
        raise ValueError(
            f"no way was found to put experts of widths {widths[:16]} on {shards} shards with equally "
            f"many columns; numbers of shards that can be: {able}; or moe.placement=columns"
        )
    return Placement(groups, tuple(tuple(widths[e] for e in group) for group in groups))


@functools.cache
def partition_experts(
    widths: tuple[int, ...], shards: int, tries: int = 32
) -> tuple[tuple[int, ...], ...] | None:
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


def hidden_unit_order(widths: Sequence[int], placement: Placement) -> list[int]:
    """Canonical column (experts in order, one after another) of every stored column, shard after shard."""
    first, taken, order = offsets(widths), [0] * len(widths), []
    for experts, columns in zip(placement.experts, placement.widths):
        for e, n in zip(experts, columns):
            order.extend(range(first[e] + taken[e], first[e] + taken[e] + n))
            taken[e] += n
    return order


def straggler_factor(counts: Sequence[float], placement: Placement) -> float:
    """Largest over mean load of the shards of one expert axis; load is tokens times columns, summed over a shard's
    experts. 1 without tokens."""
    loads = [
        sum(counts[e] * w for e, w in zip(experts, columns))
        for experts, columns in zip(placement.experts, placement.widths)
    ]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def reference_placements(widths: Sequence[int]) -> dict[str, Placement]:
    """What the straggler factor is shown for: the paper's pairs on E / 2 devices, neighbours in the order of size there
    (its bad example), one expert per device, and columns. Those that the widths do not allow are left out."""
    experts = range(len(widths))

    def grouped(order, size):
        groups = tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))
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
