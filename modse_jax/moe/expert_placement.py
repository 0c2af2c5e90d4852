"""The placement of experts on the shards of an expert axis (expert parallelism).

A placement gives every shard the same number of hidden units: either whole experts ("whole"), or
an equal slice of every expert ("split"). Its order is also the order in which weights are stored.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from modse_jax.moe import expert_widths
from modse_jax.moe.expert_partition import partition_experts


class Placement(NamedTuple):
    """The experts of every shard, and the hidden units that the shard has of each.

    Attributes:
        experts: for every shard, its experts in the order of their hidden units.
        widths: for every shard, the number of hidden units of each of those experts.
    """

    experts: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]

    @property
    def num_experts(self) -> int:
        """The number of different experts over all shards."""
        return len({expert for shard in self.experts for expert in shard})

    @property
    def slots(self) -> int:
        """The largest number of experts on a shard."""
        return max(len(shard) for shard in self.experts)


class SizeClass(NamedTuple):
    """Experts that have equally many hidden units on their shards.

    Attributes:
        width: the number of hidden units.
        slots: for every shard, the positions of these experts among the shard's experts, in order.
            Lists of shards that have fewer are filled up with Placement.slots, which has no rows.
        offsets: for every shard, the first hidden units of these experts; 0 for filled entries.
    """

    width: int
    slots: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]


def size_classes(placement: Placement) -> tuple[SizeClass, ...]:
    """Groups experts by width, widest first. A program needs one loop per class, not per expert."""
    widths = {width for shard in placement.widths for width in shard}
    return tuple(_make_size_class(placement, width) for width in sorted(widths, reverse=True))


def _make_size_class(placement: Placement, width: int) -> SizeClass:
    slots = []
    offsets = []
    for shard in placement.widths:
        firsts = expert_widths.offsets(shard)
        slots.append([slot for slot, w in enumerate(shard) if w == width])
        offsets.append([firsts[slot] for slot in slots[-1]])
    length = max(map(len, slots))
    return SizeClass(
        width,
        tuple(_pad(row, length, placement.slots) for row in slots),
        tuple(_pad(row, length, 0) for row in offsets),
    )


def _pad(row: Sequence[int], length: int, value: int) -> tuple[int, ...]:
    return (*row, *[value] * (length - len(row)))


def place_experts(widths: Sequence[int], shards: int, kind: str) -> Placement:
    """Places experts on the shards of an expert axis.

    Args:
        widths: number of hidden units of every expert.
        shards: size of the expert axis.
        kind: "whole" gives whole experts to every shard, with equal total widths: consecutive
            experts if their widths allow it (the paper's pairs do, MoDSE section 3.3), otherwise
            groups found by search. "split" gives every shard an equal slice of every expert.

    Raises:
        ValueError: the widths do not allow it. The message lists the numbers of shards that work.
    """
    widths = expert_widths.check_widths(widths)
    if kind == "split":
        return _place_slices(widths, shards)
    groups = partition_experts(widths, shards)
    if groups is None:
        candidates = range(1, min(len(widths), 64) + 1)
        possible = [n for n in candidates if partition_experts(widths, n, tries=2)]
        raise ValueError(
            f"no way was found to put experts of widths {widths[:16]} on {shards} shards with "
            f"equally many hidden units; numbers of shards that can be: {_join(possible)}; or set "
            "moe.placement=split"
        )
    return _place_groups(widths, groups)


def _place_slices(widths: Sequence[int], shards: int) -> Placement:
    """Gives every shard an equal slice of every expert."""
    indivisible = sorted({width for width in widths if width % shards})
    if indivisible:
        common = math.gcd(*widths)
        possible = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"widths {indivisible} are not divisible by {shards} shards; numbers of shards that "
            f"can be: {_join(possible)}"
        )
    experts = tuple(range(len(widths)))
    slices = tuple(width // shards for width in widths)
    return Placement((experts,) * shards, (slices,) * shards)


def _place_groups(widths: Sequence[int], groups: Iterable[Sequence[int]]) -> Placement:
    """Gives every shard one group of whole experts."""
    experts = tuple(tuple(group) for group in groups)
    return Placement(experts, tuple(tuple(widths[e] for e in group) for group in experts))


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16]))


def hidden_unit_order(widths: Sequence[int], placement: Placement) -> list[int]:
    """Returns the canonical hidden unit of every stored one, shard after shard.

    The canonical order has the experts in order, one after another.
    """
    next_unit = list(expert_widths.offsets(widths))
    order: list[int] = []
    for experts, counts in zip(placement.experts, placement.widths):
        for expert, count in zip(experts, counts):
            order.extend(range(next_unit[expert], next_unit[expert] + count))
            next_unit[expert] += count
    return order


def straggler_factor(counts: Sequence[float], placement: Placement) -> float:
    """Returns the load imbalance (max/mean) over the shards of one expert axis.

    The load of a shard is the number of routed tokens times hidden units, summed over its experts.
    Without routed tokens the factor is 1.

    Args:
        counts: routed tokens of every expert.
    """
    loads = [
        sum(counts[expert] * width for expert, width in zip(experts, widths))
        for experts, widths in zip(placement.experts, placement.widths)
    ]
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def reference_placements(widths: Sequence[int]) -> dict[str, Placement]:
    """Returns the placements that the straggler factor is reported for, by their names in logs.

    They are the paper's pairs on E / 2 devices ("pairs"), experts that are neighbors in order of
    size on E / 2 devices ("sorted", the paper's counterexample), one expert per device, and slices
    of every expert ("columns"). The first two are left out if the number of experts is odd.
    """
    experts = list(range(len(widths)))
    by_size = sorted(experts, key=lambda expert: -widths[expert])
    placements = {}
    if len(widths) % 2 == 0:
        placements["pairs"] = _place_groups(widths, _chunk(experts, 2))
        placements["sorted"] = _place_groups(widths, _chunk(by_size, 2))
    placements["one_per_device"] = _place_groups(widths, _chunk(experts, 1))
    placements["columns"] = Placement((tuple(experts),) * 2, (tuple(widths),) * 2)
    return placements


def _chunk(experts: Sequence[int], size: int) -> list[Sequence[int]]:
    return [experts[i : i + size] for i in range(0, len(experts), size)]
