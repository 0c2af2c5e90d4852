"""Validation sets of a run (`data.validation_sources`), each of which has its own loss.

The validation split of a prepared directory is a set. A set that is text is prepared into
`WORKDIR/validation/NAME` when the run starts: as the training data is (of a mixture, its first
directory), with the same tokenizer and options, but all of its documents are for validation.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from modse_jax.config.options import DataConfig
from modse_jax.data import data_card, prepared_data, sources, tokenizers
from modse_jax.data.prepare import pipeline
from modse_jax.data.prepared_data import Dataset
from modse_jax.errors import UserError

FOLDER = "validation"  # of a workdir, with a directory for each set that is prepared on the fly


def on_the_fly_directory(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the directory into which a set is prepared if its source is text."""
    return workdir / FOLDER / name


def check_sources(data: DataConfig, workdir: pathlib.Path, tokenizer: str) -> None:
    """Checks that `load` will find every set, before anything is written.

    Args:
        data: the data section of a config.
        workdir: the directory of the run.
        tokenizer: fingerprint of the tokenizer of the run; "" if it is yet to be trained.

    Raises:
        UserError: a source does not exist, is too large to prepare on the fly, or was prepared
            with another tokenizer or sequence length.
    """
    for name, source in data.validation_sources:
        with _name_set_in_errors(name):
            _check_source(data, workdir, name, source, tokenizer)


def _check_source(
    data: DataConfig, workdir: pathlib.Path, name: str, source: str, tokenizer: str
) -> None:
    directory = prepared_data.prepared_directory(source)
    if directory is not None:
        card = data_card.read_card(directory)
        _check_card(card, directory, tokenizer or card["tokenizer"], data.sequence_length)
        return
    if (on_the_fly_directory(workdir, name) / data_card.CARD_NAME).exists():
        return
    total_bytes = sources.total_bytes(source, excluded=[workdir])
    if total_bytes > pipeline.MAX_ON_THE_FLY_BYTES:
        is_trained = data.tokenizer == tokenizers.TRAINED_ON_SOURCE
        spec = f"{data.tokenizer}:FILE" if is_trained else data.tokenizer
        raise UserError(
            f"{source} has {total_bytes / 2**20:.0f} MiB, too much to prepare on the fly; run "
            f"python -m modse_jax.data.prepare --source={source} --tokenizer={spec} "
            f"--sequence_length={data.sequence_length} --validation_fraction=1 --out=DIR and name "
            "prepared:DIR as its source"
        )


def _check_card(
    card: dict[str, Any], directory: pathlib.Path, tokenizer: str, sequence_length: int
) -> None:
    """Raises UserError if a set does not have the run's tokenizer and sequence length."""
    if card["tokenizer"] != tokenizer:
        raise UserError(
            f"{directory} was prepared with the tokenizer {card['tokenizer']}, but the run's is "
            f"{tokenizer}; prepare it again with the tokenizer of the run"
        )
    if card["sequence_length"] != sequence_length:
        raise UserError(
            f"{directory} has records of {card['sequence_length']} tokens, but "
            f"data.sequence_length={sequence_length}; prepare it again with this length"
        )


def load(data: DataConfig, workdir: pathlib.Path, training: Dataset) -> tuple[Dataset, ...]:
    """Opens the validation sets, in the order of the config. A set of text is prepared first.

    Args:
        data: the data section of a config.
        workdir: the directory of the run.
        training: a dataset that the run trains on; its tokenizer and options prepare the sets.

    Raises:
        UserError: a set cannot be prepared, is damaged, or does not match the run.
    """
    sets = []
    for name, source in data.validation_sources:
        with _name_set_in_errors(name):
            directory = prepared_data.prepared_directory(source)
            if directory is None:
                directory = on_the_fly_directory(workdir, name)
                _prepare(source, directory, workdir, training)
            dataset = prepared_data.open_prepared(directory)
            expected = training.card
            _check_card(dataset.card, directory, expected["tokenizer"], expected["sequence_length"])
            sets.append(dataset._replace(name=name))
    return tuple(sets)


def _prepare(
    source: str, directory: pathlib.Path, workdir: pathlib.Path, training: Dataset
) -> None:
    """Prepares a set of text, or checks the options with which it has been prepared already."""
    options = _preparation_options(source, training.card)
    if not (directory / data_card.CARD_NAME).exists():
        vocab_size = training.tokenizer.vocab_size
        workers = os.cpu_count() or 1
        pipeline.prepare_data(
            options, directory, vocab_size, workers, training.tokenizer, excluded=[workdir]
        )
        return
    card = data_card.read_card(directory)
    for name in data_card.PREPARATION_OPTIONS:
        if name in ("tokenizer", "sequence_length"):
            continue  # checked with the card of any set
        if card[name] != getattr(options, name):
            raise UserError(
                f"{directory} was prepared with {name} {card[name]!r}, but this run needs "
                f"{getattr(options, name)!r}; use another --workdir, or remove {directory}"
            )


def _preparation_options(source: str, card: dict[str, Any]) -> DataConfig:
    """Returns the options of a set, from the card of the training data."""
    kind = card["tokenizer"].partition(":")[0]
    inherited = {name: card[name] for name in data_card.PREPARATION_OPTIONS if name != "tokenizer"}
    return DataConfig(
        **{
            **inherited,
            "source": source,
            "validation_source": "",
            "validation_fraction": 1.0,
            # The tokenizer itself is passed to the preparation. The card shows this in the command
            # that makes the set again, where FILE is the tokenizer of the run.
            "tokenizer": kind if kind == "bytes" else f"{kind}:FILE",
        }
    )


@contextlib.contextmanager
def _name_set_in_errors(name: str) -> Iterator[None]:
    """Puts the name of a set in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"validation set {name!r} of data.validation_sources: {error}") from None
