"""The file sweep.json: it is read as it was written, and damage is refused."""

import pytest

from modse_jax.errors import UserError
from modse_jax.sweeps import description, planning
from modse_jax.sweeps.definition import choices
from modse_jax.sweeps.description import Claims
from tests.helpers import sweep_results
from tests.helpers.sweep_results import Outcome

ARMS = choices({"dense": sweep_results.dense(), "n4 g1": sweep_results.experts(4, 1)})
CLAIMS = Claims({"tokens": 0, "flops_per_token": 0.05}, ("model.dim",), compares_shapes=False)


def test_description_is_read_as_written(tmp_path):
    directory = sweep_results.write_sweep(tmp_path / "s", ARMS, lambda *_: Outcome(3.0), CLAIMS)
    found = description.read(directory)
    assert found.sweep == "synthetic"
    assert found.claims.fixed == CLAIMS.fixed and not found.claims.compares_shapes
    assert tuple(found.claims.fixed_within) == CLAIMS.fixed_within
    for described, arm in zip(found.arms, sweep_results.resolve(ARMS), strict=True):
        assert described == (
            arm.name,
            sweep_results.identify(arm).id,
            arm.config,
            sweep_results.CODE,
        )


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"sweep": 1}', '{"sweep": "a", "format": 2, "runs": [{}]}']
)
def test_damaged_description_is_one_sentence(tmp_path, content):
    directory = sweep_results.write_sweep(tmp_path / "s", ARMS, lambda *_: Outcome(3.0))
    (directory.root / "results.parquet").unlink()
    directory.description.write_text(content)
    with pytest.raises(UserError, match="sweep.json is damaged .*; remove it and run `sweep`"):
        description.read(directory)
    if '"format"' not in content:  # the runner reads only the name
        with pytest.raises(UserError, match="sweep.json is damaged"):
            planning.check_directory(directory, "synthetic")
