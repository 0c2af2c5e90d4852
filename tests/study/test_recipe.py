"""The recipe: the learning rates of the study's logs, and the value of the auxiliary losses."""

from fractions import Fraction

import pytest

from modse_jax.config import loading
from modse_jax.config.options import Config
from modse_jax.study import arms, recipe
from modse_jax.training import auxiliary_losses, optimizer

# Learning rates of the study's logs by step: 10M, 191 steps, peak 4e-4.
LOGGED_RATES = {
    1: 8e-6,
    49: 3.92e-4,
    50: 4e-4,
    75: 3.727901731512293e-4,
    79: 3.63714155139063e-4,
    190: 4.004467721189337e-05,
    191: 4e-5,
}


def test_learning_rates_equal_the_logs():
    """The study counts its updates from 1, so that the last of 191 has the final learning rate."""
    config = arms.build_dense("10M")
    schedule = optimizer.learning_rate(config)
    assert config.training.steps == max(LOGGED_RATES)
    for update, rate in LOGGED_RATES.items():
        updates_before = update - 1
        assert float(schedule(updates_before)) == pytest.approx(rate, rel=1e-6)


def test_the_final_rate_follows_the_peak():
    options = recipe.recipe_options(learning_rate=1e-2)
    assert options["optimizer.learning_rate"] == 1e-2
    assert options["optimizer.final_learning_rate"] == pytest.approx(1e-3)


def test_the_load_balancing_loss_is_one_at_balance():
    """As in the study: a mean over layers and over the k choices, so that 1e-2 means the same."""
    config = arms.build_mixture("50M", 32, Fraction(1, 4))
    first, *_ = auxiliary_losses.description_lines(config)
    assert first == (
        "load-balancing loss: weight 0.01, mean over all choices, averaged over 5 layers; 1 at "
        "perfect balance, which adds 0.01 to the loss"
    )
    summed = loading.override_options(config, {"moe.balance_loss_over_choices": "sum"})
    assert "; 4 at perfect balance" in auxiliary_losses.description_lines(summed)[0]


def test_a_config_file_can_apply_the_recipe():
    config = loading.default_config()
    config.update_from_flattened_dict(recipe.recipe_options())
    assert loading.from_dict(config.to_dict()) == loading.override_options(
        Config(), recipe.recipe_options()
    )
