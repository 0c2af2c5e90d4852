"""The data of a run: one prepared directory, a mixture of several, or text prepared on the fly."""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

from modse_jax.config.options import Config, DataConfig
from modse_jax.data import data_card, prepared_data, sources, tokenizers
from modse_jax.data.prepare import pipeline
from modse_jax.data.prepared_data import Dataset
from modse_jax.errors import UserError

# A larger source must be prepared with its own command, before the run.
MAX_ON_THE_FLY_BYTES = 256 * 2**20

PREPARED_PREFIX = "prepared:"


class TrainingData(NamedTuple):
    """The datasets of a run and the share of training records from each; the shares sum to 1."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, which all datasets have in common."""
        return self.datasets[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all datasets and of their weights."""
        fingerprints = [dataset.card["fingerprint"] for dataset in self.datasets]
        if len(fingerprints) == 1:
            return fingerprints[0]
        text = json.dumps([fingerprints, self.weights])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

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
    for directory in directories:
        data_card.read_card(directory)
    if not directories and not (_on_the_fly_directory(workdir) / data_card.CARD_NAME).exists():
        _check_text_source(config)


def _check_text_source(config: Config) -> None:
    data = config.data
    total_bytes = sources.total_bytes(data.source)
    if total_bytes > MAX_ON_THE_FLY_BYTES:
        raise UserError(
            f"data.source={data.source} has {total_bytes / 2**20:.0f} MiB, too much to prepare on "
            f"the fly; run python -m modse_jax.data.prepare --source={data.source} "
            f"--tokenizer={data.tokenizer} --out=DIR and train with "
            "--config.data.source=prepared:DIR"
        )
    if data.validation_source:
        sources.total_bytes(data.validation_source)
    if data.tokenizer != tokenizers.TRAINED_ON_SOURCE:
        tokenizer = tokenizers.load(data.tokenizer)
        _check_vocabulary(data.tokenizer, tokenizer.vocab_size, config)


def load(config: Config, workdir: pathlib.Path) -> TrainingData:
    """Opens the data of a run. Prepares it into `workdir/data` first if the source is text.

    Raises:
        UserError: the data does not match the config, is damaged, or cannot be prepared. A
            preparation that fails leaves no files.
    """
    directories = _prepared_directories(config.data)
    if directories:
        return _open_all(config, directories)
    directory = _on_the_fly_directory(workdir)
    if (directory / data_card.CARD_NAME).exists():
        _check_options_unchanged(config.data, directory)
        return _open_all(config, [directory])
    new_folders = [path for path in (workdir, *workdir.parents) if not path.exists()]
    pipeline.prepare_data(config.data, directory, config.model.vocab_size, os.cpu_count() or 1)
    try:
        return _open_all(config, [directory])
    except UserError:
        shutil.rmtree(directory)
        for folder in new_folders:
            folder.rmdir()
        raise


def _on_the_fly_directory(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "data"


def _prepared_directories(data: DataConfig) -> list[pathlib.Path]:
    """Returns the prepared directories that the config names; none if the source is text."""
    if data.mixture:
        names = [name for name, _ in data.mixture]
    elif data.source.startswith(PREPARED_PREFIX):
        names = [data.source.removeprefix(PREPARED_PREFIX)]
    else:
        names = []
    return [pathlib.Path(name).expanduser().absolute() for name in names]


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
    return tokenizers.fingerprint(tokenizers.load(option)) == card_fingerprint


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
