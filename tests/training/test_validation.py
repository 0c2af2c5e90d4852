"""Runs with validation sets: the losses of the sets, their macro-average, resuming, evaluation."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
from typing import NamedTuple

import numpy as np
import pytest

from modse_jax.config.options import Config, MeshConfig
from modse_jax.data import data_card
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import model_loading, scoring
from modse_jax.moe.router import RouterStatistics
from modse_jax.report import pages
from modse_jax.training import loop, run_logs, validation
from modse_jax.training.validation import Scored
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import prepare_source, random_text


class RunWithSets(NamedTuple):
    """A finished run, its config, and the folder of its texts."""

    config: Config
    workdir: pathlib.Path
    texts: pathlib.Path


def config_of(texts: pathlib.Path, validation_text: str, *sets: str, steps: int = 4) -> Config:
    """Returns a config that trains on train.txt, with sets of the texts that `sets` names."""
    return tiny_config(
        data=dict(
            source=f"text:{texts}/train.txt",
            validation_source=f"text:{texts}/{validation_text}.txt",
            validation_sources=tuple((name, f"text:{texts}/{name}.txt") for name in sets),
        ),
        training=dict(steps=steps, eval_every=2, checkpoint_every=2),
        mesh=MeshConfig(1),  # one device, for which programs compile faster
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunWithSets:
    """A finished run with two sets, the first of which is also its validation source."""
    root = tmp_path_factory.mktemp("sets")
    for name, seed, size in (("train", 1, 30), ("first", 2, 3), ("second", 3, 6)):
        (root / f"{name}.txt").write_text(random_text(seed, size))
    config = config_of(root, "first", "first", "second")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)  # starting processes takes most of the time
        assert loop.train(config, str(root / "run")) == ExitCode.FINISHED
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return RunWithSets(config, root / "run", root)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """Prepares data in this process, because starting others takes most of the time."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def read_validations(workdir: pathlib.Path) -> list[dict]:
    """Returns the rows of metrics.jsonl for validation."""
    rows = run_logs.read_log(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == "validation"]


def copy_run(finished: RunWithSets, tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a copy of the workdir, which a test may change."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    return workdir


def test_losses_of_sets_equal_those_of_runs_with_that_validation_source(finished, tmp_path):
    """To the last digit. The other run trains on the same data, so its model is the same."""
    rows = read_validations(finished.workdir)
    assert [row["step"] for row in rows] == [2, 4]
    other = config_of(finished.texts, "second")
    assert loop.train(other, str(tmp_path / "other")) == ExitCode.FINISHED
    for row, other_row in zip(rows, read_validations(tmp_path / "other"), strict=True):
        assert set(row["sets"]) == {"first", "second"}
        for name in ("loss", "bits_per_byte", "tokens"):
            assert row["sets"]["first"][name] == row[name]
            assert row["sets"]["second"][name] == other_row[name]
        assert row["sets"]["first"]["loss"] != row["sets"]["second"]["loss"]
        assert not {"sets", "macro_loss"} & set(other_row)


def test_tensorboard_shows_every_set(finished):
    (events,) = (finished.workdir / "tensorboard").glob("events*")
    for tag in ("validation/macro_loss", "validation/sets/second/loss"):
        assert tag.encode() in events.read_bytes()


def test_macro_loss_is_the_unweighted_mean(finished):
    for row in read_validations(finished.workdir):
        first, second = row["sets"]["first"], row["sets"]["second"]
        assert first["tokens"] != second["tokens"]
        assert row["macro_loss"] == (first["loss"] + second["loss"]) / 2


def scored(nats: float, tokens: int) -> Scored:
    """Returns sums over a set, of which each token is a byte."""
    return Scored(
        nats, tokens, float(tokens), RouterStatistics(*[0] * len(RouterStatistics._fields))
    )


def test_macro_loss_by_hand():
    sets = {"a": scored(30.0, 10), "b": scored(4.0, 4), "c": scored(1000.0, 500)}
    summary = validation.summarize_sets(sets, False)
    assert summary["macro_loss"] == 2.0  # (3 + 1 + 2) / 3; over all tokens it would be 2.012
    assert summary["sets"]["b"] == {"loss": 1.0, "bits_per_byte": 1 / np.log(2), "tokens": 4}
    assert validation.summarize_sets({}, False) == {}


def test_macro_loss_does_not_depend_on_the_order_of_the_sets():
    """0.1 + 0.2 + 0.3 rounds differently from 0.3 + 0.2 + 0.1."""
    sets = {str(nats): scored(nats, 1) for nats in (0.1, 0.2, 0.3)}
    backwards = dict(reversed(sets.items()))
    summaries = [validation.summarize_sets(order, False) for order in (sets, backwards)]
    assert summaries[0]["macro_loss"] == summaries[1]["macro_loss"]


def test_best_checkpoint_is_that_of_the_validation_split(finished):
    for row in read_validations(finished.workdir):
        folder = finished.workdir / "checkpoints" / f"{row['step']:08}"
        (meta_path,) = (path for path in folder.rglob("*") if is_metadata(path))
        assert json.loads(meta_path.read_text())["validation_loss"] == row["loss"]


def is_metadata(path: pathlib.Path) -> bool:
    """Returns whether a file of a checkpoint holds the metadata of the run."""
    return path.is_file() and b'"validation_loss"' in path.read_bytes()


def test_evaluation_and_report_show_the_sets(finished):
    shown = []
    result = scoring.evaluate(str(finished.workdir), 0, ("loss",), 0, 8, (), shown.append)
    row = read_validations(finished.workdir)[-1]
    for name in ("first", "second"):
        evaluated = result["loss"]["sets"][name]
        assert evaluated["tokens"] == row["sets"][name]["tokens"]
        assert evaluated["loss"] == pytest.approx(row["sets"][name]["loss"], rel=1e-6)
    assert result["loss"]["macro_loss"] == pytest.approx(row["macro_loss"], rel=1e-6)
    table = "".join(shown).split("validation sets\n")[1]
    second = result["loss"]["sets"]["second"]
    expected = ["second", f"{second['loss']:.4f}", f"{second['bits_per_byte']:.4f}"]
    assert table.splitlines()[2].split() == [*expected, f"{second['tokens']:,}"]
    average = f"{result['loss']['macro_loss']:.4f}"
    assert table.splitlines()[3].split() == ["macro-average", average]

    pages.write(str(finished.workdir))
    report = finished.workdir / "report"
    assert (report / "validation_sets.png").stat().st_size > 5000
    page = (report / "index.html").read_text()
    assert 'src="validation_sets.png"' in page and "macro-average" in page
    facts = page.split("<p>")[1].split("</p>")[0]
    assert "macro_loss" in facts and "{" not in facts


def test_evaluation_with_a_limit_reads_the_first_records_of_every_set(finished):
    result = scoring.evaluate(str(finished.workdir), 2, ("loss",), 5, 8, ())
    for name in ("first", "second"):
        assert 0 < result["loss"]["sets"][name]["tokens"] <= 5 * 32


def test_dropped_tokens_of_every_set_are_counted_if_evaluation_has_a_capacity(finished):
    model = model_loading.load_model(finished.workdir, 0, 8)
    evaluation = dataclasses.replace(model.config.evaluation, capacity_factor=1.0)
    config = dataclasses.replace(model.config, evaluation=evaluation)
    loss = scoring.validate(model._replace(config=config), 0, 8).loss
    assert loss["sets"]["first"]["dropped"] == loss["dropped"] > 0
    assert loss["sets"]["second"]["dropped"] > 0


def test_a_run_resumes_with_its_sets(finished, tmp_path, capsys):
    workdir = copy_run(finished, tmp_path)
    config = config_of(finished.texts, "first", "first", "second", steps=6)
    run = validation.run
    names = []

    def stop_at_second_set(score, params, batches, dataset, whole):
        names.append(dataset.name)
        if dataset.name == "second":
            os.kill(os.getpid(), signal.SIGTERM)
        return run(score, params, batches, dataset, whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "run", stop_at_second_set)
        assert loop.train(config, str(workdir)) == ExitCode.STOPPED
    assert names == ["data", "first", "second"]
    assert [row["step"] for row in read_validations(workdir)] == [2, 4]
    assert loop.train(config, str(workdir)) == ExitCode.FINISHED
    rows = read_validations(workdir)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert set(rows[-1]["sets"]) == {"first", "second"}
    output = capsys.readouterr().out
    assert "validation set second: 1 documents" in output
    assert f"macro-average of 2 sets {rows[-1]['macro_loss']:.4f}" in output


def test_other_sets_are_refused(finished, tmp_path):
    """If the config names others, and if the data of a set is another one."""
    workdir = copy_run(finished, tmp_path)
    fewer = config_of(finished.texts, "first", "first", steps=6)
    with pytest.raises(UserError, match="holds another config .data.validation_sources: "):
        loop.train(fewer, str(workdir))
    directory = workdir / "validation" / "second"
    source = finished.texts / "second.txt"
    fingerprint = data_card.read_card(directory)["fingerprint"]
    shutil.rmtree(directory)
    same = prepare_source(f"text:{source}", "bytes", directory, fraction=1.0)
    assert same["fingerprint"] == fingerprint  # the same text may be prepared again
    text = source.read_text()
    source.write_text(text.replace("a", "b", 1))
    shutil.rmtree(directory)
    prepare_source(f"text:{source}", "bytes", directory, fraction=1.0)
    source.write_text(text)
    message = "validation set 'second' is not the one of checkpoint 4"
    longer = config_of(finished.texts, "first", "first", "second", steps=6)
    with pytest.raises(UserError, match=message):
        loop.train(longer, str(workdir))
    with pytest.raises(UserError, match=message):
        scoring.evaluate(str(workdir), 0, ("loss",), 0, 8, ())


def test_a_mixture_has_sources_and_sets(finished, tmp_path):
    (tmp_path / "other.txt").write_text(random_text(5, 30))
    texts = {"train": finished.texts / "train.txt", "other": tmp_path / "other.txt"}
    for name, path in texts.items():
        prepare_source(f"text:{path}", "bytes", tmp_path / name, fraction=0.5)
    config = tiny_config(
        data=dict(
            mixture=((str(tmp_path / "train"), 1.0), (str(tmp_path / "other"), 1.0)),
            validation_sources=(
                ("of_other", f"prepared:{tmp_path / 'other'}"),
                ("first", f"text:{finished.texts}/first.txt"),
            ),
        ),
        training=dict(steps=2),
        mesh=MeshConfig(1),
    )
    assert loop.train(config, str(tmp_path / "run")) == ExitCode.FINISHED
    (row,) = read_validations(tmp_path / "run")
    assert set(row["sources"]) == {"train", "other"}
    assert set(row["sets"]) == {"of_other", "first"}
    assert row["sets"]["of_other"] == row["sources"]["other"]
    assert row["loss"] == pytest.approx(
        np.average(
            [row["sources"][name]["loss"] for name in ("train", "other")],
            weights=[row["sources"][name]["tokens"] for name in ("train", "other")],
        )
    )
    assert row["macro_loss"] == (row["sets"]["of_other"]["loss"] + row["sets"]["first"]["loss"]) / 2
    assert not (tmp_path / "other" / "validation").exists()


def test_a_set_without_documents_is_refused_before_anything_is_written(finished, tmp_path):
    """That is found when the set is prepared, after the training data."""
    (tmp_path / "blank.txt").write_text("")
    sets = (("blank", f"text:{tmp_path}/blank.txt"),)
    config = dataclasses.replace(
        finished.config, data=dataclasses.replace(finished.config.data, validation_sources=sets)
    )
    with pytest.raises(UserError, match="validation set 'blank' .* has no document that is not"):
        loop.train(config, str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()
