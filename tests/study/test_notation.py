"""Symbols of the papers: the values of the study, exact, and conversions that undo each other."""

from fractions import Fraction

import pytest

from modse_jax.errors import UserError
from modse_jax.study import arms, notation
from modse_jax.study.notation import LayerShape, PoolShape


def values_by_symbol(shape: LayerShape) -> dict[tuple[str, str], Fraction]:
    return {(symbol.name, symbol.paper): symbol.value for symbol in shape.symbols()}


def test_symbols_of_a_fine_grained_layer():
    """n=64, g=1/8, k=8: the pair of values that study.md prints."""
    shape = LayerShape((PoolShape(64, 8, Fraction(1, 8)),))
    assert shape.active_ratio == 1
    assert values_by_symbol(shape) == {
        ("n", "Slicing and Dicing"): 64,
        ("k", "Slicing and Dicing"): 8,
        ("g", "Slicing and Dicing"): Fraction(1, 8),
        ("s", "Slicing and Dicing"): 8,
        ("E", "Krajewski, joint law"): 8,
        ("G", "Krajewski"): 8,
        ("E", "Ling"): 64,
        ("G", "Ling"): 4,
        ("A", "Ling"): Fraction(1, 8),
        ("G", "Tencent"): 8,
        ("S", "Tencent"): 0,
    }


def test_a_shared_expert_counts_in_the_active_width_and_in_the_sparsity():
    """n=31, g=1/4, k=3 and a shared expert of 1/4: one of 32 equal experts is always on."""
    shape = LayerShape((PoolShape(31, 3, Fraction(1, 4)),), shared=Fraction(1, 4))
    assert shape.active_ratio == 1
    assert shape.sparsity == 8
    assert shape.activation_ratio == Fraction(3 + 1, 31 + 1)
    assert shape.shared_ratio == Fraction(1, 3 + 1)


def test_two_pools_that_match_and_three_that_do_not():
    two = LayerShape((PoolShape(8, 2, Fraction(1, 4)), PoolShape(32, 4, Fraction(1, 8))))
    assert two.active_ratio == 1
    assert two.sparsity == 6
    assert two.granularity == Fraction(1, 6)
    halves = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
    three = LayerShape(tuple(map(PoolShape, (16, 16, 32), (1, 2, 4), halves)))
    assert three.active_ratio == Fraction(3, 2)
    assert three.sparsity == 16
    assert three.activation_ratio == Fraction(3, 32)


@pytest.mark.parametrize("sparsity", [1, 2, 8, 128])
@pytest.mark.parametrize("granularity", [Fraction(1), Fraction(1, 4), Fraction(1, 64)])
def test_conversions_undo_each_other(sparsity, granularity):
    shape = notation.from_study(sparsity, granularity)
    assert shape.active_ratio == 1
    assert (shape.sparsity, shape.granularity) == (sparsity, granularity)
    assert shape.experts * granularity == sparsity
    krajewski = notation.from_krajewski(shape.expansion_rate, shape.krajewski_granularity)
    ling = notation.from_ling(shape.experts, shape.ling_granularity, shape.activation_ratio)
    assert krajewski == ling == shape


def test_conversion_from_ling_with_a_shared_expert():
    shape = notation.from_study(8, Fraction(1, 4), shared=Fraction(1, 4))
    assert (shape.experts, shape.active) == (31, 3)
    assert shape == notation.from_ling(31, 2, Fraction(4, 32), shared_experts=1)


def test_floats_are_the_fractions_that_they_are_exactly():
    shape = notation.from_study(8.0, 0.125, shared=0.25, dense_over_dim=4.0)
    assert shape == notation.from_study(8, Fraction(1, 8), shared=Fraction(1, 4))
    assert notation.from_krajewski(8.0, 8.0) == notation.from_ling(64, 4.0, 0.125, 0, 4.0)
    assert all(type(symbol.value) is Fraction for symbol in shape.symbols())
    assert arms.build_mixture("50M", 32, 0.25) == arms.build_mixture("50M", 32, Fraction(1, 4))
    with pytest.raises(UserError, match="choose a granularity that gives a whole number"):
        arms.build_mixture("50M", 32, 0.1)


def test_the_joint_law_has_a_granularity_of_one():
    shape = notation.from_krajewski(32, 1)
    assert (shape.experts, shape.active, shape.granularity) == (32, 1, 1)


@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda: notation.from_study(8, Fraction(2, 3)), r"k = \(1 - shared\) / g = 3/2"),
        (lambda: notation.from_study(Fraction(1, 8), Fraction(1, 4)), "n = .* = 1/2"),
        (lambda: notation.from_krajewski(Fraction(1, 3), 2), r"n = G \* E = 2/3"),
        (lambda: notation.from_ling(30, 4, Fraction(1, 8)), "E_a = 15/4"),
    ],
)
def test_fractions_of_experts_are_refused(convert, message):
    with pytest.raises(ValueError, match=message + " must be a whole number"):
        convert()
