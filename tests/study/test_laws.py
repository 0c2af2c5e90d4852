"""Published laws return the values that were computed from their papers with 40 digits."""

import warnings

import pytest

from modse_jax.study import laws

GRANULARITY = laws.GranularityLaw()
JOINT = laws.JointLaw()
LEVERAGE = laws.EfficiencyLeverage()
LING = laws.LingAllocation
TENCENT = laws.ComprehensiveLaw()
ROUTED = laws.RoutedLaw()
CHINCHILLA = laws.ChinchillaLaw()


def fine_grained_flops() -> float:
    """FLOPs of 64 experts of granularity 8 over a base model of 1e8 parameters."""
    return laws.fine_grained_shape(1e8).flops_per_token(64, 8) * 4.37e9


def joint_experts(experts: int) -> float:
    return laws.saturating_experts(experts, JOINT.start, JOINT.end)


VALUES = {
    "granularity 8": (GRANULARITY.evaluate(4.3e9, 4.37e9, 8), 3.10971783804),
    "granularity 1": (GRANULARITY.evaluate(4.3e9, 4.37e9, 1), 3.22449602289),
    "granularity 16": (GRANULARITY.evaluate(1e9, 2e10, 16), 3.12119305449),
    "granularity 32": (GRANULARITY.evaluate(301e9, 137.6e9, 32), 2.05957687558),
    "granularity law of dense models": (
        laws.DENSE_OF_GRANULARITY_LAW.evaluate(1e9, 2e10),
        2.98030514976,
    ),
    "joint, saturating 8": (joint_experts(8), 8.81236979866),
    "joint, saturating 32": (joint_experts(32), 29.7042201151),
    "joint, exponent of parameters": (JOINT.exponents(8)[0], -0.167573667345),
    "joint, exponent of tokens": (JOINT.exponents(8)[1], -0.233862450589),
    "joint, dense": (JOINT.evaluate(1e9, 2e10, 1), 2.57760004302),
    "joint, 32 experts": (JOINT.evaluate(1e9, 2e10, 32), 2.4545612153),
    "joint, 4 experts": (JOINT.evaluate(1e8, 2e9, 4), 3.18957881183),
    "joint, rate of dense": (JOINT.learning_rate(4_608_000, 1), 0.0176313514384),
    "joint, rate of 32 experts": (JOINT.learning_rate(4_608_000, 32), 0.00741307011032),
    "leverage, best granularity": (LEVERAGE.best_granularity(), 11.3372121159),
    "leverage, saturating ratio": (LEVERAGE.saturating_ratio(0.031), 0.0473),
    "leverage at 1e22": (LEVERAGE.leverage(0.031, 12, 1e22), 7.24489797261),
    "leverage at 1e20": (LEVERAGE.leverage(0.031, 12, 1e20), 4.55350837256),
    "leverage at 1e18": (LEVERAGE.leverage(0.0625, 8, 1e18), 2.37537850915),
    "leverage of a dense model": (LEVERAGE.leverage(1, 1, 1e20), 0.995289901768),
    "Ling, FLOPs per token": (LING.flops_per_token(1e20), 2965983825.22),
    "Ling, tokens": (LING.tokens(1e20), 33723811690.9),
    "Ling, rate": (LING.learning_rate(1e18), 0.00204813471204),
    "Ling, batch": (LING.batch_tokens(1e18), 251512.439994),
    "Tencent": (TENCENT.loss(3e9, 3e8, 5e10, 7, 0.31), 2.59914911736),
    "Tencent, best granularity": (TENCENT.best_granularity(), 6.77784072701),
    "Tencent, best shared ratio": (TENCENT.best_shared_ratio(), 0.314845802121),
    "routed, dense": (ROUTED.evaluate(1e8, 1), 2.74414585997),
    "routed, 64 experts": (ROUTED.evaluate(1e9, 64), 2.08581463174),
    "Chinchilla": (CHINCHILLA.evaluate(7e10, 1.4e12), 1.97388186316),
    "Step law": (laws.StepLaw.learning_rate(1e9, 2e10), 9.96022707478e-4),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_law_returns_its_published_value(name):
    computed, expected = VALUES[name]
    assert computed == pytest.approx(expected, rel=1e-9)


def test_flops_of_fine_grained_models_include_the_router():
    assert fine_grained_flops() == pytest.approx(2.943883e18, rel=1e-6)


@pytest.mark.parametrize(
    "compute, granularity, size, tokens, loss",
    [(2.95e18, 8, 1.0252e8, 4.2753e9, 3.109344), (6.46e21, 32, 7.1315e9, 1.3499e11, 2.059698)],
)
def test_compute_optimal_granular_models(compute, granularity, size, tokens, loss):
    best = laws.best_granular_model(compute)
    assert best.granularity == granularity
    assert best.size == pytest.approx(size, rel=1e-4)
    assert best.tokens == pytest.approx(tokens, rel=1e-4)
    assert best.loss == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    "experts, size, tokens, loss",
    [(1, 1.7269e9, 9.651e9, 2.589698), (32, 6.742e8, 2.472e10, 2.472443)],
)
def test_compute_optimal_joint_models(experts, size, tokens, loss):
    best = laws.best_joint_model(1e20, experts)
    assert best.size == pytest.approx(size, rel=1e-4)
    assert best.tokens == pytest.approx(tokens, rel=1e-3)
    assert best.loss == pytest.approx(loss, abs=1e-6)


def test_an_input_outside_the_fitted_range_warns_and_names_the_range():
    with pytest.warns(laws.RangeWarning, match="experts=64 is outside 1 to 32"):
        JOINT.loss(1e9, 2e10, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JOINT.loss(1e9, 2e10, 32)
