"""Whole runs: resume, signals, evaluation, report; and every bad input in one line, exit code 2, nothing written."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import CheckpointConfig, Config, MeshConfig, fields
from modse_jax.data import batching, data_card, training_data
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import scoring
from modse_jax.report import analysis, demo_summary, pages, routing_statistics
from modse_jax.runtime import malloc
from modse_jax.training import loop, metrics, run_logs, train_step
from modse_jax.training.checkpointing import Checkpoints
from tests.helpers.runs import ROOT, command, config_for, state_of, train_args


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(corpus, tmp_path, capsys):
    config = config_for(corpus, training=dict(eval_every=3))
    assert loop.train(config, str(tmp_path / "straight")) == ExitCode.FINISHED
    short = dataclasses.replace(
        config, training=dataclasses.replace(config.training, checkpoint_every=2, log_every=1)
    )
    cut = tmp_path / "cut"
    # The schedule ends at training.steps, so a run is cut short by its signal, not by fewer steps.
    calls = {"left": 4}
    read = metrics.train_row

    def stop_at_four(*args):
        calls["left"] -= 1
        if calls["left"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*args)

    metrics.train_row = stop_at_four
    try:
        assert loop.train(short, str(cut)) == ExitCode.STOPPED
    finally:
        metrics.train_row = read
    assert max(int(p.name) for p in (cut / "checkpoints").iterdir() if p.name.isdigit()) in (4, 5)
    with open(cut / "metrics.jsonl", "a") as file:  # what a killed run leaves past its checkpoint
        file.write('{"step": 6, "split": "train"}\n{"step": 6, "spl')
    assert loop.train(short, str(cut)) == ExitCode.FINISHED
    out = capsys.readouterr().out
    assert "resuming step" in out and "experts: reference; attention: blocks\n" in out
    for a, b in zip(
        jax.tree.leaves(state_of(tmp_path / "straight", config)),
        jax.tree.leaves(state_of(cut, config)),
    ):
        np.testing.assert_array_equal(a, b)
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert len((cut / "metrics.discarded.jsonl").read_text().splitlines()) == 2
    same = {(r["step"], r["split"]): r["loss"] for r in rows}
    for r in run_logs.read_log(tmp_path / "straight" / "metrics.jsonl"):
        assert same[r["step"], r["split"]] == r["loss"]

    assert loop.train(short, str(cut)) == ExitCode.FINISHED
    assert "finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another config \(moe.top_k: 2 -> 1\)"):
        loop.train(
            dataclasses.replace(short, moe=dataclasses.replace(short.moe, top_k=1)), str(cut)
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, shared by the tests that only look at it."""
    root = tmp_path_factory.mktemp("finished")
    (root / "corpus").mkdir()
    for i in range(16):
        (root / "corpus" / f"{i}.txt").write_text(
            f"line {i} of some text, said again and again\n" * 40
        )
    config = config_for(root / "corpus")
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with options_read() as read:
        device_mesh.request_determinism(config)
        loop.train(config, str(root / "run"))
        scoring.evaluate(str(root / "run"), 0, ("sample",), 0, 0, ())
    READ.update(read)
    for s, handler in before.items():
        signal.signal(s, handler)
    return config, root / "run"


READ = set()


@contextlib.contextmanager
def options_read():
    """Collects "section.option" for every option that the package, config.py apart, reads meanwhile."""
    read, package = set(), str(ROOT / "modse_jax")

    def recording(section, cls):
        names = {f.name for f in dataclasses.fields(cls)}

        def get(self, name):
            file = sys._getframe(1).f_code.co_filename
            if name in names and file.startswith(package) and not file.endswith("config.py"):
                read.add(f"{section}.{name}".removeprefix("."))
            return object.__getattribute__(self, name)

        return get

    classes = {
        f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)
    } | {"": Config}
    for section, cls in classes.items():
        cls.__getattribute__ = recording(section, cls)
    try:
        yield read
    finally:
        for cls in classes.values():
            del cls.__getattribute__


def test_every_option_is_read_by_a_run(finished):
    """A dead option is a promise not kept. What a run of this config has no use for is named here, with its reader."""
    elsewhere = {
        "moe.width",
        "moe.widths",
        "moe.pairs",  # config.py: Config.widths and its checks
        "moe.exchange",
    }  # moe/layer.py, where there are several shards of experts
    every = {path for path, field in fields() if not dataclasses.is_dataclass(field.type)}
    assert every - READ - elsewhere == set()


def test_what_a_run_leaves(finished):
    config, workdir = finished
    train = [r for r in run_logs.read_log(workdir / "metrics.jsonl") if r["split"] == "train"]
    assert list(train[0]) == [
        "step",
        "split",
        "tokens",
        "loss",
        "bits_per_byte",
        "balance_loss",
        "z_loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu_nominal",
        "mfu_realised",
        "step_seconds",
        "skipped_steps",
        "data_wait",
        "epochs",
    ]
    held = [r for r in run_logs.read_log(workdir / "metrics.jsonl") if r["split"] == "validation"]
    assert len(held) == 1 and {"loss", "bits_per_byte"} <= set(held[0])
    routing = run_logs.read_log(workdir / "routing.jsonl")
    assert {r["layer"] for r in routing} == {0, 1}
    for r in routing:
        if r["split"] == "train":
            assert sum(r["tokens_per_expert"]) == 2 * np.sum(r["tokens_per_expert_by_choice"][0])
        assert min(config.widths) <= r["count_weighted_width"] <= max(config.widths)
        assert set(r["straggler"]) == {"in_use", "pairs", "sorted", "one_per_device", "columns"}
        assert (
            r["straggler"]["in_use"]
            == r["straggler"]["columns"]
            == 1
            <= r["straggler"]["pairs"]
            <= 2
        )
        assert 1 <= r["max_over_mean"] <= 4 and 0 <= r["entropy"] <= np.log(4) + 1e-6
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )
    environment = json.loads((workdir / "environment.json").read_text())
    assert {"versions", "devices", "git_commit", "command"} <= set(environment)
    assert list((workdir / "tensorboard").glob("events*"))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {
        "00000003",
        "00000006",
        ".lock",
    }


def test_a_checkpoint_holds_its_own_step_though_training_went_on(finished):
    """It is written in the background while the next steps reuse the donated buffers of its state."""
    config, workdir = finished
    data = training_data.load(config, workdir)
    step, state = (
        jax.jit(train_step.make_train_step(config)),
        jax.jit(lambda: train_step.init_state(config))(),
    )
    for batch in itertools.islice(batching.train_batches(data, config, 0), 3):
        state, _ = step(state, batch)
    saved = state_of(workdir, config, 3)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(jax.device_get(state))):
        np.testing.assert_allclose(a, b, atol=1e-4)
    after = state_of(workdir, config, 6)
    assert np.abs(after.params["head"] - saved.params["head"]).max() > 1e-3


def test_a_run_goes_on_on_another_mesh(finished, tmp_path, capsys):
    """From 8 devices with all parameters to shards of every expert's columns; and its report shows them."""
    config, workdir = finished
    capped = dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=2.0))
    (tmp_path / "capped").mkdir()
    (tmp_path / "capped" / "config.json").write_text(json.dumps(dataclasses.asdict(capped)))
    with pytest.raises(
        UserError, match="holds another config .mesh.data: -1 -> 8"
    ):  # it would drop other tokens
        loop.train(dataclasses.replace(capped, mesh=MeshConfig(8)), str(tmp_path / "capped"))
    local = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, balance_loss_scope="device")
    )
    (tmp_path / "capped" / "config.json").write_text(json.dumps(dataclasses.asdict(local)))
    with pytest.raises(UserError, match="holds another config .mesh.data: -1 -> 8"):  # another loss
        loop.train(dataclasses.replace(local, mesh=MeshConfig(8)), str(tmp_path / "capped"))
    shutil.copytree(workdir, tmp_path / "run")
    moved = dataclasses.replace(
        config,
        mesh=MeshConfig(1, 2, 2),
        moe=dataclasses.replace(config.moe, placement="columns"),
        training=dataclasses.replace(config.training, steps=8),
    )
    assert loop.train(moved, str(tmp_path / "run")) == ExitCode.FINISHED
    assert "resuming step 6 of 8" in capsys.readouterr().out
    rows = [
        r for r in run_logs.read_log(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"
    ]
    assert rows[-1]["step"] == 8 and rows[-1]["loss"] < rows[0]["loss"]
    assert state_of(tmp_path / "run", config, 8).params["blocks"]["moe"]["w_gate"].shape == (
        2,
        16,
        48,
    )


def test_steps_without_a_config_are_not_resumed_under_another(corpus, tmp_path):
    (tmp_path / "run" / "checkpoints" / "00000003").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        loop.train(config_for(corpus), str(tmp_path / "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_does_not_depend_on_the_batch_size(finished):
    config, workdir = finished
    results = [scoring.evaluate(str(workdir), 0, ("loss", "routing"), 0, n, ()) for n in (1, 3, 8)]
    logged = [
        r for r in run_logs.read_log(workdir / "metrics.jsonl") if r["split"] == "validation"
    ][-1]
    for r in results:
        assert r["loss"]["loss"] == pytest.approx(logged["loss"], rel=1e-6)
        assert r["loss"]["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
        assert [x["tokens_per_expert"] for x in r["routing"]["layers"]] == [
            x["tokens_per_expert"] for x in results[0]["routing"]["layers"]
        ]


def test_samples_report_and_summary(finished):
    config, workdir = finished
    shown = []
    result = scoring.evaluate(
        str(workdir), 6, ("loss", "sample"), 0, 0, ("line", "x"), shown.append
    )
    assert [s["prompt"] for s in result["samples"]] == ["line", "x"]
    assert len(shown) > 4 and "sample after 'line'\n  | line" in "".join(shown)
    for sample in result["samples"]:  # what streamed is what is kept
        assert (sample["prompt"] + sample["text"]).replace("\n", "\n  | ") in "".join(shown)
    pages.write(str(workdir))
    page = (workdir / "report" / "index.html").read_text()
    for name in ("loss", "expert_load", "load_by_width", "balance", "straggler"):
        assert (
            workdir / "report" / f"{name}.png"
        ).stat().st_size > 5000 and f'src="{name}.png"' in page
    assert "neighbours in size" in page
    last = demo_summary.summary(workdir, time.time() - 60)
    assert last["validation_bits_per_byte"] == result["loss"]["bits_per_byte"]
    assert (
        0 < last["gzip_bits_per_byte"] < 8
        and 1 <= last["minutes"] < 2
        and last["tokens_per_second"] > 0
    )


def test_evaluation_refuses_what_it_cannot_do(finished, tmp_path):
    config, workdir = finished
    for args, message in (
        ((str(workdir), 5, ("loss",), 0, 0, ()), "--step=5 is not saved in .*; saved: 3, 6"),
        ((str(workdir), 0, ("lose",), 0, 0, ()), "--suite=lose is unknown; suites: loss, routing"),
        ((str(tmp_path), 0, ("loss",), 0, 0, ()), "holds no run"),
        ((str(workdir), 0, ("sample",), 0, 0, ("x" * 99,)), "has 100 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            scoring.evaluate(*args)


def test_checkpoints_of_another_shape_or_type_are_refused(finished):
    config, workdir = finished
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    abstract = jax.eval_shape(lambda: train_step.init_state(config))
    wrong = abstract._replace(step=jax.ShapeDtypeStruct((), np.float32))
    with pytest.raises(
        UserError, match=r"checkpoint 6 does not fit the model: step is \[\[\], 'int32'\] in the"
    ):
        checkpoints.restore(6, wrong)
    wider = jax.eval_shape(
        lambda: train_step.init_state(
            dataclasses.replace(config, moe=dataclasses.replace(config.moe, gate_term="learned"))
        )
    )
    with pytest.raises(UserError, match="arrays, but the model has"):
        checkpoints.restore(6, wider)
    checkpoints.close()


def test_a_diverging_run_stops_with_its_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    config = config_for(corpus, training=dict(max_nonfinite_steps=2, steps=12))
    make = train_step.make_train_step

    def poisoned(config, mesh):
        step = make(config, mesh)

        def poison(state, batch):  # from step 4 on, every gradient is NaN
            bad = jax.numpy.where(state.step >= 4, jax.numpy.nan, 1.0)
            new, m = step(
                state._replace(params=jax.tree.map(lambda p: p * bad, state.params)), batch
            )
            keep = jax.tree.map(
                lambda a, b: jax.numpy.where(state.step >= 4, b, a), new.params, state.params
            )
            return new._replace(params=keep), m

        return poison

    monkeypatch.setattr(train_step, "make_train_step", poisoned)
    assert loop.train(config, str(tmp_path / "run")) == ExitCode.DIVERGED
    rows = run_logs.read_log(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss"] is None and rows[-1]["skipped_steps"] == 2
    saved = state_of(tmp_path / "run", config)
    assert int(saved.step) == 3 and all(np.isfinite(a).all() for a in jax.tree.leaves(saved.params))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle.dim": 8}, "modle"),
        ({"model.dimm": 8}, "Did you mean"),
        ({"model.dim": "wide"}, "dim"),
        ({"moe.widths": "(20,4,12,11)"}, "must sum to"),
        ({"training.batch_size": 3}, "is not divisible by mesh.data=2"),
    ],
)
def test_bad_options_end_in_one_line(change, message, corpus, tmp_path):
    out, err, code = command("train.py", *train_args(corpus, tmp_path / "run", **change))
    lines = [line for line in err.splitlines() if line.strip()]
    assert (
        code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    ), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(training=dict(batch_size=4000)), "fewer than training.batch_size=4000"),
        (dict(data=dict(tokenizer="sentencepiece:/no/file")), "does not exist"),
        (dict(model=dict(vocab_size=200)), "more than model.vocab_size=200"),
        (dict(checkpoint=CheckpointConfig(keep=10**9)), "MiB free"),
        (dict(model=dict(attention="splash")), "model.attention=splash needs a TPU"),
        (dict(moe=dict(backend="pallas_gpu")), "needs one of h100, h200, this is cpu"),
        (
            dict(moe=dict(backend="pallas_tpu")),
            "needs one of v4, v5e, v5p, v6e, this is cpu; backends that run anywhere",
        ),
    ],
)
def test_what_a_run_cannot_do_is_found_before_anything_is_written(
    change, message, corpus, tmp_path
):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(config_for(corpus, **change), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_workdirs_that_hold_something_else_are_left_alone(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name, message in (("file", "is a file"), ("full", "is not empty and holds no run")):
        with pytest.raises(UserError, match=message):
            loop.train(config_for(corpus), str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config=configs/no.py", "--workdir={tmp}/run"], "no.py"),
        (["--config=configs/tiny.py"], "workdir"),
        (
            ["--config=configs/tiny.py", "--workdir={tmp}/run", "stray"],
            "unexpected argument 'stray'",
        ),
        (["--config=configs/tiny.py", "--workdir={tmp}/run", "--nonsense=1"], "nonsense"),
    ],
)
def test_bad_calls_end_in_one_line(args, message, tmp_path):
    _, err, code = command("train.py", *(a.format(tmp=tmp_path) for a in args))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "run").exists()


# ---- analyses --------------------------------------------------------------------------------------------------------


def test_traces_count_what_the_layers_count(finished):
    """A second way to the same numbers: every token's experts, summed, are the statistics of the forward pass."""
    _, workdir = finished
    run = scoring.open_run(workdir, 0, 8)
    trace = analysis.trace(run, 0, 8)
    result = scoring.evaluate(str(workdir), 0, ("loss", "routing"), 0, 8, ())
    counts = routing_statistics.counts_of(trace, run.config.widths)
    assert counts.counts_YKE.tolist() != [
        x["tokens_per_expert_by_choice"] for x in result["routing"]["layers"]
    ]
    assert trace.nll_T.mean() == pytest.approx(result["loss"]["loss"], rel=1e-5)
    assert len(trace.nll_T) == result["loss"]["tokens"] and trace.ids_YTK.shape == (
        2,
        len(trace.nll_T),
        2,
    )
    np.testing.assert_allclose(trace.gates_YTK.sum(axis=2), 1, atol=1e-5)
    # The layers also count positions that predict nothing: the last of a document that ends in a record.
    everything = np.array([x["tokens_per_expert_by_choice"] for x in result["routing"]["layers"]])
    assert (counts.counts_YKE <= everything).all()


def test_an_analysis_beside_a_baseline_and_an_earlier_step(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(workdir, tmp_path / "baseline")
    said = analysis.write(str(workdir), 0, (str(tmp_path / "baseline"),), 0, 4, 0)
    assert "moved since step 3" in said and "by baseline" in said and "by the model itself" in said
    out = workdir / "report" / "analysis"
    assert {p.name for p in out.iterdir()} >= {
        "tokens_per_expert.png",
        "max_over_min.png",
        "coactivation.png",
        "difficult.png",
        "counts_step_3.csv",
        "counts_step_6.csv",
        "counts_difficult.csv",
        "difficult.csv",
        "specialists.csv",
        "text.html",
        "by_source.csv",
        "by_source.png",
        "straggler.csv",
    }
    rows = [line.split(",") for line in (out / "difficult.csv").read_text().splitlines()[1:]]
    assert {(row[0], row[1]) for row in rows} == set(
        itertools.product(("entries", "positions"), ("by baseline", "by the model itself"))
    )
    assert "neighbours in size" in said and "by source: " in said
    assert all(float(row[5]) == 0 for row in rows)  # the baseline is the model itself
    pages.write(str(workdir))
    assert "analysis/difficult.png" in (workdir / "report" / "index.html").read_text()
    assert "loss of the next" in (out / "text.html").read_text()
    card = json.loads((tmp_path / "baseline" / "data" / "card.json").read_text())
    card["source"] = "other"
    card["fingerprint"] = data_card.card_fingerprint(card)
    (tmp_path / "baseline" / "data" / "card.json").write_text(json.dumps(card))
    with pytest.raises(
        UserError, match="was prepared with source 'other'|was trained on other data"
    ):
        analysis.write(str(workdir), 0, (str(tmp_path / "baseline"),), 0, 4, 0)


def test_scripts_start_themselves_anew_with_large_pages_once(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        os, "execv", lambda *command: started.append((command, os.environ["GLIBC_TUNABLES"]))
    )
    monkeypatch.setattr(os, "environ", {})
    malloc.use_large_pages()
    malloc.use_large_pages()
    assert started == [((sys.executable, [sys.executable, *sys.orig_argv[1:]]), malloc.LARGE_PAGES)]
