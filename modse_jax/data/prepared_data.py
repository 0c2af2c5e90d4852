"""Prepared directories: opening and verifying them, and reading their records."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from modse_jax.data import data_card, record_format, tokenizers
from modse_jax.errors import UserError, describe_exception
from modse_jax.runtime import files, integrity

# Larger data is compared by file size when it is opened. Its reader verifies a hash of each chunk.
MAX_HASHED_BYTES = 2**30

PREPARED_PREFIX = "prepared:"


class Dataset(NamedTuple):
    """One prepared directory.

    Attributes:
        name: name of the directory, which tells the datasets of a mixture apart.
        directory: absolute path.
        card: content of `card.json`; see `data_card`.
        tokenizer: the tokenizer that the records were encoded with.
        splits: {"train", "validation"} -> sequence of records with random access. The training
            split of a validation set is empty.
    """

    name: str
    directory: pathlib.Path
    card: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    splits: dict[str, Sequence[dict]]


def prepared_directory(source: str) -> pathlib.Path | None:
    """Returns the directory of a source `prepared:DIR`; None for a source of text."""
    if not source.startswith(PREPARED_PREFIX):
        return None
    return pathlib.Path(source.removeprefix(PREPARED_PREFIX)).expanduser().absolute()


def open_prepared(directory: pathlib.Path) -> Dataset:
    """Opens a prepared directory and verifies its files against its card.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the data.
    """
    card = data_card.read_card(directory)
    _check_files(directory, card)
    tokenizer_path = directory / data_card.TOKENIZER_NAME
    kind = card["tokenizer"].partition(":")[0]
    tokenizer = tokenizers.deserialize(kind, tokenizer_path.read_bytes(), str(tokenizer_path))
    if tokenizers.fingerprint(tokenizer) != card["tokenizer"]:
        raise UserError(
            f"{tokenizer_path} is not the tokenizer that {data_card.CARD_NAME} names "
            f"({card['tokenizer']})"
        )
    folder = directory / record_format.DATASET_NAME / record_format.DATASET_VERSION
    builder = tfds.builder_from_directory(str(folder))
    splits: dict[str, Sequence[dict]] = {}
    for split in data_card.SPLITS:
        has_records = card["splits"][split]["records"] > 0
        splits[split] = builder.as_data_source(split=split) if has_records else []
    return Dataset(directory.name, directory, card, tokenizer, splits)


def _check_files(directory: pathlib.Path, card: dict[str, Any]) -> None:
    """Raises UserError if the files of a directory are not those of its card."""
    try:
        problem = _find_damage(directory, card["files"])
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"the data in {directory} is damaged: {problem}; prepare it again, or restore it "
            "from a copy"
        )


def _find_damage(directory: pathlib.Path, expected: dict[str, list]) -> str:
    """Returns the first difference between a directory and the {file: [size, hash]} of its card.

    Returns an empty string if there is none.
    """
    found = files.list_files(directory)
    for name in sorted(set(found) ^ {data_card.CARD_NAME, *expected}):
        if name in expected:
            return f"{name} is missing"
        return f"{name} is not part of it"
    has_hashes = sum(size for size, _ in expected.values()) <= MAX_HASHED_BYTES
    for name, entry in expected.items():
        problem = integrity.mismatch(found[name], name, entry, hashes=has_hashes)
        if problem:
            return problem
    return ""


def read_records(
    dataset: Dataset, split: str, ids: Sequence[int], vocab_size: int
) -> dict[str, np.ndarray]:
    """Reads and checks records of a split.

    Args:
        dataset: the dataset to read from.
        split: "train" or "validation".
        ids: numbers of the records.
        vocab_size: size of the model's vocabulary.

    Returns:
        int32 arrays {"tokens", "segments"} [len(ids), sequence_length + 1].

    Raises:
        UserError: a file is damaged, or a record is invalid. The message names the record.
    """
    source = dataset.splits[split]
    origin = f"{split} in {dataset.directory}"
    try:
        records = _read_all(source, ids)
    except Exception as error:  # readers raise many types; all of them mean a damaged file
        reason = describe_exception(error)[:200]
        raise UserError(
            f"record {_first_unreadable(source, ids)} of {origin} cannot be read ({reason}); its "
            "file is damaged: prepare the data again, or restore it from a copy"
        ) from None
    length = dataset.card["sequence_length"] + 1
    batch = record_format.stack_records(records, ids, length, origin)
    record_format.check_records(batch, ids, vocab_size, origin)
    return batch


def _read_all(source: Sequence[dict], ids: Sequence[int]) -> list[dict]:
    if hasattr(source, "__getitems__"):
        return source.__getitems__(list(ids))
    return [source[number] for number in ids]


def _first_unreadable(source: Sequence[dict], ids: Sequence[int]) -> int:
    for number in ids:
        try:
            source[number]
        except Exception:
            return number
    return ids[0]
