"""Submits a sweep to Slurm, through submitit: jobs that share the runs of one workdir.

Every job is a runner (`runner`), so each run is trained by the job that holds its lock. Slurm sends
SIGTERM before the time limit, and to make room for other jobs. The job then saves its current run
and is put back into the queue, as in examples/train.sbatch.
"""

import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from modse_jax.errors import ExitCode, RunError, UserError
from modse_jax.runtime import processes
from modse_jax.sweeps import planning, results, runner
from modse_jax.sweeps.planning import LoadedSweep
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.sweeps.runner import Share

FOLDER = "slurm"  # in the workdir of the sweep: the output of jobs, and files of submitit

INSTALL = "pip install -r requirements-slurm.txt"

# Slurm sends SIGTERM this many seconds before the time limit, which is the time to save a run.
SIGNAL_SECONDS = 180

# Options of sbatch that a job needs as they are: one process, whose output submitit names.
FIXED_OPTIONS = (
    "array",
    "error",
    "nodes",
    "ntasks",
    "ntasks_per_node",
    "open_mode",
    "output",
    "requeue",
    "signal",
)

# The local executor of submitit, which tests use, ends a job after this time.
LOCAL_MINUTES = 60


def run_job(sweep: str, workdir: str, share: Share) -> int:
    """Trains runs until none is left for this job. Returns the exit code of the runner.

    Args:
        sweep: the sweep file, which is read when the job starts.
        workdir: the workdir of the sweep.
        share: which of the jobs this is.
    """
    code = runner.run_sweep(
        SweepDirectory(workdir),
        planning.sweep_name(sweep),
        planning.load_sweep(sweep),
        share=share,
    )
    if code == ExitCode.STOPPED and "SLURM_JOB_ID" in os.environ:
        # Slurm refuses this for a job that was canceled, which is right.
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    return int(code)


def parse_options(assignments: Sequence[str]) -> dict[str, str]:
    """Returns options of sbatch from ["partition=gpu", "time=240"].

    Raises:
        UserError: an option has no value or is one of `FIXED_OPTIONS`, or the time limit is
            missing.
    """
    options = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (name and equals and value):
            raise UserError(
                f"--slurm={assignment} is no option of sbatch with a value; write for example "
                "--slurm=partition=gpu"
            )
        if name in FIXED_OPTIONS:
            raise UserError(
                f"--slurm={assignment} cannot be set, because each job is one process; leave it "
                "out, and set the number of jobs with --jobs"
            )
        options[name] = value
    if "time" not in options:
        raise UserError(
            "--launcher=slurm needs the time limit of a job; add for example --slurm=time=240, in "
            "minutes"
        )
    return options


def check_installed() -> None:
    """Raises UserError if submitit or Slurm is missing."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--launcher=slurm needs submitit: {INSTALL}")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "--launcher=slurm finds no sbatch and srun on this machine; run the command on a login "
            "node of a Slurm cluster, or use --launcher=local"
        )


def launch(
    directory: SweepDirectory,
    sweep: str,
    loaded: LoadedSweep,
    count: int,
    options: Mapping[str, str],
    retry: str = "",
) -> ExitCode:
    """Prepares the data, submits jobs that train all runs without a result, and says so.

    Args:
        directory: the workdir of the sweep, on a file system that all nodes see.
        sweep: the sweep file.
        loaded: the sweep, whose arms have been checked.
        count: the number of jobs; there are at most as many as runs without a result.
        options: options of sbatch, from `parse_options`.
        retry: "failed" trains runs that failed earlier once more.

    Returns:
        FINISHED after a submission. Without runs to train, the same as `Runner.run`.

    Raises:
        UserError: the workdir is not that of this sweep, or the data is invalid.
        RunError: sbatch refuses the jobs.
    """
    name = planning.sweep_name(sweep)
    runs = planning.plan_runs(directory, name, loaded)
    if retry == "failed":
        runner.discard_failed(directory, runs)
    pending = [run for run in runs if results.read_result(directory, run.identity.id) is None]
    if not pending:
        return runner.Runner(directory, name, runs).run()
    jobs = submit(directory, sweep, min(count, len(pending)), options)
    print(
        f"submitted {len(jobs)} jobs for {len(pending)} runs: "
        f"{', '.join(job.job_id for job in jobs)}; their output is in {directory.root / FOLDER}, "
        f"and {directory.root / 'results.csv'} is rebuilt whenever a run ends"
    )
    return ExitCode.FINISHED


def submit(
    directory: SweepDirectory,
    sweep: str,
    count: int,
    options: Mapping[str, str],
    cluster: str = "slurm",
) -> list[Any]:
    """Submits jobs, and returns them as jobs of submitit.

    Args:
        directory: the workdir of the sweep, on a file system that all nodes see.
        sweep: the sweep file.
        count: the number of jobs.
        options: options of sbatch, from `parse_options`.
        cluster: "slurm", or "local" for processes of this machine.

    Raises:
        RunError: sbatch refuses the jobs.
    """
    # Imported here because it is an optional requirement.
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    # Jobs inherit the environment of this process.
    os.environ["PYTHONPATH"] = processes.python_path()
    executor = submitit.AutoExecutor(directory.root / FOLDER, cluster=cluster)
    srun_arguments = []
    if "cpus_per_task" in options:  # srun does not inherit it from sbatch
        srun_arguments = [f"--cpus-per-task={options['cpus_per_task']}"]
    executor.update_parameters(
        name=f"sweep_{planning.sweep_name(sweep)}",
        nodes=1,
        tasks_per_node=1,
        timeout_min=LOCAL_MINUTES,
        slurm_srun_args=srun_arguments,
        slurm_additional_parameters={
            "signal": f"TERM@{SIGNAL_SECONDS}",
            "requeue": True,
            **options,
        },
    )
    path = str(pathlib.Path(sweep).expanduser().absolute())
    jobs = [
        functools.partial(run_job, path, str(directory.root), Share(index, count))
        for index in range(count)
    ]
    try:
        return executor.submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        raise RunError(f"sbatch refused the jobs: {' '.join(str(error).split())}") from None
