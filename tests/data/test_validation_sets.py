"""Validation sets are prepared like the training data, and bad ones leave nothing behind."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from modse_jax.config.options import Config
from modse_jax.data import data_card, inspect, prepared_data, training_data
from modse_jax.data.prepare import command_line, pipeline
from modse_jax.data.training_data import TrainingData
from modse_jax.errors import UserError
from modse_jax.training import workdir_checks
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import prepare_source, random_text


@pytest.fixture
def texts(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with three texts: one to train on, and two for validation sets."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, seed, size in (("train", 1, 60), ("first", 2, 9), ("second", 3, 20)):
        (folder / f"{name}.txt").write_text(random_text(seed, size))
    return folder


def config_with_sets(texts: pathlib.Path, *sets: tuple[str, str], **data) -> Config:
    """Returns a config that trains on train.txt. The source of a set may name `{texts}`."""
    sources = tuple((name, source.format(texts=texts)) for name, source in sets)
    data.setdefault("source", f"text:{texts}/train.txt")
    return tiny_config(data=dict(validation_sources=sources, **data), model=dict(vocab_size=512))


FIRST = ("first", "text:{texts}/first.txt")
SECOND = ("second", "text:{texts}/second.txt")


def assert_same_validation(dataset: prepared_data.Dataset, other: prepared_data.Dataset) -> None:
    """Asserts that the validation splits of two datasets hold the same records."""
    records, others = dataset.splits["validation"], other.splits["validation"]
    assert len(records) == len(others) > 0
    for record, other_record in zip(records, others):
        for name in ("tokens", "segments"):
            np.testing.assert_array_equal(record[name], other_record[name])


@pytest.mark.parametrize("tokenizer, packing", [("bytes", "concat"), ("sentencepiece", "best_fit")])
def test_a_set_holds_the_records_of_a_validation_source(
    tokenizer, packing, texts, tmp_path, monkeypatch
):
    """All of it is validation, with the tokenizer and the packing of the training data."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # starting processes takes most of the time
    config = config_with_sets(
        texts,
        FIRST,
        SECOND,
        validation_source=f"text:{texts}/first.txt",
        tokenizer=tokenizer,
        packing=packing,
    )
    data = training_data.load(config, tmp_path / "run")
    first, second = data.validation_sets
    assert [first.name, second.name] == ["first", "second"]
    assert_same_validation(first, data.datasets[0])
    assert first.card["tokenizer"] == second.card["tokenizer"] == data.datasets[0].card["tokenizer"]
    assert first.card["packing"] == packing
    assert len(first.splits["train"]) == first.card["splits"]["train"]["documents"] == 0
    num_bytes = len(random_text(3, 20).encode())
    assert second.card["splits"]["validation"]["bytes"] == num_bytes
    # Opened again, and without their sources, they are the same.
    shutil.rmtree(texts)
    training_data.check_source(config, tmp_path / "run")
    again = training_data.load(config, tmp_path / "run")
    assert again.set_fingerprints == data.set_fingerprints


def test_sets_of_a_mixture_are_prepared_like_its_first_directory(mixture, texts, tmp_path):
    a, b, _ = (dataset.directory for dataset in mixture[0].datasets)
    source = f"text:{texts}/first.txt"
    train = f"text:{texts}/train.txt"
    prepare_source(train, "bytes", tmp_path / "d", 64, packing="best_fit", fraction=0.5)
    directories = ((str(tmp_path / "d"), 1.0), (str(a), 1.0))
    sets = (("first", source), ("of_b", f"prepared:{b}"))
    config = tiny_config(
        data=dict(sequence_length=64, mixture=directories, validation_sources=sets)
    )
    training_data.check_source(config, tmp_path / "run")
    data = training_data.load(config, tmp_path / "run")
    first, of_b = data.validation_sets
    assert first.card["packing"] == "best_fit"
    assert first.directory == tmp_path / "run" / "validation" / "first"
    assert_same_validation(of_b, prepared_data.open_prepared(b))
    without = tiny_config(data=dict(sequence_length=64, mixture=directories))
    assert training_data.load(without, tmp_path / "other").fingerprint == data.fingerprint


def test_a_set_that_changes_changes_its_fingerprint_alone(texts, tmp_path):
    config = config_with_sets(texts, FIRST, SECOND)
    before = training_data.load(config, tmp_path / "before")
    (texts / "first.txt").write_text(random_text(4, 9))
    after = training_data.load(config, tmp_path / "after")
    assert before.fingerprint == after.fingerprint
    assert before.set_fingerprints["first"] != after.set_fingerprints["first"]
    assert before.set_fingerprints["second"] == after.set_fingerprints["second"]


def test_a_killed_preparation_resumes_with_the_missing_set(texts, tmp_path, monkeypatch):
    config = config_with_sets(texts, FIRST, SECOND)
    expected = training_data.load(config, tmp_path / "straight")
    workdir = tmp_path / "killed"
    prepare = pipeline.prepare_data

    def stop_at_second(data, out, *arguments, **options):
        if out.name == "second":
            raise KeyboardInterrupt
        return prepare(data, out, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepare_data", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            training_data.load(config, workdir)
    workdir_checks.check_workdir(workdir, config)  # it may resume there
    card_of_first = workdir / "validation" / "first" / data_card.CARD_NAME
    written = card_of_first.stat().st_mtime_ns
    data = training_data.load(config, workdir)
    assert card_of_first.stat().st_mtime_ns == written
    assert data.set_fingerprints == expected.set_fingerprints


def load_and_expect(config: Config, workdir: pathlib.Path, message: str) -> None:
    """Loads the data, expects the message in a UserError, and that nothing has been written."""
    root = workdir.parent.parent
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message) as raised:
        training_data.check_source(config, workdir)
        training_data.load(config, workdir)
    assert "\n" not in str(raised.value)
    assert "validation set 'bad' of data.validation_sources: " in str(raised.value)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "source, message",
    [
        ("text:{texts}/missing.txt", "has no files"),
        ("nonsense", "must be text:PATH"),
        ("text:{texts}/blank.txt", "has no document that is not empty"),
        ("prepared:{texts}", "is not prepared data"),
        ("jsonl:{texts}/first.txt", "is not JSON: Expecting value"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing(source, message, texts, tmp_path):
    (texts / "blank.txt").write_text("")
    config = config_with_sets(texts, FIRST, ("bad", source))
    load_and_expect(config, tmp_path / "new" / "run", message)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_sets_with_another_tokenizer_or_length_are_refused(is_prepared, texts, tmp_path):
    """The same if the training data was prepared before, and if the run is to prepare it."""
    second = f"text:{texts}/second.txt"
    prepare_source(second, "sentencepiece", tmp_path / "pieces", vocab_size=300)
    prepare_source(second, "bytes", tmp_path / "short", 16)
    data = {}
    if is_prepared:
        prepare_source(f"text:{texts}/train.txt", "bytes", tmp_path / "train")
        data["source"] = f"prepared:{tmp_path / 'train'}"
    for name, message in (
        ("pieces", "prepared with the tokenizer sentencepiece:.*, but the run's is bytes:"),
        ("short", "has records of 16 tokens, but data.sequence_length=32"),
    ):
        config = config_with_sets(texts, ("bad", f"prepared:{tmp_path / name}"), **data)
        with pytest.raises(UserError, match=message):
            training_data.check_source(config, tmp_path / "run")
        load_and_expect(config, tmp_path / "new" / "run", message)


def test_a_set_for_a_tokenizer_that_is_trained_by_the_run_is_refused_after_training(
    texts, tmp_path
):
    """Before, nobody knows the tokenizer; what was prepared by then is removed."""
    second = f"text:{texts}/second.txt"
    prepare_source(second, "sentencepiece", tmp_path / "pieces", vocab_size=300)
    config = config_with_sets(
        texts, FIRST, ("bad", f"prepared:{tmp_path / 'pieces'}"), tokenizer="sentencepiece"
    )
    load_and_expect(config, tmp_path / "new" / "run", "prepared with the tokenizer sentencepiece:")


def test_large_sets_are_refused_with_the_command_that_prepares_them(texts, tmp_path, monkeypatch):
    limit = (texts / "train.txt").stat().st_size
    (texts / "large.txt").write_text(random_text(2, 61))
    monkeypatch.setattr(pipeline, "MAX_ON_THE_FLY_BYTES", limit)
    config = config_with_sets(texts, ("bad", "text:{texts}/large.txt"))
    command = f"--source=text:{texts}/large.txt --tokenizer=bytes --sequence_length=32 --validation"
    load_and_expect(config, tmp_path / "new" / "run", command)


def test_a_set_that_was_prepared_from_another_source_is_refused(texts, tmp_path):
    training_data.load(config_with_sets(texts, FIRST), tmp_path / "run")
    config = config_with_sets(texts, ("first", SECOND[1]))
    with pytest.raises(
        UserError, match="was prepared with source .*first.txt', but this run needs"
    ):
        training_data.load(config, tmp_path / "run")
    assert (tmp_path / "run" / "validation" / "first" / data_card.CARD_NAME).exists()


@pytest.mark.parametrize(
    "names, message",
    [
        (("",), "'' is not a name for a set"),
        (("a/b",), "'a/b' is not a name"),
        (("..",), "'..' is not a name"),
        (("a.partial",), "'a.partial' is not a name"),
        (("-a",), "'-a' is not a name"),
        (("a\n",), "is not a name"),
        (("a" * 65,), "is not a name"),
        (("wiki", "Wiki"), "the name 'Wiki' is used twice"),
    ],
)
def test_bad_names_are_refused(names, message):
    sources = tuple((name, "python_stdlib") for name in names)
    with pytest.raises(UserError, match=message):
        tiny_config(data=dict(validation_sources=sources))


def test_names_of_the_study_are_allowed():
    sources = (("c4_en", "python_stdlib"), ("dolma_common-crawl", "python_stdlib"))
    tiny_config(data=dict(validation_sources=sources))


@pytest.fixture
def prepared_set(texts: pathlib.Path, tmp_path: pathlib.Path, capsys) -> pathlib.Path:
    """A validation set that the command `prepare` made."""
    command_line.main(
        [
            f"--source=text:{texts}/first.txt",
            "--tokenizer=bytes",
            "--sequence_length=32",
            "--validation_fraction=1",
            f"--out={tmp_path / 'set'}",
        ]
    )
    assert "train: 0 documents" in capsys.readouterr().out
    return tmp_path / "set"


def test_a_set_prepared_by_the_command_is_the_one_that_a_run_prepares(
    prepared_set, texts, tmp_path
):
    sets = (FIRST, ("same", f"prepared:{prepared_set}"))
    data: TrainingData = training_data.load(config_with_sets(texts, *sets), tmp_path / "run")
    first, same = data.validation_sets
    assert same.name == "same"
    assert first.card == same.card


def test_a_validation_set_is_not_trained_on(prepared_set, texts, tmp_path):
    prepare_source(f"text:{texts}/train.txt", "bytes", tmp_path / "train")
    mixture = ((str(tmp_path / "train"), 1.0), (str(prepared_set), 1.0))
    for data in (dict(mixture=mixture), dict(source=f"prepared:{prepared_set}")):
        with pytest.raises(UserError, match="set has no training records"):
            training_data.load(tiny_config(data=data), tmp_path / "run")


def test_inspect_shows_the_only_split_of_a_validation_set(prepared_set, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect.main([f"--data={prepared_set}", f"--out={tmp_path}"])
    assert stop.value.code == 2
    assert "--split=train: " in capsys.readouterr().err
    inspect.main([f"--data={prepared_set}", "--split=validation", f"--out={tmp_path}"])
    assert "---- record 0 of validation" in capsys.readouterr().out


def test_a_tokenizer_cannot_be_trained_on_a_validation_set(texts, tmp_path):
    with pytest.raises(UserError, match="tokenizer=sentencepiece is trained on training documents"):
        prepare_source(f"text:{texts}/first.txt", "sentencepiece", tmp_path / "set", fraction=1.0)
    assert not (tmp_path / "set").exists()
