"""Runs from start to end: resuming, signals, evaluation, reports, and the refusal of bad input.

Bad input ends in a message of one line and exit code 2, and leaves nothing behind.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from modse_jax.config import device_mesh, loading
from modse_jax.config.options import CheckpointConfig, Config, MeshConfig, fields
from modse_jax.data import batching, data_card, training_data
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import model_loading, scoring
from modse_jax.report import analysis, demo_summary, pages, routing_statistics
from modse_jax.runtime import malloc, sharding
from modse_jax.training import loop, metrics, run_logs, startup, train_step, workdir_checks
from modse_jax.training.checkpointing import Checkpoints
from modse_jax.training.programs import Programs
from tests.helpers.configs import tiny_config
from tests.helpers.runs import (
    ROOT,
    command,
    config_for,
    save_untrained_run,
    state_of,
    train_args,
)


def change(config: Config, section: str, **options: Any) -> Config:
    """Returns a config with other values in one section."""
    changed = dataclasses.replace(getattr(config, section), **options)
    return dataclasses.replace(config, **{section: changed})


def read_rows(workdir: pathlib.Path, split: str) -> list[dict]:
    """Returns the rows of metrics.jsonl for a split."""
    rows = run_logs.read_log(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == split]


def test_resumed_run_equals_an_uninterrupted_run_bit_for_bit(corpus, tmp_path, capsys, monkeypatch):
    config = config_for(corpus, training=dict(eval_every=3))
    straight = tmp_path / "straight"
    cut = tmp_path / "cut"
    assert loop.train(config, str(straight)) == ExitCode.FINISHED
    often_saved = change(config, "training", checkpoint_every=2, log_every=1)
    # The learning rate depends on training.steps, so a signal interrupts the run, not fewer steps.
    original = metrics.train_row
    calls = itertools.count(1)

    def send_signal_in_fourth_call(*args):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "train_row", send_signal_in_fourth_call)
        assert loop.train(often_saved, str(cut)) == ExitCode.STOPPED
    names = [path.name for path in (cut / "checkpoints").iterdir()]
    assert max(int(name) for name in names if name.isdigit()) in (4, 5)
    with open(cut / "metrics.jsonl", "a") as file:  # lines of a killed run after its checkpoint
        file.write('{"step": 6, "split": "train"}\n{"step": 6, "spl')
    assert loop.train(often_saved, str(cut)) == ExitCode.FINISHED
    output = capsys.readouterr().out
    assert "resuming step" in output
    assert "experts: reference; attention: blocks\n" in output
    expected = jax.tree.leaves(state_of(straight, config))
    for one, other in zip(expected, jax.tree.leaves(state_of(cut, config)), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert len((cut / "metrics.discarded.jsonl").read_text().splitlines()) == 2
    losses = {(row["step"], row["split"]): row["loss"] for row in rows}
    for row in run_logs.read_log(straight / "metrics.jsonl"):
        assert losses[row["step"], row["split"]] == row["loss"]

    assert loop.train(often_saved, str(cut)) == ExitCode.FINISHED
    assert "finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another config \(moe.top_k: 2 -> 1\)"):
        loop.train(change(often_saved, "moe", top_k=1), str(cut))


class FinishedRun(NamedTuple):
    """A finished run, and the "section.option" names that it and its evaluation read."""

    config: Config
    workdir: pathlib.Path
    options_read: set[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, shared by tests that do not change it."""
    root = tmp_path_factory.mktemp("finished")
    corpus = root / "corpus"
    corpus.mkdir()
    for number in range(16):
        line = f"line {number} of some text, said again and again\n"
        (corpus / f"{number}.txt").write_text(line * 40)
    config = config_for(corpus)
    workdir = root / "run"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with record_options_read() as options_read, pytest.MonkeyPatch.context() as patch:
        compile_train_step = train_step.compile_train_step.__wrapped__  # shares no compiled step
        patch.setattr(train_step, "compile_train_step", compile_train_step)
        device_mesh.request_determinism(config)
        loop.train(config, str(workdir))
        scoring.evaluate(str(workdir), 0, ("sample",), 0, 0, ())
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return FinishedRun(config, workdir, options_read)


# Modules that read every option, whether anything uses it or not.
READ_EVERY_OPTION = ("checks.py", "loading.py", "option_fields.py", "reference.py")


@contextlib.contextmanager
def record_options_read() -> Iterator[set[str]]:
    """Collects "section.option" of every option that the package reads meanwhile."""
    found: set[str] = set()
    sections = {"": Config}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            sections[field.name] = field.type
    for section, config_class in sections.items():
        config_class.__getattribute__ = recording_getter(section, config_class, found)
    try:
        yield found
    finally:
        for config_class in sections.values():
            del config_class.__getattribute__


def recording_getter(section: str, config_class: type, found: set[str]) -> Callable:
    """Returns a __getattribute__ that adds options to `found` when the package reads them."""
    names = {field.name for field in dataclasses.fields(config_class)}
    package = ROOT / "modse_jax"

    def get(self, name):
        reader = pathlib.Path(sys._getframe(1).f_code.co_filename)
        reads_all = reader.parent == package / "config" and reader.name in READ_EVERY_OPTION
        if name in names and reader.is_relative_to(package) and not reads_all:
            found.add(f"{section}.{name}".removeprefix("."))
        return object.__getattribute__(self, name)

    return get


def test_every_option_is_read_by_a_run(finished):
    """No option is without effect. Options that this config does not use are listed here."""
    read_elsewhere = {
        # Config.widths and the checks of options:
        "moe.width",
        "moe.widths",
        "moe.pairs",
        # training/loss_free_balancing.py, with a bias rule:
        "moe.bias_recenter",
        # moe/layer.py, if the experts are sharded:
        "moe.exchange",
    }
    options = {path for path, field in fields() if not dataclasses.is_dataclass(field.type)}
    assert options - finished.options_read - read_elsewhere == set()


def test_run_leaves_metrics_routing_config_environment_and_checkpoints(finished):
    config, workdir, _ = finished
    assert list(read_rows(workdir, "train")[0]) == [
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
    (validation_row,) = read_rows(workdir, "validation")
    assert {"loss", "bits_per_byte"} <= set(validation_row)
    saved_config = json.loads((workdir / "config.json").read_text())
    assert saved_config == json.loads(json.dumps(loading.to_saved(config)))
    environment = json.loads((workdir / "environment.json").read_text())
    assert {"versions", "devices", "git_commit", "command"} <= set(environment)
    assert list((workdir / "tensorboard").glob("events*"))
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"00000003", "00000006", ".lock"}


def test_logged_routing_is_consistent(finished):
    config, workdir, _ = finished
    rows = run_logs.read_log(workdir / "routing.jsonl")
    assert {row["layer"] for row in rows} == {0, 1}
    for row in rows:
        if row["split"] == "train":
            first_choices = np.sum(row["tokens_per_expert_by_choice"][0])
            assert sum(row["tokens_per_expert"]) == 2 * first_choices
        assert min(config.widths) <= row["count_weighted_width"] <= max(config.widths)
        straggler = row["straggler"]
        assert set(straggler) == {"in_use", "pairs", "sorted", "one_per_device", "columns"}
        assert straggler["in_use"] == straggler["columns"] == 1
        assert 1 <= straggler["pairs"] <= 2
        assert 1 <= row["max_over_mean"] <= 4
        assert 0 <= row["entropy"] <= np.log(4) + 1e-6


def test_checkpoint_holds_its_own_step_although_training_continued(finished):
    """It is written in the background while later steps reuse the donated buffers of its state."""
    config, workdir, _ = finished
    data = training_data.load(config, workdir)
    step = jax.jit(train_step.make_train_step(config))
    state = jax.jit(lambda: train_step.init_state(config))()
    for batch in itertools.islice(batching.train_batches(data, config, 0), 3):
        state, _ = step(state, batch)
    saved = state_of(workdir, config, 3)
    expected = jax.tree.leaves(jax.device_get(state))
    for one, other in zip(jax.tree.leaves(saved), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    later = state_of(workdir, config, 6)
    assert np.abs(later.params["head"] - saved.params["head"]).max() > 1e-3


@pytest.mark.parametrize("options", [{"capacity_factor": 2.0}, {"balance_loss_scope": "device"}])
def test_mesh_may_not_change_if_the_loss_depends_on_it(options, finished, tmp_path):
    config = change(finished.config, "moe", **options)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match="holds another config .mesh.data: -1 -> 8"):
        loop.train(dataclasses.replace(config, mesh=MeshConfig(8)), str(tmp_path))


def test_number_of_devices_may_not_change_if_the_loss_depends_on_it(corpus, tmp_path, monkeypatch):
    """mesh.data=-1 takes all devices, so the config alone does not fix the mesh."""
    config = config_for(corpus, moe=dict(balance_loss_scope="device"))
    save_untrained_run(config, tmp_path / "run", step=2)
    found = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: found[:2])
    with pytest.raises(UserError, match="trained on 8 devices, .* now give 2, .* resume on 8"):
        loop.train(config, str(tmp_path / "run"))
    # No step is left to train, so the mesh does not matter.
    with contextlib.ExitStack() as cleanup:
        without_steps = change(config, "training", steps=2)
        _, restored = startup.prepare_run(without_steps, tmp_path / "run", cleanup, Programs())
    assert restored.step == 2
    dense = change(config, "model", dense_width=24)
    assert config.depends_on_mesh and not dense.depends_on_mesh


def test_run_resumes_on_another_mesh(finished, tmp_path, capsys):
    """From 8 devices with replicated parameters to sharded hidden units of every expert."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    config = change(finished.config, "moe", placement="split")
    config = change(config, "training", steps=8)
    config = dataclasses.replace(config, mesh=MeshConfig(1, 2, 2))
    assert loop.train(config, str(workdir)) == ExitCode.FINISHED
    assert "resuming step 6 of 8" in capsys.readouterr().out
    rows = read_rows(workdir, "train")
    assert rows[-1]["step"] == 8
    assert rows[-1]["loss"] < rows[0]["loss"]
    experts = state_of(workdir, finished.config, 8).params["blocks"]["moe"]
    assert experts["w_gate"].shape == (2, 16, 48)


def test_checkpoints_without_a_config_are_not_resumed(corpus, tmp_path):
    (tmp_path / "run" / "checkpoints" / "00000003").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        loop.train(config_for(corpus), str(tmp_path / "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_does_not_depend_on_the_batch_size(finished):
    workdir = finished.workdir
    results = [
        scoring.evaluate(str(workdir), 0, ("loss", "routing"), 0, batch_size, ())
        for batch_size in (1, 3, 8)
    ]
    logged = read_rows(workdir, "validation")[-1]
    counts = [
        [layer["tokens_per_expert"] for layer in result["routing"]["layers"]] for result in results
    ]
    for result in results:
        for name in ("loss", "bits_per_byte"):
            assert result["loss"][name] == pytest.approx(logged[name], rel=1e-6)
    assert counts[1:] == counts[:-1]


def test_evaluation_with_a_capacity_counts_dropped_tokens(finished):
    model = model_loading.load_model(finished.workdir, 0, 8)
    config = change(model.config, "evaluation", capacity_factor=0.25)
    validated = scoring.validate(model._replace(config=config), 8, 8)
    dropped = [layer["dropped"] for layer in validated.routing]
    assert min(dropped) > 0
    assert validated.loss["dropped"] == sum(dropped)
    text = scoring.format_results({"step": 6, "limit": 8, "loss": validated.loss})
    assert f"tokens, {sum(dropped)} dropped" in text
    line = metrics.validation_line(6, 6, validated.loss)
    assert line.endswith(f"dropped {sum(dropped)}")


def test_samples_report_and_summary(finished):
    workdir = finished.workdir
    shown = []
    prompts = ("line", "x")
    result = scoring.evaluate(str(workdir), 6, ("loss", "sample"), 0, 0, prompts, shown.append)
    output = "".join(shown)
    assert tuple(sample["prompt"] for sample in result["samples"]) == prompts
    assert len(shown) > 4
    assert "sample after 'line'\n  | line" in output
    for sample in result["samples"]:  # the streamed text is the returned text
        assert (sample["prompt"] + sample["text"]).replace("\n", "\n  | ") in output
    pages.write(str(workdir))
    page = (workdir / "report" / "index.html").read_text()
    for name in ("loss", "expert_load", "load_by_width", "balance", "straggler"):
        assert (workdir / "report" / f"{name}.png").stat().st_size > 5000
        assert f'src="{name}.png"' in page
    assert "neighbours in size" in page
    summary = demo_summary.summarize_run(workdir, time.time() - 60)
    assert summary["validation_bits_per_byte"] == result["loss"]["bits_per_byte"]
    assert 0 < summary["gzip_bits_per_byte"] < 8
    assert 1 <= summary["minutes"] < 2
    assert summary["tokens_per_second"] > 0


def test_a_source_beside_a_mixture_is_refused_in_a_new_run(tmp_path):
    """Runs that older versions started with both are still resumed."""
    config = tiny_config(data=dict(source="text:x", mixture=(("a", 1.0),)))
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="data.source=text:x would not be used, because data.mix"):
        workdir_checks.check_workdir(workdir, config)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(loading.to_saved(config)))
    workdir_checks.check_workdir(workdir, config)


def test_samples_are_as_long_as_the_context_allows(finished):
    """The context holds 64 tokens, and 4 tokens are requested."""
    model = model_loading.load_model(finished.workdir, 6, 8)
    long_sample, short_sample = scoring.sample(model, ("x" * 62, "x"))
    assert len(long_sample["text"]) <= 1  # a prompt of 63 tokens with the begin token
    assert long_sample["prompt"] == "x" * 62 and short_sample["prompt"] == "x"


def test_prompts_of_an_ascii_locale_are_read_as_utf_8(finished):
    """Python keeps the bytes of the command line that it cannot decode as surrogates."""
    model = model_loading.load_model(finished.workdir, 6, 8)
    (sample,) = scoring.sample(model, ("caf\udcc3\udca9",))
    assert sample["prompt"] == "caf\u00e9"


@pytest.mark.parametrize(
    "step, suites, prompts, message",
    [
        (5, ("loss",), (), "--step=5 is not saved in .*; saved: 3, 6"),
        (0, ("lose",), (), "--suite=lose is unknown; suites: loss, .* tasks, compare, verify"),
        (0, ("sample",), ("caf\udce9",), "is not UTF-8"),
        (0, ("sample",), ("x" * 99,), "has 100 tokens"),
    ],
)
def test_evaluation_refuses_bad_arguments(step, suites, prompts, message, finished):
    with pytest.raises(UserError, match=message):
        scoring.evaluate(str(finished.workdir), step, suites, 0, 0, prompts)


def test_evaluation_refuses_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        scoring.evaluate(str(tmp_path), 0, ("loss",), 0, 0, ())


def test_checkpoints_of_another_shape_or_type_are_refused(finished):
    config, workdir, _ = finished
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    shapes = jax.eval_shape(lambda: train_step.init_state(config))
    other_type = shapes._replace(step=jax.ShapeDtypeStruct((), np.float32))
    message = r"checkpoint 6 does not fit the model: step is \[\[\], 'int32'\] in the"
    with pytest.raises(UserError, match=message):
        checkpoints.restore(6, other_type)
    larger = change(config, "moe", router_noise="learned")
    more_arrays = jax.eval_shape(lambda: train_step.init_state(larger))
    with pytest.raises(UserError, match="arrays, but the model has"):
        checkpoints.restore(6, more_arrays)
    checkpoints.close()


def test_diverging_run_stops_with_its_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    config = config_for(corpus, training=dict(steps=12), advanced=dict(max_nonfinite_steps=2))
    make_train_step = train_step.make_train_step

    def make_poisoned_step(config, mesh):
        step = make_train_step(config, mesh)

        def poisoned_step(state, batch):  # from step 4 on, every gradient is NaN
            is_poisoned = state.step >= 4
            factor = jax.numpy.where(is_poisoned, jax.numpy.nan, 1.0)
            poisoned = jax.tree.map(lambda array: array * factor, state.params)
            new_state, results = step(state._replace(params=poisoned), batch)
            params = jax.tree.map(
                lambda new, old: jax.numpy.where(is_poisoned, old, new),
                new_state.params,
                state.params,
            )
            return new_state._replace(params=params), results

        return poisoned_step

    monkeypatch.setattr(train_step, "make_train_step", make_poisoned_step)
    workdir = tmp_path / "run"
    assert loop.train(config, str(workdir)) == ExitCode.DIVERGED
    last_row = run_logs.read_log(workdir / "metrics.jsonl")[-1]
    assert last_row["loss"] is None
    assert last_row["skipped_steps"] == 2
    saved = state_of(workdir, config)
    assert int(saved.step) == 3
    for array in jax.tree.leaves(saved.params):
        assert np.isfinite(array).all()


def test_run_whose_validation_loss_is_not_finite_has_diverged(corpus, tmp_path, capsys):
    """Its logs are JSON, and the same command says the same again."""
    config = config_for(
        corpus,
        model=dict(dtype="bfloat16", num_layers=1),
        training=dict(steps=4, log_every=1),
        optimizer=dict(learning_rate=1e12, final_learning_rate=1e12, warmup_steps=1),
    )
    workdir = tmp_path / "run"
    message = "diverged: the validation loss after the last step, 4, is not finite"
    assert loop.train(config, str(workdir)) == ExitCode.DIVERGED
    assert message in capsys.readouterr().err

    def refuse(constant):
        raise ValueError(constant)

    for name in ("metrics", "routing"):
        for line in (workdir / f"{name}.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    (validation_row,) = read_rows(workdir, "validation")
    assert validation_row["loss"] is None and validation_row["bits_per_byte"] is None
    assert loop.train(config, str(workdir)) == ExitCode.DIVERGED
    output = capsys.readouterr()
    assert message in output.err and "nothing to do" not in output.out
    scoring.evaluate(str(workdir), 0, ("loss", "routing"), 0, 0, ())
    pages.write(str(workdir))
    assert "loss nan nats/token" in (workdir / "report" / "index.html").read_text()


def test_changed_options_of_a_finished_run_are_saved(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    environment = (workdir / "environment.json").read_bytes()
    config = change(finished.config, "evaluation", temperature=0.0)
    config = change(config, "training", steps=4)
    assert loop.train(config, str(workdir)) == ExitCode.FINISHED
    output = capsys.readouterr().out
    assert f"changed in {workdir / 'config.json'}: evaluation.temperature: 0.8 -> 0.0\n" in output
    assert "holds step 6 of 4; nothing to do" in output
    saved = loading.from_saved(json.loads((workdir / "config.json").read_text()))
    # The steps stay those of the training, because the learning rate depends on them.
    assert saved == change(finished.config, "evaluation", temperature=0.0)
    assert (workdir / "environment.json").read_bytes() == environment
    assert loop.train(change(config, "training", steps=6), str(workdir)) == ExitCode.FINISHED
    assert "changed in" not in capsys.readouterr().out


def assert_refused(arguments: list[str], message: str, workdir: pathlib.Path) -> None:
    """Asserts that train.py ends with one line of error and exit code 2, and writes nothing."""
    _, error_output, code = command("train.py", *arguments)
    lines = [line for line in error_output.splitlines() if line.strip()]
    assert code == 2, error_output
    assert len(lines) == 1, error_output
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not workdir.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modle.dim": 8}, "unknown option modle; did you mean model?"),
        ({"model.dimm": 8}, "unknown option model.dimm; did you mean model.dim?"),
        ({"moe": 8}, "moe is a section of options; set one of them, such as moe.num_experts"),
        ({"moe.balancing": 8}, "unknown option moe.balancing; known: num_experts, top_k"),
        ({"model.dim": "wide"}, "dim"),
        ({"moe.widths": "(20,4,12,11)"}, "must sum to"),
        ({"training.batch_size": 3}, "is not divisible by mesh.data=2"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, corpus, tmp_path):
    workdir = tmp_path / "run"
    assert_refused(train_args(corpus, workdir, **options), message, workdir)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/no.py", "--workdir={tmp}/run"], "no.py"),
        (["--config=configs/tiny.py"], "workdir"),
        (["--config=configs/tiny.py:9M"], "configs/tiny.py:9M: this config takes no argument"),
        (["--config=configs/study/dense.py:9M"], "unknown size '9M'; known sizes: 10M"),
        (
            ["--config=configs/tiny.py", "--workdir={tmp}/run", "stray"],
            "unexpected argument 'stray'",
        ),
        (["--config=configs/tiny.py", "--workdir={tmp}/run", "--nonsense=1"], "nonsense"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, tmp_path):
    formatted = [argument.format(tmp=tmp_path) for argument in arguments]
    assert_refused(formatted, message, tmp_path / "run")


@pytest.mark.parametrize(
    "sections, message",
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
def test_impossible_runs_are_refused_before_anything_is_written(
    sections, message, corpus, tmp_path
):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(config_for(corpus, **sections), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_workdirs_with_other_contents_are_refused_and_not_changed(corpus, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name, message in (("file", "is a file"), ("full", "is not empty and holds no run")):
        with pytest.raises(UserError, match=message):
            loop.train(config_for(corpus), str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


# ---- analyses --------------------------------------------------------------------------------


def count_choices(ids_YTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns [layers, K, E]: how often each expert is the k-th choice of a token."""
    is_chosen_YTKE = ids_YTK[..., None] == np.arange(num_experts)
    return is_chosen_YTKE.sum(axis=1)


def trace_all_tokens(run: model_loading.LoadedModel) -> np.ndarray:
    """Returns the experts (layers, tokens, K) of every validation token, predicting or not."""
    score = train_step.jitted_score_step(run.config, run.mesh, trace=True)
    (dataset,) = run.data.datasets
    ids_by_batch = []
    for batch in batching.validation_batches(dataset, 8, run.config.model.vocab_size):
        *_, ids_YBLK = score(run.variables, sharding.shard_batch(run.mesh, batch, 8))
        is_token_BL = batch["segments"][:, :-1] > 0
        ids_by_batch.append(np.asarray(ids_YBLK)[:, is_token_BL])
    return np.concatenate(ids_by_batch, axis=1)


def test_traced_choices_add_up_to_the_routing_statistics(finished):
    """The statistics also count tokens that predict nothing, which a trace leaves out."""
    workdir = str(finished.workdir)
    run = model_loading.load_model(finished.workdir, 0, 8)
    trace = analysis.trace(run, 0, 8)
    result = scoring.evaluate(workdir, 0, ("loss", "routing"), 0, 8, ())
    layers = result["routing"]["layers"]
    counts_YKE = np.array([layer["tokens_per_expert_by_choice"] for layer in layers])
    np.testing.assert_array_equal(count_choices(trace_all_tokens(run), 4), counts_YKE)

    traced = routing_statistics.count_choices(trace, run.config.widths)
    np.testing.assert_array_equal(traced.counts_YKE, count_choices(trace.ids_YTK, 4))
    assert (traced.counts_YKE <= counts_YKE).all()
    predicted = result["loss"]["tokens"]
    assert trace.nll_T.mean() == pytest.approx(result["loss"]["loss"], rel=1e-5)
    assert len(trace.nll_T) == predicted
    assert trace.ids_YTK.shape == (2, predicted, 2)
    np.testing.assert_allclose(trace.gates_YTK.sum(axis=2), 1, atol=1e-5)


def test_analysis_compares_with_a_baseline_and_an_earlier_step(finished, tmp_path):
    """The baseline is a copy of the run itself."""
    workdir = finished.workdir
    baseline = tmp_path / "baseline"
    shutil.copytree(workdir, baseline)
    text = analysis.write(str(workdir), 0, (str(baseline),), 0, 4, 0)
    for words in (
        "moved since step 3",
        "by baseline",
        "by the model itself",
        "neighbours in size",
        "by source: ",
    ):
        assert words in text
    folder = workdir / "report" / "analysis"
    assert {path.name for path in folder.iterdir()} >= {
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
    lines = (folder / "difficult.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    kinds = itertools.product(("entries", "positions"), ("by baseline", "by the model itself"))
    assert {(row[0], row[1]) for row in rows} == set(kinds)
    assert all(float(row[5]) == 0 for row in rows)  # the difference from the baseline
    pages.write(str(workdir))
    assert "analysis/difficult.png" in (workdir / "report" / "index.html").read_text()
    assert "loss of the next" in (folder / "text.html").read_text()


def test_analysis_refuses_a_baseline_with_other_data(finished, tmp_path):
    baseline = tmp_path / "baseline"
    shutil.copytree(finished.workdir, baseline)
    path = baseline / "data" / "card.json"
    card = json.loads(path.read_text())
    card["source"] = "other"
    card["fingerprint"] = data_card.card_fingerprint(card)
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="was prepared with source 'other'"):
        analysis.write(str(finished.workdir), 0, (str(baseline),), 0, 4, 0)


def test_scripts_restart_once_with_large_pages(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        os, "execv", lambda *command: started.append((command, os.environ["GLIBC_TUNABLES"]))
    )
    monkeypatch.setattr(os, "environ", {})
    malloc.use_large_pages()
    malloc.use_large_pages()
    expected_command = (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert started == [(expected_command, malloc.LARGE_PAGES)]
