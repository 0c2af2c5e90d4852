"""Runs of older versions stay readable: they evaluate and resume as they did when they were made.

`run_2026_11` was trained by the code of November 2026, before the package was laid out in folders.
Every later version must read it. The archive holds the workdir and the corpus that it names.
"""

import json
import pathlib
import tarfile

import pytest

from modse_jax.config import loading
from modse_jax.errors import ExitCode
from modse_jax.training import loop, run_logs

RUNS = pathlib.Path(__file__).parents[1] / "fixtures" / "runs"
# The numbers were recorded on one kind of CPU; others round differently in the last bits.
RELATIVE = 2e-6


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """Returns the workdir of an old run. The current directory is the one that it was made in."""
    with tarfile.open(RUNS / "run_2026_11.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run_2026_11"


def test_an_old_run_resumes_with_the_same_losses(old_run):
    expected = json.loads((RUNS / "run_2026_11.json").read_text())
    saved = json.loads((old_run / "config.json").read_text())
    saved["training"]["steps"] = 8
    config = loading.from_saved(saved)
    assert loop.train(config, str(old_run)) == ExitCode.FINISHED
    rows = run_logs.read_log(old_run / "metrics.jsonl")
    training = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in training] == [2, 4, 6, 8]
    assert [row["step"] for row in validation] == [6, 8]
    for found, wanted in (
        (training[-1], expected["training_at_8"]),
        (validation[-1], expected["validation_at_8"]),
    ):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=RELATIVE), name
