"""Subcommands of `python -m modse_jax`, and exit codes."""

import json
import os
import subprocess
import sys

import pytest

from modse_jax.cli import subcommands
from modse_jax.errors import ExitCode
from modse_jax.runtime import malloc
from tests.helpers.runs import ROOT, environment, overrides


def run_module(folder, *args):
    """Runs `python -m modse_jax` in a folder outside the repository, as an installed package."""
    env = {**environment(devices=1), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "modse_jax", *args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_subcommands_train_and_evaluate_from_any_directory(corpus, tmp_path):
    """Includes the restart with large pages, which must start the module again."""
    flags = overrides(**{"data.source": f"text:{corpus}", "training.steps": 2})
    config = f"--config={ROOT / 'configs' / 'tiny.py'}"
    trained = run_module(tmp_path, "train", config, "--workdir=run", *flags)
    assert trained.returncode == ExitCode.FINISHED, trained.stderr
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["command"][:2] == ["python -m modse_jax train", config]

    verified = run_module(tmp_path, "eval", "--workdir=run", "--suite=verify")
    assert verified.returncode == ExitCode.FINISHED, verified.stderr
    assert "good" in verified.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["sing"], "'sing' is not a command; commands: train, plan, sweep, report, eval"),
        (["plan", f"--config={ROOT / 'configs' / 'tiny.py'}"], "--plan is missing"),
        (["prepare", "--out=x"], "arguments are required: --source"),
        (
            ["report", "--workdir=nowhere"],
            "nowhere is not a directory; name the workdir of a sweep",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path):
    result = run_module(tmp_path, *args)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == ExitCode.BAD_INPUT, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_help_lists_every_subcommand(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modse_jax", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        subcommands.main()
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for name in subcommands.COMMANDS:
        assert f"\n  {name} " in printed


def test_restart_with_large_pages_keeps_the_module(monkeypatch):
    commands = []
    arguments = ["python", "-m", "modse_jax", "train", "--workdir=x"]
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", arguments)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    malloc.use_large_pages()
    assert commands == [[sys.executable, *arguments[1:]]]
    assert os.environ["GLIBC_TUNABLES"] == malloc.LARGE_PAGES


def test_exit_codes_are_those_that_scripts_rely_on():
    codes = {code.name: int(code) for code in ExitCode}
    assert codes == {
        "FINISHED": 0,
        "FAILED": 1,
        "BAD_INPUT": 2,
        "DIVERGED": 3,
        "STOPPED": 75,
        "INTERRUPTED": 130,
    }
