"""Jobs of Slurm: what is submitted, what a job does, and what is refused.

submitit's local executor runs jobs as processes of this machine. tests/slurm.sh runs a sweep in
real jobs of Slurm.
"""

import functools
import importlib.util
import os
import signal
import time

import pytest

from modse_jax.errors import ExitCode, RunError, UserError
from modse_jax.sweeps import planning, results, runner, slurm
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.sweeps.runner import Share
from tests.helpers import sweeps
from tests.helpers.runs import environment

TWO_SEEDS = "choices({'a': {}, 'b': {'seed': 1}})"


@pytest.fixture
def job_environment(monkeypatch):
    """Sets the variables that jobs inherit, so that they compile fast."""
    for name, value in environment(devices=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", "")  # `submit` changes it


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Returns a folder in PATH for commands of Slurm, with those that `check_installed` needs."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    write_command(folder, "srun", "exit 1")
    write_command(folder, "sbatch", "echo Submitted batch job 17")
    return folder


def write_command(folder, name, script):
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def plan(tmp_path, corpus, arms=TWO_SEEDS):
    """Returns (sweep file, directory, arms, planned runs)."""
    file = sweeps.write_sweep(tmp_path, corpus, arms)
    directory = SweepDirectory(tmp_path / "sweep")
    loaded = planning.load_sweep(file)
    return file, directory, loaded, planning.plan_runs(directory, "small", loaded)


def states(directory):
    return {name: row["state"] for name, row in sweeps.read_table(directory.root).items()}


def test_job_of_submitit_runs_the_sweep(corpus, tmp_path, job_environment):
    """All runs have results, so the job trains nothing: it checks the sweep and makes the tables.

    The slow test below trains.
    """
    file, directory, _, runs = plan(tmp_path, corpus)
    for run in runs:
        results.write_result(directory, run.identity, results.FINISHED)
    (job,) = slurm.submit(directory, file, 1, {}, cluster="local")
    assert job.result() == ExitCode.FINISHED, job.stderr()
    assert states(directory) == {"a": "finished", "b": "finished"}


@pytest.mark.slow
def test_jobs_share_the_runs_and_resume_after_sigterm(corpus, tmp_path, job_environment):
    arms = "product(axis('moe.top_k', (1, 2)), seeds(0, 1))"
    file = sweeps.write_sweep(tmp_path, corpus, arms, steps=300, log_every=20, checkpoint_every=100)
    directory = SweepDirectory(tmp_path / "sweep")
    planning.plan_runs(directory, "small", planning.load_sweep(file))
    (job,) = slurm.submit(directory, file, 1, {}, cluster="local")
    while sweeps.count_logged_steps(directory.root) < 17 and not job.done():
        time.sleep(0.05)
    (task,) = slurm_processes(job)
    os.kill(task, signal.SIGTERM)
    assert job.result() == ExitCode.STOPPED, job.stderr()
    assert sorted(states(directory).values()).count("waiting") >= 2
    jobs = slurm.submit(directory, file, 2, {}, cluster="local")
    assert [job.result() for job in jobs] == [ExitCode.FINISHED] * 2
    assert set(states(directory).values()) == {"finished"}
    assert sweeps.count_repeated_steps(directory.root) == 0  # it saved before it stopped
    assert sweeps.read_outputs(directory.root).count("starting at step 0") == 4


def slurm_processes(job):
    """Returns the processes that the controller of a local job has started."""
    controller = int(job.job_id)
    with open(f"/proc/{controller}/task/{controller}/children") as file:
        return [int(number) for number in file.read().split()]


def test_stopped_job_is_put_back_into_the_queue(tmp_path, monkeypatch, commands):
    record = tmp_path / "requeued"
    write_command(commands, "scontrol", f"echo $* >> {record}")
    monkeypatch.setattr(planning, "load_sweep", lambda path: [])
    codes = [ExitCode.FINISHED, ExitCode.FAILED, ExitCode.STOPPED, ExitCode.STOPPED]
    monkeypatch.setattr(runner, "run_sweep", lambda *_, share: codes.pop(0))
    job = functools.partial(slurm.run_job, "small.py", str(tmp_path), Share(0, 1))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert (job(), job()) == (0, 1) and not record.exists()
    assert job() == 75
    assert record.read_text() == "requeue 17\n"
    monkeypatch.delenv("SLURM_JOB_ID")  # a process of this machine
    assert job() == 75
    assert record.read_text() == "requeue 17\n"


def test_launch_submits_an_array_of_jobs(corpus, tmp_path, commands, capsys):
    file, directory, arms, runs = plan(tmp_path, corpus)
    options = slurm.parse_options(["partition=gpu", "--time=90", "cpus-per-task=3"])
    assert slurm.launch(directory, file, arms, 5, options) == ExitCode.FINISHED
    # Two runs need no more than two jobs.
    assert "submitted 2 jobs for 2 runs: 17_0, 17_1; their output" in capsys.readouterr().out
    (script,) = (directory.root / "slurm").glob("*submission.sh")
    lines = script.read_text().splitlines()
    for line in (
        "--array=0-1%2",
        "--cpus-per-task=3",
        "--job-name=sweep_small",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        "--partition=gpu",
        "--requeue",
        "--signal=TERM@180",
        "--time=90",
    ):
        assert f"#SBATCH {line}" in lines
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpus-per-task=3" in command

    for run in runs:
        results.write_result(directory, run.identity, results.FAILED, "a reason")
    assert slurm.launch(directory, file, arms, 5, options) == ExitCode.FAILED
    assert "submitted" not in capsys.readouterr().out
    write_command(commands, "sbatch", "echo 'sbatch: error: invalid partition: gpu' >&2; exit 1")
    with pytest.raises(RunError, match="sbatch refused the jobs: sbatch: error: invalid partition"):
        slurm.launch(directory, file, arms, 5, options, retry="failed")


@pytest.mark.parametrize(
    "options, message",
    [
        (["partition=gpu"], "needs the time limit of a job; add for example --slurm=time=240"),
        (["partition"], "--slurm=partition is no option of sbatch with a value"),
        (["time="], "--slurm=time= is no option of sbatch with a value"),
        (["time=5", "ntasks-per-node=2"], "ntasks-per-node=2 cannot be set, because each job is"),
    ],
)
def test_bad_options_of_sbatch_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        slurm.parse_options(options)


def test_missing_submitit_or_slurm_is_one_sentence(corpus, tmp_path, monkeypatch):
    file = sweeps.write_sweep(tmp_path, corpus, TWO_SEEDS)
    workdir = tmp_path / "sweep"
    slurm_flags = {"launcher": "slurm", "slurm": ["time=5"]}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="finds no sbatch and srun on this machine; run the comman"):
        sweeps.run_command(monkeypatch, file, workdir, **slurm_flags)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "submitit" else find_spec(name)
    )
    with pytest.raises(UserError, match="needs submitit: pip install -r requirements-slurm.txt"):
        sweeps.run_command(monkeypatch, file, workdir, **slurm_flags)
    with pytest.raises(UserError, match="--jobs and --slurm are for jobs of Slurm; add --launcher"):
        sweeps.run_command(monkeypatch, file, workdir, jobs=2)
    assert not workdir.exists()
