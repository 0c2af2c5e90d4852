"""Last step of a preparation: makes the finished directory from the working directory."""

import contextlib
import json
import os
import pathlib
import shutil
from typing import Any

import tensorflow_datasets as tfds

from modse_jax.data import data_card, record_format, tokenizers
from modse_jax.data.prepare.encoding import EncodedData
from modse_jax.data.prepare.working_directory import TEMPORARY_NAMES, WorkingDirectory
from modse_jax.runtime import files, integrity

DATASET_NAME = record_format.DATASET_NAME


def publish(
    directory: WorkingDirectory,
    out: pathlib.Path,
    encoded: EncodedData,
    encoder: tokenizers.Tokenizer,
) -> dict[str, Any]:
    """Writes the dataset's metadata and the card, and renames the working directory to `out`.

    The rename is the last step, so `out` appears only when it is complete.

    Args:
        directory: the working directory, in which all records have been written.
        out: the finished directory.
        encoded: the results of the second pass.
        encoder: the tokenizer.

    Returns:
        The card, the description of the data, with the hashes of all files.
    """
    card = encoded.card
    _write_dataset(directory, card, encoded.shard_lengths)
    directory.tokenizer_path.write_bytes(encoder.serialize())
    card["files"] = {
        name: entry
        for name, entry in integrity.manifest_entries(directory.path).items()
        if name.split("/")[0] not in TEMPORARY_NAMES
    }
    card["fingerprint"] = data_card.card_fingerprint(card)
    text = json.dumps(card, indent=2) + "\n"
    files.write_atomically(directory.path / data_card.CARD_NAME, text)
    directory.remove_temporary_files()
    with contextlib.suppress(FileNotFoundError):
        out.rmdir()
    directory.path.rename(out)
    return card


def _write_dataset(
    directory: WorkingDirectory, card: dict[str, Any], shard_lengths: dict[str, list[int]]
) -> None:
    """Makes a TFDS dataset of the shards, the files of records that the second pass wrote.

    The shards are linked under the names that TFDS expects, and TFDS's metadata is written.
    """
    shutil.rmtree(directory.path / DATASET_NAME, ignore_errors=True)
    folder = directory.path / DATASET_NAME / record_format.DATASET_VERSION
    folder.mkdir(parents=True)
    split_infos = []
    for split in data_card.SPLITS:
        # TFDS does not accept a split without records, as the training split of a validation set.
        if any(shard_lengths[split]):
            split_infos.append(_link_shards(directory, folder, split, shard_lengths[split]))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        split_infos=split_infos,
        check_data=False,
        features=record_format.record_features(card["sequence_length"] + 1, card["vocab_size"]),
    )


def _link_shards(
    directory: WorkingDirectory, folder: pathlib.Path, split: str, lengths: list[int]
) -> tfds.core.SplitInfo:
    """Links the shards of a split under TFDS's names; returns the TFDS description of the split.

    Shards without records are left out. `lengths` is the number of records of each shard.
    """
    part_numbers = [number for number, length in enumerate(lengths) if length]
    num_shards = len(part_numbers)
    for shard, part_number in enumerate(part_numbers):
        name = f"{DATASET_NAME}-{split}.array_record-{shard:05}-of-{num_shards:05}"
        os.link(directory.shard_path(split, part_number), folder / name)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=DATASET_NAME,
        split=split,
        filetype_suffix="array_record",
    )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[lengths[number] for number in part_numbers],
        num_bytes=0,
        filename_template=template,
    )
