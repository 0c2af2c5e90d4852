"""Damage, faults and signals lose nothing and are never silent. `make faults` tests more."""

import dataclasses
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import DataConfig, MeshConfig
from modse_jax.data import batching, prepared_data, training_data
from modse_jax.data.prepare import pipeline
from modse_jax.errors import ExitCode, RunError, UserError
from modse_jax.evaluation import model_loading
from modse_jax.runtime import files, integrity, signals
from modse_jax.runtime.lock import Lock
from modse_jax.runtime.signals import StopRequest
from modse_jax.training import (
    fingerprints,
    loop,
    replay_check,
    restore,
    run_logs,
    state_arrays,
    train_step,
    validation,
)
from modse_jax.training.checkpointing import REWRITTEN, Checkpoints, Found
from tests.helpers import faults
from tests.helpers.configs import tiny_config
from tests.helpers.runs import ROOT, config_for, environment, state_of
from tests.helpers.steps import batch, initial_state

NOTHING = {"validation_loss": None}


@pytest.fixture(scope="module")
def state():
    return jax.device_get(initial_state(tiny_config()))


def at(state, step):
    return jax.device_put(state._replace(step=np.int32(step)))


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """Returns a directory with three checkpoints, as a run leaves them."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(root, 3)
    for step in (1, 2, 3):
        checkpoints.save(at(state, step), NOTHING)
    checkpoints.close()
    return root


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def abstract(state):
    return jax.eval_shape(lambda: state)


def accept(step, meta):
    pass


def test_every_kind_of_damage_to_every_file_is_found(saved, tmp_path):
    cases = faults.damages(saved / "00000003", saved / "00000002", random.Random(0))
    found = {True: 0, False: 0}
    for name, file, damage in cases:
        shutil.copytree(saved / "00000003", tmp_path / "step")
        damage(tmp_path / "step")
        reason = integrity.verify(tmp_path / "step", REWRITTEN)
        assert reason or file in REWRITTEN, name  # a restore does not read those two
        found[bool(reason)] += 1
        shutil.rmtree(tmp_path / "step")
    assert found[True] >= 150 and not integrity.verify(saved / "00000003", REWRITTEN)


def test_damaged_step_is_set_aside_and_the_previous_one_restored(copy, state):
    faults.flip(next((copy / "00000003" / "state" / "d").iterdir()), random.Random(1))
    checkpoints = Checkpoints(copy, 3)
    found = checkpoints.newest(accept)
    assert (
        found.step == 2
        and found.damaged[0][0] == 3
        and "other bytes than were written" in found.damaged[0][1]
    )
    assert checkpoints.steps() == [1, 2, 3]  # nothing moves before something sound is found
    got, reason = checkpoints.restore(2, abstract(state))
    assert not reason and int(got.step) == 2
    said = checkpoints.start_writing(found.damaged)
    assert "checkpoint 3 is damaged" in said[0] and checkpoints.steps() == [1, 2]
    assert len(list((copy / "quarantine").iterdir())) == 1
    checkpoints.save(at(state, 3), NOTHING)  # training reaches it again
    checkpoints.close()
    assert not integrity.verify(copy / "00000003", REWRITTEN)


def test_run_never_starts_over_if_every_step_is_damaged(copy):
    for step in (1, 2, 3):
        (copy / f"{step:08}" / "meta" / "metadata").write_text("")
    before = sorted(copy.rglob("*"))
    for _ in range(2):
        checkpoints = Checkpoints(copy, 3)
        with pytest.raises(UserError, match=r"no sound checkpoint is left .*step 3: .*step 1: "):
            checkpoints.newest(accept)
        checkpoints.close()
        assert sorted(copy.rglob("*")) == before
    shutil.rmtree(copy)
    (copy / "quarantine" / "00000003.7").mkdir(parents=True)
    with pytest.raises(UserError, match="set aside earlier: 00000003.7"):
        Checkpoints(copy, 3).newest(accept)


def test_fingerprints_find_changed_arrays_in_intact_files(copy, state, monkeypatch):
    """A wrong copy to the host, or a wrong restore, is not visible in the hashes of files."""
    right = state_arrays.compute_fingerprints
    monkeypatch.setattr(
        state_arrays,
        "compute_fingerprints",
        lambda *a: {k: v + (k == "params/head") for k, v in right(*a).items()},
    )
    checkpoints = Checkpoints(copy, 3)
    reason = checkpoints.restore(3, abstract(state))[1]
    assert reason == "params/head is not what was saved (1 arrays differ)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_fingerprint_depends_on_every_element_but_not_on_the_mesh(dtype):
    array = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 6)), dtype)
    plain = int(jax.jit(fingerprints.fingerprint)(array))
    for sizes in ((8, 1, 1), (1, 2, 1), (2, 2, 2)):
        mesh = device_mesh.build_mesh(tiny_config(mesh=MeshConfig(*sizes)))
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), "expert")
        there = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
        assert int(jax.jit(fingerprints.fingerprint)(there)) == plain
    for place in ((0, 0), (3, 2), (7, 5)):
        changed = array.at[place].set((1 - array[place]).astype(array.dtype))
        assert int(jax.jit(fingerprints.fingerprint)(changed)) != plain
    assert int(jax.jit(fingerprints.fingerprint)(array[::-1])) != plain


def test_fingerprint_depends_on_several_changes_of_the_same_bit():
    """A sum that is linear in the bits does not change if an even number of signs does."""
    rng = np.random.default_rng(0)
    bits = rng.normal(size=(16, 12)).astype(np.float32).reshape(-1).view(np.uint32)
    changed = [bits.copy() for _ in range(301)]
    for trial, array in enumerate(changed[1:]):
        places = rng.choice(bits.size, 2 * int(rng.integers(1, 20)), replace=False)
        array[places] ^= np.uint32(1 << (31, 30, int(rng.integers(32)))[trial % 3])
    changed.append(bits ^ np.uint32(1 << 31))  # every sign
    find = jax.jit(jax.vmap(fingerprints.fingerprint))
    values = np.asarray(find(np.stack(changed).view(np.float32).reshape(-1, 16, 12)))
    assert not (values[1:] == values[0]).any()


def test_checkpoints_of_format_2_are_verified_with_their_own_fingerprints(copy, state):
    """The arrays are intact if their fingerprints match, and damaged if one does not."""
    path = copy / "00000003" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta["format"] == 3
    old = state_arrays.compute_fingerprints(at(state, 3), 2)
    assert all(old[name] != new for name, new in meta["fingerprints"].items() if "params" in name)
    for fingerprints_of_file, reason in (
        (old, ""),
        (meta["fingerprints"], r".* is not what was saved \(\d+ arrays differ\)"),
        (old | {"params/head": 1}, r"params/head is not what was saved \(1 arrays differ\)"),
    ):
        path.write_text(json.dumps(meta | {"format": 2, "fingerprints": fingerprints_of_file}))
        assert re.fullmatch(reason, Checkpoints(copy, 3).restore(3, abstract(state))[1])
    path.write_text(json.dumps(meta | {"format": 4}))
    with pytest.raises(UserError, match="checkpoint 3 has format 4, but .* reads formats 2, 3"):
        Checkpoints(copy, 3).meta(3)


def test_newest_best_and_every_nth_step_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2, keep_every=4)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 1.5), (6, None)):
        checkpoints.save(at(state, step), {"validation_loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [2, 4, 5, 6]  # the best, the fourth, the newest two
    checkpoints = Checkpoints(tmp_path, 2, keep_every=4)  # remembers which was the best
    checkpoints.save(at(state, 7), {"validation_loss": 0.5})
    checkpoints.close()
    assert checkpoints.steps() == [4, 6, 7] and not (tmp_path / "trash").exists()


def test_step_with_a_loss_that_is_not_finite_is_never_the_best(tmp_path, state):
    """A comparison with NaN is always false, so the first step would be kept, and not the best."""
    checkpoints = Checkpoints(tmp_path, 1)
    for step, loss in ((1, math.nan), (2, 2.0), (3, 1.0), (4, math.inf), (5, None)):
        checkpoints.save(at(state, step), {"validation_loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [3, 5]


def test_step_without_a_file_does_not_count_as_kept(copy, state):
    (copy / "00000003" / "state" / "_METADATA").unlink()
    checkpoints = Checkpoints(copy, 2)
    checkpoints.save(at(state, 4), NOTHING)
    checkpoints.close()
    assert {2, 4} <= set(checkpoints.steps())


def test_failed_background_save_is_reported_and_leaves_nothing(copy, state, monkeypatch):
    checkpoints = Checkpoints(copy, 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "seal", full)
        checkpoints.save(at(state, 4), NOTHING)
        with pytest.raises(
            RunError, match="saving step 4 .* failed: .*No space left.*step 3 is the last good one"
        ):
            while True:
                checkpoints.poll()
    assert not list(copy.glob("*tmp*")) and checkpoints.steps() == [1, 2, 3]
    checkpoints.save(at(state, 4), NOTHING)  # there is room again
    checkpoints.close()
    assert checkpoints.steps() == [2, 3, 4]


def test_save_without_space_or_of_nonfinite_state_writes_nothing(copy, state, monkeypatch):
    checkpoints = Checkpoints(copy, 3)
    bad = state._replace(
        params={**state.params, "head": np.full_like(state.params["head"], np.nan)}
    )
    with pytest.raises(RunError, match="state of step 4 is not finite and will not be saved"):
        checkpoints.save(at(bad, 4), NOTHING)
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match="no room to save step 4"):
        checkpoints.save(at(state, 4), NOTHING)
    assert checkpoints.steps() == [1, 2, 3] and not list(copy.glob("*tmp*"))


def test_symlinks_are_refused(copy, tmp_path):
    file = copy / "00000003" / "meta" / "metadata"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is a symlink" in integrity.verify(copy / "00000003", REWRITTEN)
    with pytest.raises(ValueError, match="symlink"):
        files.read_json(file)


def test_second_writer_is_refused_and_the_first_is_named(tmp_path):
    path = tmp_path / "run" / "checkpoints" / ".lock"
    first = Lock(path, "run is in use")
    with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on .*, since 20"):
        Lock(path, "run is in use")
    first.release()
    Lock(path, "").release(leave_no_trace=True)
    assert path.parent.exists()  # the first made it
    second = Lock(tmp_path / "other" / ".lock", "")
    second.release(leave_no_trace=True)
    assert not (tmp_path / "other").exists()


def test_old_step_with_a_flipped_bit_does_not_count_as_kept(copy, state):
    faults.flip(copy / "00000002" / "meta" / "metadata", random.Random(0))
    checkpoints = Checkpoints(copy, 2)
    checkpoints.save(at(state, 4), NOTHING)
    checkpoints.close()
    assert {3, 4} <= set(checkpoints.steps()) and not checkpoints.verify(3)


# ---- steps ----


def test_spikes_change_nothing_and_nonfinite_norms_are_not_in_the_median():
    config = tiny_config(training=dict(spike_factor=3.0), advanced=dict(spike_window=8))
    step, state = jax.jit(train_step.make_train_step(config)), initial_state(config)
    b = batch(config)
    for _ in range(4):
        state, m = step(state, b)
        assert int(m.fault) == 0
    bad = jax.tree.map(lambda a: a * jnp.nan if a.ndim else a, state.params)
    after, m = step(state._replace(params=bad), b)
    assert (
        int(m.fault) == 1 and np.isnan(after.norms).sum() == 4
    )  # four of eight known: it did not enter
    quiet = state._replace(
        norms=state.norms / 100
    )  # as if gradients had been a hundredth until now
    after, m = step(quiet, b)
    assert int(m.fault) == 2 and int(m.skipped) == 1 and int(m.nonfinite_in_a_row) == 0
    for a, c in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
    ):
        np.testing.assert_array_equal(a, c)
    assert np.isfinite(after.norms).sum() == 5  # remembered, so that it may become the usual size
    few = state._replace(norms=jnp.full((8,), jnp.nan).at[0].set(1e-6))
    assert int(step(few, b)[1].fault) == 0  # one step is no median


def test_replayed_step_is_compared_bit_by_bit():
    config = tiny_config()
    state, b = initial_state(config), batch(config)
    step = jax.jit(train_step.make_train_step(config))
    once = step(state, b)[0]
    twice, _, same = replay_check.run_twice(step, state, b)
    assert same
    for a, c in zip(jax.tree.leaves(once), jax.tree.leaves(twice)):
        np.testing.assert_array_equal(a, c)
    calls = iter((0.0, 1e-7))

    def faulty(state, b):
        new, m = step(state, b)
        return new._replace(
            params={**new.params, "head": new.params["head"].at[0, 0].add(next(calls))}
        ), m

    assert not replay_check.run_twice(faulty, state, b)[2]


# ---- runs ----


def test_batches_read_are_those_of_every_step():
    for skipped_data in ([], [[4, 3]], [[2, 1], [4, 3]], [[4, 3], [4, 2], [6, 1]]):
        for step in range(9):
            expected = [restore.next_batch_number(number, skipped_data) for number in range(step)]
            batches = restore.batches_read(step, skipped_data)
            assert [number for numbers in batches for number in numbers] == expected


@pytest.mark.parametrize("entry", [{}, {"independent_seeds": False}, {"independent_seeds": True}])
def test_a_resumed_run_keeps_the_seeds_of_its_mixture(entry):
    """Checkpoints of older versions have no entry, and their seeds are not independent."""
    found = Found(3, {"skipped_data": [], **entry}, [])
    checkpoints = types.SimpleNamespace(
        newest=lambda check: found, restore=lambda step, shapes: ("the state", "")
    )
    restored = restore.restore_state(checkpoints, None, {}, tiny_config())
    assert restored.state == "the state"
    assert restored.has_independent_seeds == entry.get("independent_seeds", False)


def test_rewind_happens_once_and_its_skipped_data_stays_skipped(corpus, tmp_path, capsys):
    config = config_for(
        corpus,
        training=dict(steps=8, checkpoint_every=2, log_every=1),
        advanced=dict(replay_check=3),
    )
    workdir = tmp_path / "run"
    first = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=6))
    assert loop.train(first, str(workdir)) == ExitCode.FINISHED
    # Checkpoint.keep is 3, so steps 2 and 4 exist beside 6.
    with pytest.raises(UserError, match=r"step 5 is not saved; saved: 2, 4, 6"):
        loop.train(
            dataclasses.replace(
                config, training=dataclasses.replace(config.training, rewind=(5, 1))
            ),
            str(workdir),
        )
    back = dataclasses.replace(config, training=dataclasses.replace(config.training, rewind=(4, 3)))
    assert loop.train(back, str(workdir)) == ExitCode.FINISHED
    said = capsys.readouterr().out
    assert (
        "checkpoint 6 is past the rewind; set aside as rewound/00000006" in said
        and "resuming step 4 of 8" in said
    )
    assert (
        loop.train(back, str(workdir)) == ExitCode.FINISHED
        and "nothing to do" in capsys.readouterr().out
    )
    meta = json.loads((workdir / "checkpoints" / "00000008" / "meta" / "metadata").read_text())
    assert (
        meta["skipped_data"] == [[4, 3]]
        and restore.next_batch_number(4, meta["skipped_data"]) == 7
        and restore.next_batch_number(3, meta["skipped_data"]) == 3
    )
    rows = [r for r in run_logs.read_log(workdir / "metrics.jsonl") if r["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 9))
    # The batches that the rewind skipped are not counted.
    (first_epochs,), (last_epochs,) = (rows[i]["epochs"].values() for i in (0, -1))
    assert last_epochs == pytest.approx(8 * first_epochs)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=9))
    assert (
        loop.train(longer, str(workdir)) == ExitCode.FINISHED
    )  # without the option: what was skipped stays skipped
    meta = json.loads((workdir / "checkpoints" / "00000009" / "meta" / "metadata").read_text())
    assert meta["skipped_data"] == [[4, 3]]


def test_nonfinite_step_is_logged_with_its_records(corpus, tmp_path, monkeypatch, capsys):
    config = config_for(corpus, training=dict(steps=6))
    monkeypatch.setattr(
        train_step,
        "make_train_step",
        faults.poisoned(train_step.make_train_step, lambda step: step == 3),
    )
    assert loop.train(config, str(tmp_path / "run")) == ExitCode.FINISHED
    (event,) = run_logs.read_log(tmp_path / "run" / "events.jsonl")
    data = training_data.load(config, tmp_path / "run")
    assert event["step"] == 4 and event["fault"] == "not finite" and event["loss"] == "nan"
    assert (
        event["records"] == [list(r) for r in batching.record_ids(data, config, 3)]
        and len(event["records"]) == 8
    )
    assert "step 4 changed nothing: not finite" in capsys.readouterr().out
    assert run_logs.read_log(tmp_path / "run" / "metrics.jsonl")[-1]["split"] == "validation"
    assert all(
        np.isfinite(a).all() for a in jax.tree.leaves(state_of(tmp_path / "run", config).params)
    )


def test_signal_during_validation_saves_and_the_next_start_validates(
    corpus, tmp_path, monkeypatch, capsys
):
    config, workdir = config_for(corpus, training=dict(steps=3)), tmp_path / "run"
    run = validation.run

    def interrupted(score, params, batches, data, whole):
        os.kill(os.getpid(), signal.SIGTERM)
        return run(score, params, batches, data, whole)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "run", interrupted)
        assert loop.train(config, str(workdir)) == ExitCode.STOPPED
    assert [r["split"] for r in run_logs.read_log(workdir / "metrics.jsonl")] == ["train", "train"]
    assert loop.train(config, str(workdir)) == ExitCode.FINISHED
    assert run_logs.read_log(workdir / "metrics.jsonl")[-1]["split"] == "validation"
    assert (
        loop.train(config, str(workdir)) == ExitCode.FINISHED
        and "nothing to do" in capsys.readouterr().out
    )


def test_run_killed_while_preparing_data_starts_again(corpus, tmp_path):
    code = (
        "from modse_jax.data.prepare import publishing; import os, sys\n"
        "publishing.publish = lambda *a: os.kill(os.getpid(), 9)\n"
        "sys.argv[0] = 'train.py'; from modse_jax.cli import train_command; train_command.run()"
    )
    changes = {**faults.SMALL, "data.source": f"text:{corpus}", "training.steps": 2}
    arguments = [
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{k}={v}" for k, v in changes.items()),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=configs/tiny.py", *arguments],
        capture_output=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "GLIBC_TUNABLES": ""},
    )
    assert done.returncode == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "data.partial",
        "data.preparing",
    }
    assert (
        loop.train(config_for(corpus, training=dict(steps=2)), str(tmp_path / "run"))
        == ExitCode.FINISHED
    )


def test_signal_before_the_first_step_frees_the_lock(corpus, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_step, "compile_train_step", interrupted)
    assert loop.train(config_for(corpus), str(tmp_path / "run")) == ExitCode.STOPPED
    assert "stopped before the first step" in capsys.readouterr().err
    Lock(tmp_path / "run" / "checkpoints" / ".lock", "").release()  # it is free again


def test_second_signal_exits_at_once_unless_it_is_a_repeat(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = StopRequest()
    stop.enter_loop(device_mesh.build_mesh(tiny_config()))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # make sends it twice
    assert stop.requested_anywhere() and not left
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0)
    os.kill(os.getpid(), signal.SIGINT)
    assert left == [130]


def test_watchdog_prints_every_stack_and_exits(tmp_path):
    code = (
        "from modse_jax.runtime import watchdog; import time; watchdog.reset(0.01); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert (
        done.returncode == 1
        and "Timeout" in done.stderr
        and 'File "<string>", line 1' in done.stderr
    )


def test_full_disk_under_the_logs_stops_the_run(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    config = config_for(corpus)
    monkeypatch.setattr(run_logs, "BOARD_ROOM", usage.free * 2)
    with pytest.raises(RunError, match="KiB free; checkpoints are untouched"):
        loop.train(config, str(tmp_path / "run"))


def test_step_that_needs_too_much_memory_is_refused(corpus, tmp_path, monkeypatch):
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))
    with pytest.raises(
        UserError,
        match="a step needs about .* GiB on cpu, which has 0.0; lower training.batch_size",
    ):
        loop.train(config_for(corpus), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_verify_reports_damaged_steps(copy):
    text, sound = model_loading.verify_checkpoints(str(copy.parent))
    assert sound and text.count("good") == 3
    faults.flip(copy / "00000002" / "meta" / "metadata", random.Random(0))
    text, sound = model_loading.verify_checkpoints(str(copy.parent))
    assert not sound and text.count("good") == 2 and "step        2  damaged: " in text


def test_bit_flips_in_prepared_data_are_never_silent(corpus, tmp_path):
    pipeline.prepare_data(
        DataConfig(source=f"text:{corpus}", sequence_length=32), str(tmp_path / "data"), 0
    )
    assert faults.data_flips(tmp_path / "data", 60, random.Random(0)) == 60
    config = tiny_config()
    data = prepared_data.open_prepared(tmp_path / "data")
    assert len(data.splits["train"]) > 8
    for change, message in (
        (dict(tokens=np.full(33, 999)), "token id 999, outside the vocabulary"),
        (dict(segments=np.full(33, 2)), "segment ids that do not count documents from 1"),
        (dict(tokens=np.zeros(5, int)), r"has shapes .*\(5,\)"),
    ):
        records = [{**data.splits["train"][0], **change}] * len(data.splits["train"])
        broken = training_data.TrainingData(
            (data._replace(splits={**data.splits, "train": records}),), (1.0,)
        )
        with pytest.raises(UserError, match=f"record .* of train in .*{message}"):
            next(batching.train_batches(broken, config, 0))


def test_run_killed_during_a_save_ends_like_an_uninterrupted_run(corpus, tmp_path):
    """The process is killed before its second checkpoint is complete."""
    config = config_for(corpus)
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    assert loop.train(config, str(straight)) == ExitCode.FINISHED
    code = (
        "import json, os, sys\n"
        "from modse_jax.config.loading import from_dict\n"
        "from modse_jax.runtime import integrity\n"
        "from modse_jax.training import loop\n"
        "seal = integrity.seal\n"
        "folders = []\n"
        "def seal_first_checkpoint(folder, *rest):\n"
        "    folders.append(folder)\n"
        "    if len(folders) == 2: os.kill(os.getpid(), 9)\n"
        "    return seal(folder, *rest)\n"
        "integrity.seal = seal_first_checkpoint\n"
        "loop.train(from_dict(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config)), str(killed)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(devices=8), "GLIBC_TUNABLES": ""},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (killed / "checkpoints").glob("0*[0-9]")] == ["00000003"]
    assert loop.train(config, str(killed)) == ExitCode.FINISHED
    logs = [run_logs.read_log(workdir / "metrics.jsonl") for workdir in (straight, killed)]
    losses = [[(row["step"], row["split"], row["loss"]) for row in rows] for rows in logs]
    assert losses[0] == losses[1]
    expected = jax.tree.leaves(state_of(straight, config))
    for one, other in zip(expected, jax.tree.leaves(state_of(killed, config)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_like_an_uninterrupted_run(tmp_path):
    result = faults.kills(tmp_path, 5, random.Random(0))
    assert result["kills"] == 5 and result["equal_to_the_uninterrupted_run"]
