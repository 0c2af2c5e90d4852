"""Paired tests of two runs on the same documents."""

import numpy as np
import pytest

from modse_jax.evaluation.benchmarks import run_comparison


def test_zero_one_scores_are_compared_by_the_sign_test():
    first = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    other = np.array([1, 1, 1, 1, 1, 1, 1, 0])
    difference, stderr, p = run_comparison.paired_test(first, other)
    assert difference == pytest.approx(3 / 8)
    assert p == pytest.approx(2 * (1 + 5) / 2**5)  # 4 of the 5 that differ are better
    assert stderr == pytest.approx(np.std(other - first, ddof=1) / 8**0.5)


def test_equal_scores_do_not_differ_significantly():
    scores = np.array([0, 0, 1, 1])
    assert run_comparison.paired_test(scores, scores).p == 1.0


def test_other_scores_are_compared_by_the_t_test():
    rng = np.random.default_rng(0)
    first = rng.normal(size=50)
    other = first + 0.1 + 0.01 * rng.normal(size=50)
    test = run_comparison.paired_test(first, other)
    assert test.difference == pytest.approx(0.1, abs=0.01)
    assert test.p < 1e-6
