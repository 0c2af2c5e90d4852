"""The data of a run: one prepared directory, a mixture of several, or text prepared on the fly."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from modse_jax.config.options import Config, DataConfig
from modse_jax.data import data_card, prepared_data, sources, tokenizers, validation_sets
from modse_jax.data.prepare import pipeline
from modse_jax.data.prepared_data import Dataset
from modse_jax.errors import UserError


class TrainingData(NamedTuple):
    """The data of a run.

    Attributes:
        datasets: the prepared directories that the run trains on.
        weights: the share of training records from each; the shares sum to 1.
        validation_sets: further data that only the validation reads; see `validation_sets`.
        has_independent_seeds: True if the orders of the datasets of a mixture are drawn with
            independent seeds; False for runs that began with an older version.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]
    validation_sets: tuple[Dataset, ...] = ()
    has_independent_seeds: bool = True

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, which all datasets have in common."""
        return self.datasets[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all datasets and of their weights, without validation sets."""
        fingerprints = [dataset.card["fingerprint"] for dataset in self.datasets]
        if len(fingerprints) == 1:
            return fingerprints[0]
        text = json.dumps([fingerprints, self.weights])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def set_fingerprints(self) -> dict[str, str]:
        """{name: hash of its content} of every validation set."""
        return {dataset.name: dataset.card["fingerprint"] for dataset in self.validation_sets}

    @property
    def training_bytes_per_token(self) -> float:
        """Bytes of text per predicted training token, averaged with the weights of the mixture."""
        total = 0.0
        for weight, dataset in zip(self.weights, self.datasets):
            counts = dataset.card["splits"]["train"]
            total += weight * counts["bytes"] / counts["tokens"]
        return total


def check_source(config: Config, workdir: pathlib.Path) -> None:
    """Checks that `load` will find its data, before anything is written.

    Raises:
        UserError: the data does not exist, is too large to prepare on the fly, or its tokenizer
            has more ids than the model.
    """
    directories = _prepared_directories(config.data)
    on_the_fly = _on_the_fly_directory(workdir)
    if not directories and (on_the_fly / data_card.CARD_NAME).exists():
        directories = [on_the_fly]
    cards = [data_card.read_card(directory) for directory in directories]
    tokenizer = cards[0]["tokenizer"] if cards else _check_text_source(config, workdir)
    validation_sets.check_sources(config.data, workdir, tokenizer)


def _check_text_source(config: Config, workdir: pathlib.Path) -> str:
    """Checks a source of text; returns the tokenizer's fingerprint, "" if it is not trained yet."""
    data = config.data
    total_bytes = sources.total_bytes(data.source, excluded=[workdir])
    if total_bytes > pipeline.MAX_ON_THE_FLY_BYTES:
        raise UserError(
            f"data.source={data.source} has {total_bytes / 2**20:.0f} MiB, too much to prepare on "
            f"the fly; run python -m modse_jax.data.prepare --source={data.source} "
            f"--tokenizer={data.tokenizer} --out=DIR and train with "
            "--config.data.source=prepared:DIR"
        )
    if data.validation_source:
        sources.total_bytes(data.validation_source, excluded=[workdir])
    if data.tokenizer == tokenizers.TRAINED_ON_SOURCE:
        return ""
    tokenizer = tokenizers.load(data.tokenizer)
    _check_vocabulary(data.tokenizer, tokenizer.vocab_size, config)
    return tokenizers.fingerprint(tokenizer)


def load(config: Config, workdir: pathlib.Path) -> TrainingData:
    """Opens the data of a run. What is text is prepared first, into directories of the workdir.

    Raises:
        UserError: the data does not match the config, is damaged, or cannot be prepared. Nothing
            that this call has prepared remains.
    """
    on_the_fly = _on_the_fly_directory(workdir)
    set_directories = [
        validation_sets.on_the_fly_directory(workdir, name)
        for name, _ in config.data.validation_sources
    ]
    with _remove_after_bad_input([on_the_fly, *set_directories]):
        directories = _prepared_directories(config.data)
        if not directories:
            _prepare_text_source(config, workdir)
            directories = [on_the_fly]
        data = _open_all(config, directories)
        sets = validation_sets.load(config.data, workdir, data.datasets[0])
        return data._replace(validation_sets=sets)


@contextlib.contextmanager
def _remove_after_bad_input(directories: Sequence[pathlib.Path]) -> Iterator[None]:
    """Removes the directories that the block makes, and their new parents, after a UserError."""
    new = [path for path in directories if not path.exists() or _is_empty_directory(path)]
    parents = {parent for path in new for parent in path.parents if not parent.exists()}
    try:
        yield
    except UserError:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        for parent in sorted(parents, reverse=True):  # a folder comes before the one it is in
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _is_empty_directory(path: pathlib.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _prepare_text_source(config: Config, workdir: pathlib.Path) -> None:
    """Prepares the source, or checks the options with which it has been prepared already."""
    directory = _on_the_fly_directory(workdir)
    if (directory / data_card.CARD_NAME).exists():
        _check_options_unchanged(config.data, directory)
        return
    pipeline.prepare_data(
        config.data,
        directory,
        config.model.vocab_size,
        os.cpu_count() or 1,
        excluded=[workdir],
    )


def _on_the_fly_directory(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "data"


def _prepared_directories(data: DataConfig) -> list[pathlib.Path]:
    """Returns the prepared directories that the config names; none if the source is text."""
    if data.mixture:
        return [pathlib.Path(name).expanduser().absolute() for name, _ in data.mixture]
    directory = prepared_data.prepared_directory(data.source)
    return [] if directory is None else [directory]


def _check_options_unchanged(data: DataConfig, directory: pathlib.Path) -> None:
    """Raises UserError if data that was prepared on the fly was prepared with other options."""
    card = data_card.read_card(directory)
    for name in data_card.PREPARATION_OPTIONS:
        if name in ("tokenizer", "sequence_length"):
            continue  # checked with the card of any data
        if card[name] != getattr(data, name):
            raise UserError(
                f"{directory} was prepared with {name} {card[name]!r}, but data.{name}="
                f"{getattr(data, name)!r}; use another --workdir, or remove {directory}"
            )


def _open_all(config: Config, directories: list[pathlib.Path]) -> TrainingData:
    """Opens prepared directories and checks that they match the config and each other."""
    datasets = _with_unique_names([prepared_data.open_prepared(path) for path in directories])
    first = datasets[0]
    for dataset in datasets:
        _check_dataset(config, dataset)
        if dataset.card["tokenizer"] != first.card["tokenizer"]:
            raise UserError(
                f"data.mixture: {dataset.directory} was prepared with {dataset.card['tokenizer']}, "
                f"{first.directory} with {first.card['tokenizer']}; prepare them with the same "
                "tokenizer"
            )
        if not dataset.card["splits"]["train"]["records"]:
            raise UserError(
                f"{dataset.directory} has no training records, because it was prepared as a "
                "validation set; name it in data.validation_sources, or choose other data to train "
                "on"
            )
    num_records = sum(len(dataset.splits["train"]) for dataset in datasets)
    if num_records < config.training.batch_size:
        raise UserError(
            f"{first.directory} has {num_records} training records, fewer than training.batch_size="
            f"{config.training.batch_size}; give more text or choose a smaller batch"
        )
    weights = [weight for _, weight in config.data.mixture] or [1.0]
    total_weight = sum(weights)
    return TrainingData(tuple(datasets), tuple(weight / total_weight for weight in weights))


def _with_unique_names(datasets: list[Dataset]) -> list[Dataset]:
    """Names datasets by their paths if two directories have the same name."""
    names = {dataset.name for dataset in datasets}
    if len(names) == len(datasets):
        return datasets
    return [dataset._replace(name=str(dataset.directory)) for dataset in datasets]


def _check_dataset(config: Config, dataset: Dataset) -> None:
    """Raises UserError if a dataset does not match the config."""
    data = config.data
    card = dataset.card
    if card["sequence_length"] != data.sequence_length:
        raise UserError(
            f"{dataset.directory} has records of {card['sequence_length']} tokens, but "
            f"data.sequence_length={data.sequence_length}"
        )
    if not _is_tokenizer_of(data.tokenizer, card["tokenizer"]):
        raise UserError(
            f"data.tokenizer={data.tokenizer} does not match {dataset.directory}, prepared with "
            f"{card['tokenizer']}"
        )
    if _prepared_directories(data):
        _check_preparation_options(data, dataset.directory, card)
    _check_vocabulary(str(dataset.directory), card["vocab_size"], config)


def _is_tokenizer_of(option: str, card_fingerprint: str) -> bool:
    """Returns whether the option data.tokenizer may be used with data of another fingerprint."""
    if option == tokenizers.TRAINED_ON_SOURCE:
        return card_fingerprint.partition(":")[0] == option
    return tokenizers.fingerprint(tokenizers.read(option)) == card_fingerprint


def _check_preparation_options(
    data: DataConfig, directory: pathlib.Path, card: dict[str, Any]
) -> None:
    """Raises UserError for an option that was decided differently when the data was prepared.

    An option that has its default value is not checked, since the user may not have set it.
    """
    default = DataConfig()
    for name in data_card.PREPARATION_OPTIONS:
        if name in ("source", "tokenizer", "sequence_length"):
            continue
        value = getattr(data, name)
        if value not in (getattr(default, name), card[name]):
            raise UserError(
                f"{directory} was prepared with {name} {card[name]!r}, but data.{name}={value!r}; "
                "prepare it with this value, or leave the option out"
            )


def _check_vocabulary(name: str, num_ids: int, config: Config) -> None:
    if num_ids > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has {num_ids} ids, more than model.vocab_size="
            f"{config.model.vocab_size}"
        )
