"""The data of a run must match its config, and mixtures must be consistent."""

import dataclasses

import numpy as np
import pytest

from modse_jax.config.options import TrainingConfig
from modse_jax.data import training_data
from modse_jax.errors import ExitCode, UserError
from modse_jax.training import loop, run_logs
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import prepare_source, random_text


def test_data_that_was_prepared_with_other_options_is_refused(corpus, tmp_path):
    source = f"text:{corpus}"
    training_data.load(tiny_config(data=dict(source=source)), tmp_path)
    other = tiny_config(data=dict(source=source, validation_fraction=0.3))
    with pytest.raises(UserError, match="was prepared with validation_fraction 0.02"):
        training_data.load(other, tmp_path)


def test_the_workdir_is_no_part_of_the_source(corpus, tmp_path):
    """Nor are the validation sets and the logs in it."""
    before = training_data.load(tiny_config(data=dict(source=f"text:{corpus}")), tmp_path / "a")
    workdir = corpus / "run"
    workdir.mkdir()
    (workdir / "train.log").write_text("x" * 5000)
    sets = (("same", f"text:{corpus}"),)
    config = tiny_config(data=dict(source=f"text:{corpus}", validation_sources=sets))
    training_data.check_source(config, workdir)
    data = training_data.load(config, workdir)
    splits = data.datasets[0].card["splits"]
    assert splits == before.datasets[0].card["splits"]
    num_documents = sum(split["documents"] for split in splits.values())
    assert data.validation_sets[0].card["splits"]["validation"]["documents"] == num_documents
    assert data.validation_sets[0].card["passed_over"] == {"of this run": 1}


def test_data_and_config_must_match(prepared, tmp_path):
    def load(tokenizer=prepared.tokenizer.kind, sequence_length=32, **sections):
        data = dict(
            source=f"prepared:{prepared.directory}",
            tokenizer=tokenizer,
            sequence_length=sequence_length,
        )
        sections.setdefault("model", dict(vocab_size=512))
        return training_data.load(tiny_config(data=data, **sections), tmp_path)

    assert load().datasets[0].card == prepared.card
    is_bytes = prepared.tokenizer.kind == "bytes"
    with pytest.raises(UserError, match="does not match"):
        load(tokenizer="sentencepiece" if is_bytes else "bytes")
    with pytest.raises(UserError, match="records of 32 tokens"):
        load(sequence_length=16)
    with pytest.raises(UserError, match="more than model.vocab_size"):
        load(model=dict(vocab_size=64))
    with pytest.raises(UserError, match="fewer than training"):
        load(training=dict(batch_size=10**6))


def mixture_config(*directories, **data):
    """Returns a config that mixes directories in equal shares."""
    mixture = tuple((str(directory), 1.0) for directory in directories)
    return tiny_config(data=dict(sequence_length=64, mixture=mixture, **data))


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 0.0}, "weights must be positive"),
        ({"a": -1.0}, "weights must be positive"),
        ({"a": 1.0, "b": 1e-4}, "none below a thousandth"),
    ],
)
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        tiny_config(data=dict(mixture=tuple(weights.items())))


def test_directory_that_is_mixed_twice_is_refused():
    with pytest.raises(UserError, match="names a directory twice"):
        tiny_config(data=dict(mixture=(("a", 1.0), ("a", 2.0))))


def test_mixtures_of_different_tokenizers_are_refused(tmp_path):
    for name, tokenizer in (("a", "bytes"), ("b", "sentencepiece"), ("c", "sentencepiece")):
        path = tmp_path / f"{name}.txt"
        path.write_text(random_text(ord(name), 80))
        prepare_source(f"text:{path}", tokenizer, tmp_path / name, 64, vocab_size=290)
    config = mixture_config(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="data.tokenizer=bytes does not match"):
        training_data.load(config, tmp_path)
    config = mixture_config(tmp_path / "b", tmp_path / "c", tokenizer="sentencepiece")
    with pytest.raises(UserError, match="prepare them with the same tokenizer"):
        training_data.load(config, tmp_path)


def test_options_that_contradict_prepared_data_are_refused(prepared, tmp_path):
    config = tiny_config(
        data=dict(
            source=f"prepared:{prepared.directory}",
            tokenizer=prepared.tokenizer.kind,
            packing="best_fit",
        ),
        model=dict(vocab_size=512),
    )
    message = "was prepared with packing 'concat', but data.packing='best_fit'"
    with pytest.raises(UserError, match=message):
        training_data.load(config, tmp_path)


def test_check_source_refuses_a_directory_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="is not prepared data"):
        training_data.check_source(mixture_config(tmp_path), tmp_path)


def test_run_on_a_mixture_reports_every_dataset(mixture, tmp_path):
    _, config = mixture
    training = TrainingConfig(batch_size=8, steps=2, log_every=1, checkpoint_every=2)
    config = dataclasses.replace(config, training=training)
    assert loop.train(config, str(tmp_path / "run")) == ExitCode.FINISHED
    rows = run_logs.read_log(tmp_path / "run" / "metrics.jsonl")
    train, validation = rows[1], rows[2]
    assert sum(train["tokens_by_source"].values()) == 2 * 8 * 64 == train["tokens"]
    assert set(train["epochs"]) == {"a", "b", "c"}
    assert 0 <= train["data_wait"] <= 1
    assert set(validation["sources"]) == {"a", "b", "c"}
    losses = [validation["sources"][name]["loss"] for name in "abc"]
    weights = [validation["sources"][name]["tokens"] for name in "abc"]
    assert validation["loss"] == pytest.approx(np.average(losses, weights=weights))
