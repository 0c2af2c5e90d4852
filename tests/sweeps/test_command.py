"""The command `sweep`: bad input and dry runs write nothing."""

import json
import os

import pytest

from modse_jax.errors import ExitCode, UserError
from modse_jax.sweeps import runner
from tests.helpers import sweeps


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ("choices({'a': {}, 'b': {'moe.top_k': 2}})", "", "'a' and 'b' have the same config"),
        ("axis('moe.topk', (1, 2))", "", "unknown option moe.topk; did you mean moe.top_k"),
        (
            "axis('training.steps', (6, 12))",
            "fixed={'tokens': 0}",
            "'steps=6' has 1,536 and 'steps=12' has 3,072, 100.000% more",
        ),
        ("axis('seed', (0, 1))", "fixed={'tokns': 0}", "'tokns', .* did you mean 'tokens'"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_written(
    corpus, tmp_path, monkeypatch, arms, options, message
):
    file = sweeps.write_sweep(tmp_path, corpus, arms, options)
    before = sorted(os.listdir(tmp_path))
    for flags in ({}, {"dry_run": True}, {"launcher": "slurm", "slurm": ["time=5"]}):
        with pytest.raises(UserError, match=message):
            sweeps.run_command(monkeypatch, file, tmp_path / "sweep", **flags)
    assert sorted(os.listdir(tmp_path)) == before


def test_workdir_of_another_sweep_keeps_its_table(corpus, tmp_path, monkeypatch):
    file = sweeps.write_sweep(tmp_path, corpus, "choices({'a': {}})")
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "sweep.json").write_text(json.dumps({"sweep": "large"}))
    (workdir / "results.csv").write_text("a table")
    with pytest.raises(UserError, match="holds the sweep 'large', not 'small'; use another --work"):
        sweeps.run_command(monkeypatch, file, workdir)
    assert sorted(os.listdir(workdir)) == ["results.csv", "sweep.json"]
    assert (workdir / "results.csv").read_text() == "a table"


def test_missing_rates_give_a_warning_before_the_runs(corpus, tmp_path, monkeypatch, capsys):
    arms = "axis('moe.top_k', (1, 2))"
    file = sweeps.write_sweep(tmp_path, corpus, arms, "compares_shapes=True")
    started = []
    monkeypatch.setattr(
        runner, "run_sweep", lambda *_: started.append(capsys.readouterr().err) or ExitCode.FINISHED
    )
    assert sweeps.run_command(monkeypatch, file, tmp_path / "sweep") == ExitCode.FINISHED
    (warning,) = started
    assert warning.startswith("warning: 2 of 2 shapes are trained at fewer than 3 learning rates")
    assert warning.count("\n") == 1


def test_dry_run_writes_nothing_and_needs_no_workdir(corpus, tmp_path, monkeypatch, capsys):
    file = sweeps.write_sweep(tmp_path, corpus, "axis('seed', (0, 1))")
    flags = {"dry_run": True, "flops_per_second": 1e9}
    assert sweeps.run_command(monkeypatch, file, tmp_path / "sweep", **flags) == ExitCode.FINISHED
    assert "2 arms, 3,072 tokens" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
    flags["workdir"] = None
    assert sweeps.run_command(monkeypatch, file, **flags) == ExitCode.FINISHED
    with pytest.raises(UserError, match="--workdir is missing; name a directory for the sweep"):
        sweeps.run_command(monkeypatch, file, workdir=None)
