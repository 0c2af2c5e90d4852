"""The runner: states of arms, kills, two runners, full disks, and what it refuses."""

import collections
import errno
import json
import os
import random
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from modse_jax.errors import DiskFullError, UserError
from modse_jax.runtime import files
from modse_jax.runtime.lock import Lock
from modse_jax.sweeps import orders, planning, results, runner, worker
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.sweeps.runner import Share
from modse_jax.training import loop, run_logs
from modse_jax.training.programs import Programs, SharedPrograms
from tests.helpers import sweeps

ARMS = """chain(
    product(choices({"k1": {"moe.top_k": 1}, "k2": {}}), seeds(0, 1)),
    choices({
        "diverges": {"optimizer.learning_rate": 1e38},
        "fails": {"training.batch_size": 1024, "evaluation.batch_size": 1024},
    }),
)"""


def plan(tmp_path, corpus, arms, workdir="sweep"):
    """Returns (directory, planned runs) of a sweep with some arms."""
    directory = SweepDirectory(tmp_path / workdir)
    loaded = planning.load_sweep(sweeps.write_sweep(tmp_path, corpus, arms))
    return directory, planning.plan_runs(directory, "small", loaded)


def train(directory, run, programs=None):
    return worker.train_run(
        orders.Order(directory, run.identity, run.config), programs or SharedPrograms()
    )


@pytest.mark.slow
def test_killed_and_shared_sweep_equals_an_undisturbed_one(corpus, tmp_path):
    file = sweeps.write_sweep(tmp_path, corpus, ARMS, log_every=1)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    stdout, stderr, code = sweeps.run_to_end(file, straight)
    assert code == 1, stderr
    table = sweeps.read_table(straight)
    assert {name: row["state"] for name, row in table.items()} == {
        **dict.fromkeys(("k1 seed=0", "k1 seed=1", "k2 seed=0", "k2 seed=1"), "finished"),
        "diverges": "diverged",
        "fails": "failed",
    }
    assert "fewer than training.batch_size=1024" in table["fails"]["reason"]
    assert "[6/6]" in stdout and "all runs have ended" in stdout
    # Two shapes; the arm that fails does so before it compiles.
    assert sweeps.read_outputs(straight).count("compiled in") == 2

    rng = random.Random(0)
    was_killed = sweeps.kill_when_steps_are_logged(
        sweeps.start_runner(file, killed), killed, 8, rng
    )
    assert was_killed
    resumable = sweeps.find_unfinished_steps(killed, steps=6)
    pair = [sweeps.start_runner(file, killed) for _ in range(2)]
    for process in pair:
        _, stderr = process.communicate(timeout=sweeps.TIMEOUT)
        assert process.returncode == 1, stderr
    assert sweeps.read_table(killed) == table
    # No step before a checkpoint is trained again.
    assert sweeps.find_resumed_steps(killed) == resumable
    output = sweeps.read_outputs(killed)
    assert output.count("starting at step 0") <= 5 + 1  # one may be killed before its checkpoint
    # A table is only a view of the results.
    rows = pyarrow.parquet.read_table(killed / "results.parquet").to_pylist()
    assert [row["arm"] for row in rows] == list(table)
    (killed / "results.csv").unlink()
    _, _, code = sweeps.run_to_end(file, killed)
    assert code == 1 and sweeps.read_table(killed) == table


def test_run_of_a_sweep_equals_a_run_of_train(corpus, tmp_path):
    """The hyperparameters are inputs of the one and constants of the other compiled step."""
    arms = 'choices({"a": {"seed": 3, "optimizer.learning_rate": 2e-2, "moe.z_loss_weight": 0.1}})'
    directory, (run,) = plan(tmp_path, corpus, arms)
    assert train(directory, run) == (orders.ENDED, "")
    loop.train(run.config, str(tmp_path / "alone"), Programs())
    expected, found = (
        run_logs.read_log(path / "metrics.jsonl")
        for path in (tmp_path / "alone", directory.training(run.identity.id))
    )
    for one, other in zip(expected, found, strict=True):
        for name in ("loss", "bits_per_byte", "grad_norm", "learning_rate"):
            if name in one:
                np.testing.assert_allclose(other[name], one[name], rtol=1e-4, err_msg=name)
    result = results.read_result(directory, run.identity.id)
    assert result["metrics"]["validation_loss"] == found[-1]["loss"]
    assert result["metrics"]["steps_done"] == 6


def test_run_that_another_process_holds_is_left_alone(corpus, tmp_path):
    directory, (run,) = plan(tmp_path, corpus, "choices({'a': {}})")
    lock = Lock(directory.run(run.identity.id) / ".lock", "")
    assert train(directory, run).kind == orders.BUSY
    lock.release()
    results.write_result(directory, run.identity, results.FAILED, "a reason")
    assert train(directory, run) == (orders.ENDED, "")  # nothing is trained
    assert not directory.training(run.identity.id).exists()
    assert runner.discard_failed(directory, [run]) == 1
    assert results.read_result(directory, run.identity.id) is None


def test_full_disk_stops_the_sweep_and_fails_no_arm(corpus, tmp_path, monkeypatch):
    directory, (run,) = plan(tmp_path, corpus, "choices({'a': {}})")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "FILE")

    def out_of_room(*_):
        raise DiskFullError("no room")

    for module, name, error in ((files, "write_atomically", full), (loop, "train", out_of_room)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, error)
            patch.setattr(loop, "train", out_of_room if module is loop else lambda *_: 0)
            assert train(directory, run).kind == orders.DISK_FULL
        assert results.read_result(directory, run.identity.id) is None


class FakeWorker:
    """A worker that replies with what a test prescribes; None is a death."""

    replies: list[orders.Reply | None] = []
    started = 0
    seeds: list[int] = []  # of the runs that were ordered

    def __init__(self):
        FakeWorker.started += 1

    def send(self, order):
        self.order = orders.decode_order(order)
        FakeWorker.seeds.append(self.order.config.seed)

    def poll(self):
        reply = FakeWorker.replies.pop(0)
        if reply is None:
            raise EOFError
        if reply.kind == orders.ENDED:
            results.write_result(self.order.directory, self.order.identity, results.FINISHED)
        return reply

    def wait(self):
        return -9

    def close(self):
        pass


@pytest.fixture
def fake_worker(monkeypatch):
    monkeypatch.setattr(runner, "WorkerProcess", FakeWorker)
    monkeypatch.setattr(runner, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(FakeWorker, "started", 0)
    monkeypatch.setattr(FakeWorker, "seeds", [])
    return FakeWorker


ENDED = orders.Reply(orders.ENDED, "")
BUSY = orders.Reply(orders.BUSY, "")


def test_run_whose_worker_dies_twice_fails_and_the_others_go_on(corpus, tmp_path, fake_worker):
    directory, runs = plan(tmp_path, corpus, "choices({'a': {}, 'b': {'seed': 1}})")
    fake_worker.replies = [None, None, BUSY, ENDED]
    assert runner.Runner(directory, "small", runs).run() == 1
    assert fake_worker.started == 3
    table = sweeps.read_table(directory.root)
    assert table["a"]["state"] == "failed" and "exit code -9" in table["a"]["reason"]
    assert table["b"]["state"] == "finished"


def test_signal_stops_the_sweep_and_full_disk_is_an_error(corpus, tmp_path, fake_worker):
    directory, runs = plan(tmp_path, corpus, "choices({'a': {}, 'b': {'seed': 1}})")
    fake_worker.replies = [ENDED, orders.Reply(orders.STOPPED, "")]
    assert runner.Runner(directory, "small", runs).run() == 75
    fake_worker.replies = [orders.Reply(orders.DISK_FULL, "cannot write FILE")]
    with pytest.raises(DiskFullError, match="cannot write FILE; make room and run the same"):
        runner.Runner(directory, "small", runs).run()
    fake_worker.replies = [ENDED]
    assert runner.Runner(directory, "small", runs).run() == 0


def test_jobs_begin_with_different_runs_and_do_not_wait_for_each_other(
    corpus, tmp_path, fake_worker
):
    arms = "product(axis('moe.top_k', (1, 2)), seeds(0, 1))"
    directory, runs = plan(tmp_path, corpus, arms)
    fake_worker.replies = [ENDED, BUSY, BUSY, ENDED, BUSY, BUSY]
    second = runner.Runner(directory, "small", runs, Share(1, 4))
    assert second.run() == 0  # the others may still succeed
    # The run that was trained is not ordered again; those that others train are.
    assert fake_worker.seeds == [1, 0, 1, 0, 0, 1]
    states = [row["state"] for row in sweeps.read_table(directory.root).values()]
    assert states == ["finished", "finished", "waiting", "waiting"]  # in the order of the file
    fake_worker.replies = [BUSY, BUSY, BUSY, BUSY, ENDED, ENDED]
    assert runner.Runner(directory, "small", runs).run() == 0  # waits
    assert not fake_worker.replies


def test_results_of_other_code_and_removed_arms_are_shown_apart(corpus, tmp_path, monkeypatch):
    directory, (first,) = plan(tmp_path, corpus, "choices({'a': {}})")
    results.write_result(directory, first.identity, results.FINISHED)
    with monkeypatch.context() as patch:
        patch.setattr(planning.processes, "source_digest", lambda: "other code")
        _, (other,) = plan(tmp_path, corpus, "choices({'a': {}})")
    results.write_result(directory, other.identity, results.FINISHED)
    _, (kept,) = plan(tmp_path, corpus, "choices({'b': {'seed': 1}})")
    rows = results.rebuild_tables(directory, "small", planning.identities([kept]))
    assert [(row["arm"], row["state"]) for row in rows] == [("b", "waiting")]
    text = (directory.root / "other_results.csv").read_text()
    assert sorted(line.split(",")[0] for line in text.splitlines()[1:]) == [
        "not an arm of this sweep",
        "other code",
    ]


def test_workdir_of_something_else_is_refused_and_nothing_is_written(corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        plan(tmp_path, corpus, "choices({'a': {}})", workdir="full")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    directory, _ = plan(tmp_path, corpus, "choices({'a': {}})")
    directory.description.write_text(json.dumps({"sweep": "large"}))
    with pytest.raises(UserError, match="holds the sweep 'large', not 'small'"):
        plan(tmp_path, corpus, "choices({'a': {}})")
    shutil.rmtree(directory.root)
    with pytest.raises(UserError, match="nowhere"):
        plan(tmp_path, tmp_path / "nowhere", "choices({'a': {}})")
    assert not directory.root.exists()


@pytest.mark.slow
def test_five_kills_change_nothing_in_a_sweep_of_eight_shapes(corpus, tmp_path):
    arms = """product(
        axis("moe.top_k", (1, 2)),
        axis("moe.gate", ("softmax_top_k", "top_k_softmax")),
        axis("optimizer.beta1", (0.8, 0.9)),
        seeds(0, 1, 2),
    )"""
    file = sweeps.write_sweep(tmp_path, corpus, arms, steps=20, log_every=1, checkpoint_every=5)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert sweeps.run_to_end(file, straight)[2] == 0
    assert sweeps.read_outputs(straight).count("compiled in") == 8
    rng = random.Random(0)
    resumable = collections.defaultdict(list)
    for kill in range(5):
        process = sweeps.start_runner(file, killed)
        assert sweeps.kill_when_steps_are_logged(process, killed, 80 * (kill + 1), rng)
        for run, steps in sweeps.find_unfinished_steps(killed, steps=20).items():
            resumable[run] += steps
    assert sweeps.run_to_end(file, killed)[2] == 0
    assert sweeps.read_table(killed) == sweeps.read_table(straight)
    # No step before a checkpoint is trained again.
    assert resumable and sweeps.find_resumed_steps(killed) == resumable
    assert sweeps.read_outputs(killed).count("starting at step 0") <= 24 + 5
