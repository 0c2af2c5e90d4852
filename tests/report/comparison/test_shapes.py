"""Arms are grouped into shapes and groups, and shapes are named."""

import pytest

from modse_jax.errors import UserError
from modse_jax.report.comparison import runs, shapes
from modse_jax.sweeps.definition import axis, chain, choices, product, seeds
from modse_jax.sweeps.description import Claims
from tests.helpers import sweep_results
from tests.helpers.sweep_results import Outcome

TWO = choices({"dense": sweep_results.dense(), "n4 g1": sweep_results.experts(4, 1)})


def read(tmp_path, arms, claims=None):
    """Returns (sweep, shapes) of a sweep whose runs have all finished."""
    directory = sweep_results.write_sweep(tmp_path / "s", arms, lambda *_: Outcome(3.0), claims)
    sweep = runs.read_sweep(directory)
    return sweep, shapes.find_shapes(sweep.runs)


def test_rates_and_seeds_belong_to_one_shape_and_leave_its_name(tmp_path):
    arms = chain(
        product(TWO[:1], sweep_results.rates(1e-3, 1e-2), seeds(0, 1)),
        product(TWO[1:], sweep_results.rates(1e-2), seeds(1)),
    )
    _, found = read(tmp_path, arms)
    assert [(shape.name, len(shape.runs)) for shape in found] == [("dense", 4), ("n4 g1", 1)]
    assert list(found[0].losses("validation_loss")) == [1e-3, 1e-2]
    assert found[0].layer is None and found[1].layer.experts == 4


def test_first_arm_names_shapes_whose_words_do_not_tell_them_apart(tmp_path):
    arms = choices(
        {
            "first": {"seed": 1},
            "second": {"seed": 2},
            "third": {**sweep_results.dense(), "seed": 1},
        }
    )
    _, found = read(tmp_path, arms)
    assert [shape.name for shape in found] == ["first", "third"]


@pytest.mark.parametrize("kind", ["final rates", "relative final rates"])
def test_two_schedules_of_one_peak_are_two_shapes(tmp_path, kind):
    peaks = (1e-3, 3e-3, 1e-2)
    if kind == "final rates":
        schedules = axis("optimizer.final_learning_rate", (0.0, 1e-4))
        arms = product(axis("optimizer.learning_rate", peaks), schedules)
    else:
        arms = chain(
            sweep_results.rates(*peaks),
            choices(
                {
                    f"half={peak:g}": {
                        "optimizer.learning_rate": peak,
                        "optimizer.final_learning_rate": 0.5 * peak,
                    }
                    for peak in peaks
                }
            ),
        )
    _, found = read(tmp_path, arms)
    assert [[run.rate for run in shape.runs] for shape in found] == [list(peaks)] * 2


def test_groups_are_those_that_the_sweep_holds_comparable(tmp_path):
    sizes = axis("model.dim", (16, 32))
    claims = Claims(fixed_within=("model.dim",))
    sweep, found = read(tmp_path, product(sizes, TWO), claims)
    groups = shapes.find_groups(sweep, found)
    assert [(g.label, len(g.shapes), g.baseline.name) for g in groups] == [
        ("model.dim=16", 2, "dim=16 dense"),
        ("model.dim=32", 2, "dim=32 dense"),
    ]
    groups = shapes.find_groups(sweep, found, "dim=32 n4 g1")
    assert [group.baseline.name for group in groups] == ["dim=16 dense", "dim=32 n4 g1"]
    with pytest.raises(UserError, match="--baseline=dens is not a shape.*'dim=16 dense'"):
        shapes.find_groups(sweep, found, "dens")
