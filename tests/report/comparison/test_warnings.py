"""Warnings of a report on synthetic sweeps, each of which has one fault."""

import json

import pytest

from modse_jax.report.comparison import comparisons, runs, shapes, warning_checks
from modse_jax.sweeps import results
from modse_jax.sweeps.definition import choices, product, seeds
from modse_jax.sweeps.description import Claims
from tests.helpers import sweep_results
from tests.helpers.sweep_results import Outcome

RATES = (1e-3, 3e-3, 1e-2)
DENSE = {"dense": sweep_results.dense()}
TWO = choices({**DENSE, "n4": sweep_results.experts(4, 1)})
BEST_RATE = 3e-3


def loss_of(config, best_rate=BEST_RATE):
    """Returns a loss that is lowest at one rate, and that depends on the seed."""
    return 3.0 + (config.optimizer.learning_rate != best_rate) + 0.01 * config.seed


def finish(_, config):
    return Outcome(loss_of(config))


def warnings_of(directory):
    sweep = runs.read_sweep(directory)
    found = shapes.find_shapes(sweep.runs)
    groups = shapes.find_groups(sweep, found)
    compared = [comparisons.compare(group, "validation_loss") for group in groups]
    return warning_checks.find_warnings(sweep, found, compared)


def write(tmp_path, shapes=TWO, rates=RATES, seed_numbers=(0, 1), outcome=finish, **claims):
    arms = product(shapes, sweep_results.rates(*rates), seeds(*seed_numbers))
    return sweep_results.write_sweep(tmp_path / "s", arms, outcome, Claims(**claims))


def test_complete_sweep_has_no_warning(tmp_path):
    assert warnings_of(write(tmp_path)) == []


def fail_one(_, config):
    is_one = config.is_dense and config.seed == 1 and config.optimizer.learning_rate == BEST_RATE
    return Outcome(loss_of(config), results.FAILED if is_one else results.FINISHED)


def wait_for_rates(_, config):
    is_late = config.is_dense and config.optimizer.learning_rate != BEST_RATE
    return Outcome(loss_of(config), results.WAITING if is_late else results.FINISHED)


CASES = {
    "too few rates": (
        dict(rates=(1e-3, 3e-3)),
        ["2 of 2 shapes are trained at fewer than 3 learning rates"],
    ),
    "results at too few rates": (
        dict(outcome=wait_for_rates),
        [
            "These shapes have results at fewer than 3 learning rates so far, so they have no best "
            "rate: dense.",
            "4 of 12 arms have not finished: 4 waiting",
        ],
    ),
    "best rate at the end": (
        dict(outcome=lambda _, config: Outcome(loss_of(config, best_rate=1e-2))),
        ["The best learning rate of these shapes is the lowest or highest that was tried"],
    ),
    "one seed": (dict(seed_numbers=(0,)), ["2 of 2 differences are of one seed"]),
    "missing seed": (
        dict(outcome=fail_one),
        [
            "2 of 2 differences are of one seed",
            "These shapes have fewer seeds than others; differences are over the seeds that both "
            "sides have: dense (1 of 2, best rate), dense (1 of 2, shared rate).",
            "1 of 12 arms have not finished: 1 failed",
        ],
    ),
    "other data": (
        dict(shapes=choices({**DENSE, "other": {**DENSE["dense"], "model.vocab_size": 301}})),
        ["Shapes that are compared differ in model.vocab_size"],
    ),
    "other number of tokens": (
        dict(shapes=choices({**DENSE, "long": {**DENSE["dense"], "training.steps": 200}})),
        ["Shapes that are compared train on 25,600 to 51,200 tokens"],
    ),
    "fewer realized FLOPs": (
        dict(outcome=lambda _, config: Outcome(loss_of(config), dropped=0.4)),
        ["Realized FLOPs differ from nominal ones by more than 5%"],
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_fault_gives_its_warnings_and_no_other(case, tmp_path):
    options, expected = CASES[case]
    found = warnings_of(write(tmp_path, **options))
    assert len(found) == len(expected), found
    for warning, beginning in zip(found, expected):
        assert warning.startswith(beginning)


def test_rates_are_not_asked_for_if_no_shapes_are_compared(tmp_path):
    assert warnings_of(write(tmp_path, rates=(1e-3,), compares_shapes=False)) == []


def test_skipped_steps_of_finished_runs_are_named(tmp_path):
    directory = write(tmp_path)
    path = next(directory.runs.iterdir()) / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["metrics"]["skipped_steps"] = 7
    path.write_text(json.dumps(result), encoding="utf-8")
    (warning,) = warnings_of(directory)
    assert warning.startswith("Finished runs skipped steps that were not finite: ")
    assert warning.endswith("(7).")
