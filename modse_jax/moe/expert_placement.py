"""The placement of experts on the shards of an expert axis (expert parallelism).

A placement gives every shard the same number of hidden units: either whole experts ("whole"), or
an equal slice of every expert ("split"). Its order is also the order in which weights are stored.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from modse_jax.moe import expert_widths
from modse_jax.moe.expert_partition import partition_experts


class Placement(NamedTuple):
    """The experts that every shard holds, and its number of hidden units of each.

    Attributes:
        experts: for every shard, the numbers of its experts, in the order in which it stores them.
        widths: for every shard, the number of hidden units that it has of each of those experts.
    """

    experts: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]

    @property
    def num_experts(self) -> int:
        """The number of different experts over all shards."""
        return len({expert for shard in self.experts for expert in shard})

    @property
    def slots(self) -> int:
        """The largest number of experts on a shard.

        A slot is the position of an expert among the experts of its shard, from 0. Arrays with one
        entry per slot have this length on every shard.
        """
        return max(len(shard) for shard in self.experts)


class SizeClass(NamedTuple):
    """Experts that have equally many hidden units on their shards.

    The lists of all shards have one length. On a shard with fewer such experts than another one,
    the rest is filled with an invalid slot, Placement.slots, and with offset 0.

    Attributes:
        width: the number of hidden units.
        slots: for every shard, the slots of these experts: their positions among the experts of the
            shard.
        offsets: for every shard, the first hidden unit of each of these experts on the shard.
    """

    width: int
    slots: tuple[tuple[int, ...], ...]
    offsets: tuple[tuple[int, ...], ...]


def size_classes(placement: Placement) -> tuple[SizeClass, ...]:
    """Groups experts by width, the widest first.

    The `blocked` backend compiles one loop per group, because shapes are static inside a loop.
    """
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
        widths: number of hidden units of every expert. Those with 0 are on no shard.
        shards: size of the expert axis.
        kind: "whole" gives whole experts to every shard, with equal total widths: consecutive
            experts if their widths allow it (the paper's pairs do, MoDSE section 3.3), otherwise
            groups found by search. "split" gives every shard an equal slice of every expert.

    Raises:
        ValueError: the widths do not allow it. The message lists the numbers of shards that work.
    """
    widths = expert_widths.check_widths(widths)
    # Zero and copy experts have no hidden units, so they need no device.
    placed = [expert for expert, width in enumerate(widths) if width]
    widths = tuple(widths[expert] for expert in placed)
    placement = _place_slices(widths, shards) if kind == "split" else _place_whole(widths, shards)
    experts = tuple(tuple(placed[i] for i in shard) for shard in placement.experts)
    return placement._replace(experts=experts)


def _place_whole(widths: tuple[int, ...], shards: int) -> Placement:
    """Gives every shard whole experts of equal total width."""
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
    """Returns how a placement permutes the hidden units: a canonical index for every stored unit.

    In the canonical order, the hidden units of expert 0 come first, then those of expert 1, and so
    on. Units are stored shard after shard, in the order of the placement. Thus
    stored = canonical[order].
    """
    next_unit = list(expert_widths.offsets(widths))
    order: list[int] = []
    for experts, counts in zip(placement.experts, placement.widths):
        for expert, count in zip(experts, counts):
            order.extend(range(next_unit[expert], next_unit[expert] + count))
            next_unit[expert] += count
    return order


def straggler_factor(counts: Sequence[float | Fraction], placement: Placement) -> float:
    """Returns the load imbalance (max/mean) over the shards of one expert axis.

    The load of a shard is the number of routed tokens times hidden units, summed over its experts.
    1 means that all shards have equal loads; it is also returned if there are no routed tokens.

    Args:
        counts: the number of tokens routed to every expert.
        placement: the experts of every shard.
    """
    loads = [
        sum(counts[expert] * width for expert, width in zip(experts, widths))
        for experts, widths in zip(placement.experts, placement.widths)
    ]
    total = sum(loads)
    return float(max(loads) * len(loads) / total) if total else 1.0


def reference_placements(widths: Sequence[int]) -> dict[str, Placement]:
    """Returns {name: placement} of the placements that runs report straggler factors for.

    They compare how evenly ways to place E experts would load the devices:

    *   "pairs": experts 2j and 2j + 1 on one of E / 2 devices, as in the paper.
    *   "sorted": experts that are neighbors in order of size on one of E / 2 devices, the paper's
        counterexample.
    *   "one_per_device": one expert on each of E devices.
    *   "columns": a slice of every expert on every device.

    The first two are left out if the number of experts is odd. Experts without hidden units are on
    no device.
    """
    experts = [expert for expert, width in enumerate(widths) if width]
    by_size = sorted(experts, key=lambda expert: -widths[expert])
    placements = {}
    if len(experts) % 2 == 0:
        placements["pairs"] = _place_groups(widths, _chunk(experts, 2))
        placements["sorted"] = _place_groups(widths, _chunk(by_size, 2))
    placements["one_per_device"] = _place_groups(widths, _chunk(experts, 1))
    placements["columns"] = _place_groups(widths, [experts] * 2)
    return placements


def _chunk(experts: Sequence[int], size: int) -> list[Sequence[int]]:
    return [experts[i : i + size] for i in range(0, len(experts), size)]
