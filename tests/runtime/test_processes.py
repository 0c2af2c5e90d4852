"""Two processes that train as one: equal losses, a killed process, and differing options."""

import dataclasses
import json
import signal
import socket
import time

import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.loading import from_dict
from modse_jax.config.options import MeshConfig
from modse_jax.data import batching, training_data
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import scoring
from modse_jax.runtime import processes, sharding
from modse_jax.runtime.signals import StopRequest
from modse_jax.training import loop, run_logs
from tests.helpers.configs import tiny_config
from tests.helpers.runs import command, config_for, train_args


def start(*arguments_of_each):
    """Starts train.py in two connected processes of one device each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        command(
            "train.py",
            *args,
            f"--coordinator=localhost:{port}",
            "--process_count=2",
            f"--process_index={i}",
            devices=1,
            wait=False,
        )
        for i, args in enumerate(arguments_of_each)
    ]


def finish(running):
    """Waits for processes. Returns their exit codes, outputs and errors."""
    texts = [process.communicate(timeout=200) for process in running]
    codes = [process.returncode for process in running]
    return codes, [out for out, _ in texts], [err for _, err in texts]


def test_two_processes_killed_then_finished_then_evaluated_by_one(corpus, tmp_path):
    """After kill -9 of process 1, process 0 reports it and ends.

    A single process resumes, with the losses of an uninterrupted run. (tests/slurm.sh
    resumes with two processes.)
    """
    extra = {
        "mesh.fsdp": 2,
        "training.steps": 24,
        "training.log_every": 1,
        "training.checkpoint_every": 4,
        "training.eval_every": 4,
        "data.validation_sources": f"(('a', 'text:{corpus}/00.py'), ('b', 'text:{corpus}/01.py'))",
    }
    args = train_args(corpus, tmp_path / "two", **extra)
    running = start(args, args)
    deadline = time.time() + 120
    while not list((tmp_path / "two" / "checkpoints").glob("0*[0-9]")) and time.time() < deadline:
        time.sleep(0.02)
    running[1].kill()
    codes, outs, errors = finish(running)
    assert codes[1] == -signal.SIGKILL and codes[0] in (1, -signal.SIGABRT), errors[0]
    assert "another process has ended" in errors[0] or "another task died" in errors[0], errors[0]
    assert "step 4/24" in outs[0] and "step" not in outs[1]  # only the main process prints

    config = from_dict(json.loads((tmp_path / "two" / "config.json").read_text()))
    config = dataclasses.replace(config, mesh=MeshConfig(1, 2))  # of this process's eight devices
    for name in ("two", "one"):
        assert loop.train(config, str(tmp_path / name)) == ExitCode.FINISHED
    two, one = (run_logs.read_log(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [r["step"] for r in two] == [r["step"] for r in one]
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], atol=1e-5)
    macro_losses = [[r["macro_loss"] for r in rows if "sets" in r] for rows in (two, one)]
    assert len(macro_losses[0]) == 6  # the first validation is that of two processes
    np.testing.assert_allclose(*macro_losses, atol=1e-5)
    shown = []
    workdir = str(tmp_path / "two")
    scoring.evaluate(workdir, 0, ("loss", "sample"), 4, 0, ("def",), shown.append)
    assert "bits/byte" in "".join(shown) and "sample after 'def'" in "".join(shown)
    assert json.loads((tmp_path / "two" / "eval" / "24.first4.json").read_text())["limit"] == 4


def test_processes_that_disagree_stop_before_anything_is_written(corpus, tmp_path):
    args = train_args(corpus, tmp_path / "run", **{"mesh.fsdp": 2})
    codes, _, errors = finish(start(args, [*args, "--config.optimizer.learning_rate=0.5"]))
    assert codes == [2, 2]
    assert all(
        "optimizer.learning_rate of process 1 differs from that of process 0" in e for e in errors
    ), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mine, other, message",
    [
        ("", "no such file", "process 1: no such file"),
        ("disk full", "no such file", "disk full"),
        ("", "", None),
    ],
)
def test_error_on_one_process_is_raised_on_all(mine, other, message, monkeypatch):
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda text: [text, other])

    def work():
        if mine:
            raise UserError(mine)
        return "done"

    if message is None:
        assert (
            processes.on_all_processes(work)
            == processes.on_all_processes(work, first_alone=True)
            == "done"
        )
    else:
        with pytest.raises(UserError, match=message):
            processes.on_all_processes(work)


def test_rows_of_all_processes_make_the_batch(corpus, tmp_path):
    config = config_for(corpus)
    data = training_data.load(config, tmp_path / "run")
    batch = next(batching.train_batches(data, config, 3))
    row_ranges = (range(5), range(5, 8))
    parts = [next(batching.train_batches(data, config, 3, rows)) for rows in row_ranges]
    for name in ("tokens", "segments"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, batch[name])
    (dataset,) = data.datasets
    validation_batches = [
        list(batching.validation_batches(dataset, 8, 300, rows=rows))
        for rows in ((), range(4), range(4, 8))
    ]
    for whole, *halves in zip(*validation_batches):
        joined = np.concatenate([half["tokens"] for half in halves])
        np.testing.assert_array_equal(joined, whole["tokens"])
    mesh = device_mesh.build_mesh(config)
    assert sharding.local_rows(mesh, 16) == list(range(16))
    np.testing.assert_array_equal(sharding.shard_batch(mesh, batch, 8)["tokens"], batch["tokens"])


def test_several_processes_agree_to_stop_one_step_later(monkeypatch):
    stop = StopRequest()
    stop.enter_loop(device_mesh.build_mesh(tiny_config()))
    stop.requested = True
    assert stop.requested_anywhere()
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    assert [stop.requested_anywhere(), stop.requested_anywhere()] == [False, True]


@pytest.mark.parametrize("given", [("localhost:1",), ("", 2), ("", 0, 0)])
def test_incomplete_process_flags_are_refused(given):
    with pytest.raises(UserError, match="go together"):
        processes.start(*given)


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, False),
        ({"SLURM_NTASKS": "2"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_launchers_are_recognized(environment, found, monkeypatch):
    """A Slurm batch script is not itself a task; only srun starts tasks."""
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    for name in (
        "SLURM_NTASKS",
        "SLURM_STEP_NODELIST",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_WORKER_HOSTNAMES",
        "JAX_COORDINATOR_ADDRESS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.faulthandler, "disable", lambda: None)
    processes.start()
    assert bool(calls) == found
