"""Fits recover the laws that made the data, and report what cannot be trusted."""

import numpy as np
import pytest

from modse_jax.errors import UserError
from modse_jax.study import fits, laws

LAWS = {
    "Chinchilla": fits.ChinchillaToFit(),
    "granularity": fits.GranularityToFit(),
    "joint": fits.JointToFit(),
    "routed": fits.RoutedToFit(),
}


def make_runs(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns sizes, tokens, experts and granularities of runs, without losses."""
    rng = np.random.default_rng(seed)
    return {
        "parameters": np.exp(rng.uniform(np.log(1e7), np.log(3e9), count)),
        "tokens": np.exp(rng.uniform(np.log(5e8), np.log(5e10), count)),
        "experts": 2.0 ** rng.integers(0, 6, count),
        "granularity": 2.0 ** rng.integers(0, 5, count),
    }


def joint_runs(count: int, noise: float) -> dict[str, np.ndarray]:
    """Returns runs whose losses follow the joint law, plus normal noise, in nats."""
    runs = make_runs(count)
    exact = laws.JointLaw().evaluate(runs["parameters"], runs["tokens"], runs["experts"])
    deviations = noise * np.random.default_rng(1).standard_normal(count)
    return {**runs, "loss": exact + deviations}


@pytest.mark.parametrize("name", LAWS)
def test_the_loss_of_a_fit_is_that_of_the_law(name):
    """The terms of a fit are another form of the law in laws.py."""
    runs = make_runs(20)
    law, coefficients, expected = {
        "Chinchilla": (
            LAWS["Chinchilla"],
            laws.ChinchillaLaw(),
            laws.ChinchillaLaw().evaluate(runs["parameters"], runs["tokens"]),
        ),
        "granularity": (
            LAWS["granularity"],
            laws.GranularityLaw(),
            laws.GranularityLaw().evaluate(runs["parameters"], runs["tokens"], runs["granularity"]),
        ),
        "joint": (
            LAWS["joint"],
            laws.JointLaw(),
            laws.JointLaw().evaluate(runs["parameters"], runs["tokens"], runs["experts"]),
        ),
        "routed": (
            LAWS["routed"],
            laws.RoutedLaw(),
            laws.RoutedLaw().evaluate(runs["parameters"], runs["experts"]),
        ),
    }[name]
    log_loss, _ = law.log_loss(law.encode(vars(coefficients)), runs)
    np.testing.assert_allclose(np.exp(log_loss), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_gradients_equal_central_differences(name):
    law = LAWS[name]
    runs = {**make_runs(12), "loss": np.full(12, 2.5)}
    point = np.array([c.encode(c.starts[0] * 1.1 + 0.01) for c in law.coefficients])
    _, gradient = law.objective(point, runs)
    for i, slope in enumerate(gradient):
        step = np.zeros_like(point)
        step[i] = 1e-6
        above, _ = law.objective(point + step, runs)
        below, _ = law.objective(point - step, runs)
        assert slope == pytest.approx((above - below) / 2e-6, rel=2e-4, abs=1e-9)


@pytest.mark.slow
def test_exponents_of_the_joint_law_are_recovered_from_noisy_runs():
    """200 runs whose losses have a standard deviation of 0.005 nats: exponents within 3%."""
    law = LAWS["joint"]
    found = fits.fit(law, joint_runs(200, noise=0.005))
    fitted = laws.JointLaw(**found.coefficients)
    for experts in (1, 8):
        expected = laws.JointLaw().exponents(experts)
        np.testing.assert_allclose(fitted.exponents(experts), expected, rtol=0.03)
    assert found.num_runs == 200
    assert len(found.starts) == 2**5


def test_coefficients_at_a_bound_and_at_a_start_are_reported():
    """Losses that do not depend on tokens leave beta at its start, and c at its bound."""
    runs = make_runs(40)
    runs["loss"] = 5 * runs["parameters"] ** -0.05
    found = fits.fit(LAWS["routed"], {**runs, "experts": np.ones(40)})
    assert any("has not left its start value" in text for text in found.warnings)
    found = fits.fit(LAWS["routed"], {**runs, "loss": runs["parameters"] ** 0.05})
    assert any("a=0 is at its bound" in text for text in found.warnings)


def test_a_row_that_is_not_finite_is_refused_by_its_number():
    runs = joint_runs(30, noise=0.0)
    runs["loss"][6] = np.nan
    with pytest.raises(UserError, match="row 7: loss=nan"):
        fits.fit(LAWS["joint"], runs)
    with pytest.raises(UserError, match="lack the columns granularity"):
        fits.fit(LAWS["granularity"], {k: v for k, v in runs.items() if k != "granularity"})
    few = {name: column[:5] for name, column in joint_runs(30, noise=0.0).items()}
    with pytest.raises(UserError, match="5 runs cannot determine 11"):
        fits.fit(LAWS["joint"], few)


def test_bootstrap_intervals_hold_the_fit_and_repeat():
    law = LAWS["routed"]
    runs = make_runs(60)
    noise = np.random.default_rng(2).standard_normal(60)
    runs["loss"] = laws.RoutedLaw().evaluate(runs["parameters"], runs["experts"])
    runs["loss"] = runs["loss"] * np.exp(0.005 * noise)
    found = fits.fit(law, runs)
    intervals = fits.bootstrap(law, runs, found, samples=8, seed=3)
    assert intervals == fits.bootstrap(law, runs, found, samples=8, seed=3)
    for name in ("a", "b", "c", "d"):
        assert intervals[name].low < found.coefficients[name] < intervals[name].high


def test_the_largest_runs_are_predicted_by_the_others():
    law = LAWS["routed"]
    runs = make_runs(50)
    runs["loss"] = laws.RoutedLaw().evaluate(runs["parameters"], runs["experts"])
    held_out = fits.fit_without_largest(law, runs, runs["parameters"], share=0.1)
    largest = np.argsort(runs["parameters"])[-5:]
    assert held_out.rows == sorted(largest.tolist())
    assert held_out.fit.num_runs == 45
    assert held_out.rmse < 1e-4
