"""Widths in plain integers, with the errors a user meets."""

import csv
import pathlib
import random

import pytest

from modse_jax.moe import expert_placement, expert_widths

RATIOS = ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))


def test_the_papers_widths():
    assert expert_widths.widths_from_ratio_pairs(RATIOS, 1536) == (
        6912,
        768,
        6144,
        1536,
        4608,
        3072,
        3840,
        3840,
    )
    assert expert_widths.widths_from_ratio_pairs(RATIOS, 2048) == (
        9216,
        1024,
        8192,
        2048,
        6144,
        4096,
        5120,
        5120,
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: expert_widths.widths_from_ratio_pairs(((2.5, 2.5),), 3),
            "ratios \\[2.5, 2.5\\] times model width 3",
        ),
        (lambda: expert_widths.check_widths((3, -1)), "expert 1 has width -1"),
        (lambda: expert_widths.check_pairs((3, 3, 3), 3), "3 experts cannot form pairs"),
        (
            lambda: expert_widths.check_pairs((4, 2, 5, 2), 3),
            "experts 2 and 3 of widths 5 \\+ 2 = 7 must sum to 2 \\* width = 6",
        ),
    ],
)
def test_rules_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_and_size_classes_cover_the_flat_axis_once():
    widths = (5, 2, 5, 7, 2)
    assert expert_widths.offsets(widths) == (0, 5, 7, 12, 19)
    classes = expert_placement.size_classes(expert_placement.place_experts(widths, 1, "pairs"))
    assert [k.width for k in classes] == [7, 5, 2]
    covered = sorted(c for k in classes for o in k.offsets[0] for c in range(o, o + k.width))
    assert covered == list(range(sum(widths)))
    assert {e: k.width for k in classes for e in k.slots[0]} == dict(enumerate(widths))


DATA = pathlib.Path(__file__).parents[1] / "fixtures"


PAIRED = (
    0,
    7,
    1,
    6,
    2,
    5,
    3,
    4,
)  # the paper's tables have the widest expert first; here pair by pair


PAPER = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)


def test_shards_of_whole_pairs():
    placement = expert_placement.place_experts(PAPER, 4, "pairs")
    assert placement.experts == ((0, 1), (2, 3), (4, 5), (6, 7)) and placement.num_experts == 8
    assert placement.widths == ((6912, 768), (6144, 1536), (4608, 3072), (3840, 3840))
    assert expert_placement.hidden_unit_order(PAPER, placement) == list(range(sum(PAPER)))
    widest = expert_placement.size_classes(placement)[0]
    assert widest == (
        6912,
        ((0,), (2,), (2,), (2,)),
        ((0,), (0,), (0,), (0,)),
    )  # place 2 has no rows
    assert expert_placement.place_experts(PAPER, 2, "pairs").experts == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_experts_that_are_not_in_pairs_are_balanced_by_search():
    widths = (7, 7, 3, 3, 5, 5, 1, 9)
    placement = expert_placement.place_experts(widths, 4, "pairs")
    assert [sum(w) for w in placement.widths] == [10] * 4
    assert sorted(e for g in placement.experts for e in g) == list(range(8))
    order = expert_placement.hidden_unit_order(widths, placement)
    assert sorted(order) == list(range(40)) and order != sorted(order)


def test_a_thousand_experts_in_no_order_are_balanced():
    rng = random.Random(1)
    pairs = [w for _ in range(512) for w in (9, 1)]
    rng.shuffle(pairs)
    assert {sum(w) for w in expert_placement.place_experts(pairs, 512, "pairs").widths} == {10}
    threes = [w for _ in range(16) for w in (50, 30, 20)] + [60, 25, 15] * 8
    rng.shuffle(threes)
    assert {sum(w) for w in expert_placement.place_experts(threes, 24, "pairs").widths} == {100}


def test_shards_of_every_experts_columns():
    placement = expert_placement.place_experts((6, 2, 4), 2, "columns")
    assert placement.experts == ((0, 1, 2),) * 2 and placement.widths == ((3, 1, 2),) * 2
    assert expert_placement.hidden_unit_order((6, 2, 4), placement) == [
        0,
        1,
        2,
        6,
        8,
        9,
        3,
        4,
        5,
        7,
        10,
        11,
    ]


@pytest.mark.parametrize(
    "widths, shards, kind, message",
    [
        (
            PAPER,
            8,
            "pairs",
            r"no way was found .* on 8 shards with equally many hidden units; numbers .* be: 1, 2, 4; or set moe",
        ),
        (PAPER, 3, "pairs", "numbers of shards that can be: 1, 2, 4"),
        (
            (6, 4, 2),
            4,
            "columns",
            r"widths \[2, 6\] are not divisible by 4 shards; numbers .* be: 1, 2",
        ),
    ],
)
def test_placements_that_cannot_be_are_explained(widths, shards, kind, message):
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
def test_straggler_factors_of_the_papers_counts(epoch, name, mean, worst):
    with open(DATA / f"modse_300m_x8_epoch{epoch}.csv") as file:
        rows = list(csv.reader(file))
    sizes = [int(column.split("_h")[1]) for column in rows[0][2:]]
    placement = expert_placement.reference_placements([sizes[i] for i in PAIRED])[name]
    factors = []
    for first, second in zip(rows[1::2], rows[2::2]):
        counts = [int(a) + int(b) for a, b in zip(first[2:], second[2:])]
        factors.append(expert_placement.straggler_factor([counts[i] for i in PAIRED], placement))
    assert len(factors) == 8
    assert (sum(factors) / 8, max(factors)) == pytest.approx(
        (mean, worst), abs=5.1e-4
    )  # printed to three decimals


def test_straggler_factor_of_the_papers_worked_case():
    """MoDSE's counts of layer 0, epoch 7, in millions (Table 8): pairs 1.0060, neighbours in size 1.6865, one each."""
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
