"""Widths of experts, and the errors for widths that are not allowed."""

from collections.abc import Callable

import pytest

from modse_jax.moe import expert_widths


def test_ratio_pairs_give_the_widths_of_the_paper() -> None:
    ratios = expert_widths.PAPER_PAIRS
    assert ratios == ((4.5, 0.5), (4.0, 1.0), (3.0, 2.0), (2.5, 2.5))
    small = (6912, 768, 6144, 1536, 4608, 3072, 3840, 3840)
    assert expert_widths.widths_from_ratio_pairs(ratios, 1536) == small
    large = (9216, 1024, 8192, 2048, 6144, 4096, 5120, 5120)
    assert expert_widths.widths_from_ratio_pairs(ratios, 2048) == large


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: expert_widths.widths_from_ratio_pairs(((2.5, 2.5),), 3),
            r"ratios \[2.5, 2.5\] times model width 3",
        ),
        (lambda: expert_widths.check_widths((3, -1)), "expert 1 has width -1"),
        (lambda: expert_widths.check_pairs((3, 3, 3), 3), "3 experts cannot form pairs"),
        (
            lambda: expert_widths.check_pairs((4, 2, 5, 2), 3),
            r"experts 2 and 3 of widths 5 \+ 2 = 7 must sum to 2 \* width = 6",
        ),
    ],
)
def test_widths_that_break_a_rule_are_explained(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
