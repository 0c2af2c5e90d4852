"""Sentences on the order of shapes, at their best learning rates and at a shared one."""

import pytest

from modse_jax.report.comparison import comparisons, runs, shapes
from modse_jax.sweeps.definition import choices, product, seeds
from tests.helpers import sweep_results
from tests.helpers.sweep_results import Outcome

# The losses of two shapes by learning rate. The mixture is lower at the best rates of both.
DENSE = {1e-3: 3.2, 3e-3: 3.0, 1e-2: 3.1}
MIXTURE = {1e-3: 3.3, 3e-3: 3.1, 1e-2: 2.9}


def describe(tmp_path, shared_rate, noise=0.001):
    """Returns the sentences of a sweep with three seeds. `noise` differs between the shapes."""

    def outcome(_, config):
        table = DENSE if config.is_dense else MIXTURE
        sign = 1 if config.is_dense else -1
        shift = sign * noise * (config.seed - 1)
        return Outcome(table[config.optimizer.learning_rate] + shift)

    forms = choices({"dense": sweep_results.dense(), "n4": sweep_results.experts(4, 1)})
    arms = product(forms, sweep_results.rates(*DENSE), seeds(0, 1, 2))
    sweep = runs.read_sweep(sweep_results.write_sweep(tmp_path / "s", arms, outcome))
    (group,) = shapes.find_groups(sweep, shapes.find_shapes(sweep.runs))
    comparison = comparisons.compare(group, "validation_loss", shared_rate)
    return comparisons.describe_order(comparison)


@pytest.mark.parametrize("noise, beyond", [(0.001, 1), (0.5, 0)])
def test_shapes_that_swap_places_between_the_views_are_counted(noise, beyond, tmp_path):
    best, shared, order = describe(tmp_path, 3e-3, noise)
    assert best.startswith(
        "Of 2 shapes each at its best rate, n4 has the lowest mean loss (2.9000)"
    )
    assert shared.startswith("Of 2 shapes at the shared rate, dense has the lowest mean loss (3.0")
    lead = "lower than all others beyond noise" if beyond else "not told from it beyond noise: "
    assert lead in best and lead in shared
    assert order == (
        "The ranking depends on the learning rate: 1 of 1 pairs of shapes swap places between the "
        f"two views, {beyond} of them above noise in both."
    )


def test_equal_rankings_are_stated(tmp_path):
    *_, order = describe(tmp_path, 1e-2)
    assert order == "The ranking is the same in both views: none of 1 pairs swaps places."
