"""Placement of experts on shards, and the straggler factor of the paper's placements."""

import csv
import pathlib
import random

import pytest

from modse_jax.moe import expert_placement, expert_widths

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"

# The paper's tables have the widest expert first. These are their columns pair by pair.
PAIRED = (0, 7, 1, 6, 2, 5, 3, 4)

PAPER = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)


def test_offsets_and_size_classes_cover_the_flat_axis_once() -> None:
    widths = (5, 2, 5, 7, 2)
    assert expert_widths.offsets(widths) == (0, 5, 7, 12, 19)
    placement = expert_placement.place_experts(widths, 1, "whole")
    classes = expert_placement.size_classes(placement)
    assert [size_class.width for size_class in classes] == [7, 5, 2]
    covered: list[int] = []
    width_of_expert = {}
    for size_class in classes:
        for expert, offset in zip(size_class.slots[0], size_class.offsets[0]):
            covered.extend(range(offset, offset + size_class.width))
            width_of_expert[expert] = size_class.width
    assert sorted(covered) == list(range(sum(widths)))
    assert width_of_expert == dict(enumerate(widths))


def test_pairs_are_placed_on_shards_in_order() -> None:
    placement = expert_placement.place_experts(PAPER, 4, "whole")
    assert placement.experts == ((0, 1), (2, 3), (4, 5), (6, 7)) and placement.num_experts == 8
    assert placement.widths == ((6912, 768), (6144, 1536), (4608, 3072), (3840, 3840))
    assert expert_placement.hidden_unit_order(PAPER, placement) == list(range(sum(PAPER)))
    widest = expert_placement.size_classes(placement)[0]
    assert widest == (
        6912,
        ((0,), (2,), (2,), (2,)),
        ((0,), (0,), (0,), (0,)),
    )  # slot 2 has no rows
    assert expert_placement.place_experts(PAPER, 2, "whole").experts == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_experts_that_are_not_in_pairs_are_balanced_by_search() -> None:
    widths = (7, 7, 3, 3, 5, 5, 1, 9)
    placement = expert_placement.place_experts(widths, 4, "whole")
    assert [sum(w) for w in placement.widths] == [10] * 4
    assert sorted(e for g in placement.experts for e in g) == list(range(8))
    order = expert_placement.hidden_unit_order(widths, placement)
    assert sorted(order) == list(range(40)) and order != sorted(order)


def test_a_thousand_experts_in_random_order_are_balanced() -> None:
    rng = random.Random(1)
    pairs = [w for _ in range(512) for w in (9, 1)]
    rng.shuffle(pairs)
    assert {sum(w) for w in expert_placement.place_experts(pairs, 512, "whole").widths} == {10}
    threes = [w for _ in range(16) for w in (50, 30, 20)] + [60, 25, 15] * 8
    rng.shuffle(threes)
    assert {sum(w) for w in expert_placement.place_experts(threes, 24, "whole").widths} == {100}


def test_columns_give_every_shard_a_slice_of_every_expert() -> None:
    placement = expert_placement.place_experts((6, 2, 4), 2, "split")
    order = [0, 1, 2, 6, 8, 9, 3, 4, 5, 7, 10, 11]
    assert placement.experts == ((0, 1, 2),) * 2 and placement.widths == ((3, 1, 2),) * 2
    assert expert_placement.hidden_unit_order((6, 2, 4), placement) == order


@pytest.mark.parametrize(
    "widths, shards, kind, message",
    [
        (
            PAPER,
            8,
            "whole",
            r"no way was found .* on 8 shards with equally many .*; numbers .* be: 1, 2, 4; or set",
        ),
        (PAPER, 3, "whole", "numbers of shards that can be: 1, 2, 4"),
        (
            (6, 4, 2),
            4,
            "split",
            r"widths \[2, 6\] are not divisible by 4 shards; numbers .* be: 1, 2",
        ),
    ],
)
def test_impossible_placements_list_the_possible_numbers_of_shards(
    widths: tuple[int, ...], shards: int, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expert_placement.place_experts(widths, shards, kind)


@pytest.mark.parametrize(
    "epoch, name, mean, worst",
    [  # derived from the paper's Table 8
        (2, "pairs", 1.013, 1.030),
        (2, "sorted", 1.676, 1.692),
        (2, "one_per_device", 1.771, 1.791),
        (7, "pairs", 1.011, 1.025),
        (7, "sorted", 1.685, 1.697),
        (7, "one_per_device", 1.785, 1.823),
        (7, "columns", 1.000, 1.000),
    ],
)
def test_straggler_factors_of_the_papers_counts(
    epoch: int, name: str, mean: float, worst: float
) -> None:
    with open(FIXTURES / f"modse_300m_x8_epoch{epoch}.csv") as file:
        rows = list(csv.reader(file))
    sizes = [int(column.split("_h")[1]) for column in rows[0][2:]]
    placement = expert_placement.reference_placements([sizes[i] for i in PAIRED])[name]
    factors = []
    for first, second in zip(rows[1::2], rows[2::2]):
        counts = [int(a) + int(b) for a, b in zip(first[2:], second[2:])]
        factors.append(expert_placement.straggler_factor([counts[i] for i in PAIRED], placement))
    assert len(factors) == 8
    # The paper prints three decimals.
    assert sum(factors) / 8 == pytest.approx(mean, abs=5.1e-4)
    assert max(factors) == pytest.approx(worst, abs=5.1e-4)


def test_straggler_factor_of_one_layer_of_the_paper() -> None:
    """Uses MoDSE's counts of layer 0, epoch 7, in millions (Table 8)."""
    counts = [48.255, 48.502, 48.925, 49.037, 49.059, 49.032, 49.333, 49.170]
    by_size = (6912, 6144, 4608, 3840, 3840, 3072, 1536, 768)
    assert by_size == tuple(sorted(PAPER, reverse=True))
    paired = [counts[i] for i in PAIRED]
    kinds = expert_placement.reference_placements(PAPER)
    factors = {k: expert_placement.straggler_factor(paired, p) for k, p in kinds.items()}
    want = {"pairs": 1.0060, "sorted": 1.6865, "one_per_device": 1.7815, "columns": 1}
    assert factors == pytest.approx(want, abs=1e-4)
    assert expert_placement.straggler_factor([0] * 8, kinds["pairs"]) == 1
    assert expert_placement.straggler_factor([1] + [0] * 7, kinds["pairs"]) == 4
    assert set(expert_placement.reference_placements((3, 3, 3))) == {"one_per_device", "columns"}
