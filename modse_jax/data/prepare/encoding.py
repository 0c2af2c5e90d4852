"""Second pass of a preparation: tokenizes the documents and writes them as records.

A record is a fixed number of tokens. Each part of the source (a range that one process reads) is
written to files of its own, one for each split, which are called shards.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from modse_jax.config.options import DataConfig
from modse_jax.data import data_card, packing, record_format, tokenizers
from modse_jax.data.prepare import scanning, worker_pool
from modse_jax.data.prepare.scanning import ScanResult, SplitDocument
from modse_jax.data.prepare.working_directory import WorkingDirectory
from modse_jax.data.sources import Part
from modse_jax.errors import UserError
from modse_jax.runtime import files

BATCH_BYTES = 1 << 20  # bytes of text that are tokenized together

SAMPLED_DOCUMENTS = 100_000  # documents whose sizes are recorded to compare both packings

MIN_SAMPLED_DOCUMENTS = 20  # at least this many from each part

ARRAY_RECORD_OPTIONS = "group_size:1,zstd:1"  # single records can be read without their neighbors

# The fields of SplitCounts that are summed over the parts for the card.
COUNTS = ("documents", "bytes", "tokens", "records", "padding")


@dataclasses.dataclass
class SplitCounts:
    """Counts of one split in one part of the source.

    Attributes:
        documents: number of documents.
        bytes: bytes of their text.
        tokens: predicted tokens: all tokens of a document except its first.
        records: number of records.
        padding: padding tokens in these records.
        sha256: hash of the text of the documents.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    records: int = 0
    padding: int = 0
    sha256: str = ""


@dataclasses.dataclass
class EncodedPart:
    """Results of the second pass over one part of the source.

    Attributes:
        train, validation: counts of each split.
        sizes: the number of tokens of some documents, a sample to compare packings with.
    """

    train: SplitCounts
    validation: SplitCounts
    sizes: list[int]

    @property
    def documents(self) -> int:
        """Number of documents in both splits."""
        return self.train.documents + self.validation.documents


class EncodedData(NamedTuple):
    """Results of the second pass.

    Attributes:
        card: the description of the data, card.json, still without the hashes of files.
        shard_lengths: {split: number of records in the shard of each part}.
    """

    card: dict[str, Any]
    shard_lengths: dict[str, list[int]]


class SerializedTokenizer(NamedTuple):
    """A tokenizer as bytes, which can be sent to worker processes."""

    kind: str
    model: bytes


def encode_documents(
    data: DataConfig,
    parts: list[Part],
    scan: ScanResult,
    encoder: tokenizers.Tokenizer,
    directory: WorkingDirectory,
    workers: int,
) -> EncodedData:
    """Tokenizes all documents and writes their records, in several processes.

    Args:
        data: the options of the preparation.
        parts: the parts of the source, which processes read independently.
        scan: the results of the first pass.
        encoder: the tokenizer.
        directory: the working directory, which receives the shards.
        workers: number of processes.

    Raises:
        UserError: the training split has fewer tokens than a record (unless all documents are for
            validation), or there is no validation document.
    """
    num_sampled = max(MIN_SAMPLED_DOCUMENTS, SAMPLED_DOCUMENTS // len(parts))
    work = functools.partial(
        _encode_part,
        data,
        directory,
        SerializedTokenizer(encoder.kind, encoder.serialize()),
        scan.threshold,
        num_sampled,
    )
    encoded = worker_pool.run_over_parts(work, parts, workers, "tokenizing", scan.dropped)
    counts = {
        "train": [part.train for part in encoded],
        "validation": [part.validation for part in encoded],
    }
    splits = {split: _sum_counts(counts[split]) for split in data_card.SPLITS}
    _check_splits(data, splits)
    sizes = [size for part in encoded for size in part.sizes]
    card = {
        "format": data_card.FORMAT,
        **_card_options(data),
        "tokenizer": tokenizers.fingerprint(encoder),
        "vocab_size": encoder.vocab_size,
        **scan.counts,
        "waste": packing.estimate_waste(sizes, data.sequence_length),
        "splits": splits,
        "command": _command(data),
    }
    lengths = {split: [count.records for count in counts[split]] for split in data_card.SPLITS}
    return EncodedData(card, lengths)


def _sum_counts(parts: list[SplitCounts]) -> dict[str, Any]:
    """Sums the counts of a split over parts; its hash is a hash of the hashes of the parts."""
    total: dict[str, Any] = {}
    for name in COUNTS:
        total[name] = sum(getattr(part, name) for part in parts)
    hashes = "".join(part.sha256 for part in parts)
    total["sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
    return total


def _check_splits(data: DataConfig, splits: dict[str, dict[str, Any]]) -> None:
    num_training_tokens = splits["train"]["tokens"]
    is_too_short = num_training_tokens < data.sequence_length
    if is_too_short and not data_card.has_only_validation(data):
        raise UserError(
            f"source {data.source!r} has {num_training_tokens} training tokens, fewer than one "
            f"record of {data.sequence_length}; give more text or a shorter sequence_length"
        )
    if not splits["validation"]["tokens"]:
        raise UserError(
            f"{data.validation_source or data.source!r} has no validation documents; give more "
            "text, or a larger validation_fraction"
        )


def _card_options(data: DataConfig) -> dict[str, Any]:
    """Returns the options that are copied into the card: all but the tokenizer.

    The card has the tokenizer's fingerprint instead of its name.
    """
    names = [name for name in data_card.PREPARATION_OPTIONS if name != "tokenizer"]
    return {name: getattr(data, name) for name in names}


def _command(data: DataConfig) -> str:
    """Returns the command that would prepare the same data again, for the card."""
    default = DataConfig()
    flags = [f"--source={data.source}", f"--tokenizer={data.tokenizer}"]
    for name in data_card.PREPARATION_OPTIONS:
        value = getattr(data, name)
        if name in ("source", "tokenizer") or value == getattr(default, name):
            continue
        flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return f"python -m modse_jax.data.prepare {' '.join(flags)} --out=DIR"


def _encode_part(
    data: DataConfig,
    directory: WorkingDirectory,
    tokenizer: SerializedTokenizer,
    threshold: float,
    num_sampled: int,
    part_number: int,
    part: Part,
    dropped: np.ndarray,
) -> EncodedPart:
    """Tokenizes a part and writes its shards, unless a run that was killed has done so already."""
    counts_path = directory.counts_path(part_number)
    if counts_path.exists():
        counts = files.read_json(counts_path)
        return EncodedPart(
            SplitCounts(**counts["train"]),
            SplitCounts(**counts["validation"]),
            counts["sizes"],
        )
    encoder = tokenizers.deserialize(tokenizer.kind, tokenizer.model, "the tokenizer")
    writers = {}
    for split in data_card.SPLITS:
        writers[split] = SplitWriter(data, encoder, directory.shard_path(split, part_number))
    batched_encoder = BatchedEncoder(encoder, writers, num_sampled)
    for document in scanning.read_split_documents(data, threshold, dropped, part):
        batched_encoder.add(document)
    batched_encoder.flush()
    encoded = EncodedPart(
        writers["train"].close(), writers["validation"].close(), batched_encoder.sizes
    )
    for split in data_card.SPLITS:
        files.flush_to_disk(directory.shard_path(split, part_number))
    files.write_atomically(counts_path, json.dumps(dataclasses.asdict(encoded)))
    return encoded


class SplitWriter:
    """Packs and writes the documents of one part and one split as a shard: one file of records."""

    def __init__(self, data: DataConfig, encoder: tokenizers.Tokenizer, path: pathlib.Path):
        self._counts = SplitCounts()
        self._hash = hashlib.sha256()
        self._writer = array_record_module.ArrayRecordWriter(str(path), ARRAY_RECORD_OPTIONS)
        self._serialize = record_format.RecordSerializer(
            data.sequence_length + 1, encoder.vocab_size
        )
        self._packer = packing.make_packer(data.packing, data.sequence_length, encoder.pad_id)

    def count_text(self, text: bytes) -> None:
        """Adds the text of a document to the counts and to the hash."""
        self._hash.update(text)
        self._counts.documents += 1
        self._counts.bytes += len(text)

    def add_tokens(self, ids: np.ndarray) -> None:
        """Adds a tokenized document, and writes the records that it completes."""
        self._counts.tokens += len(ids) - 1
        for records in self._packer.add(ids):
            self._write(records)

    def close(self) -> SplitCounts:
        """Writes the remaining records and returns the counts."""
        for records in self._packer.finish():
            self._write(records)
        self._writer.close()
        self._counts.sha256 = self._hash.hexdigest()
        return self._counts

    def _write(self, records: packing.PackedRecords) -> None:
        self._counts.records += len(records.tokens)
        self._counts.padding += int((records.segments == 0).sum())
        for record in self._serialize(records.tokens, records.segments):
            self._writer.write(record)


class BatchedEncoder:
    """Tokenizes documents in batches of BATCH_BYTES and passes them to the writer of their split.

    Attributes:
        sizes: the number of tokens of the first `num_sampled` documents.
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        writers: dict[str, SplitWriter],
        num_sampled: int,
    ):
        self.sizes: list[int] = []
        self._encoder = encoder
        self._writers = writers
        self._num_sampled = num_sampled
        self._documents: list[SplitDocument] = []
        self._num_bytes = 0

    def add(self, document: SplitDocument) -> None:
        """Adds a document, and tokenizes the batch if it is complete."""
        self._writers[document.split].count_text(document.text)
        self._documents.append(document)
        self._num_bytes += len(document.text)
        if self._num_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Tokenizes the documents that were added since the last batch, and writes them.

        The tokens of each document are put between a begin token and an end token.
        """
        encoder = self._encoder
        token_ids = encoder.encode_batch([document.text for document in self._documents])
        for document, ids in zip(self._documents, token_ids):
            with_ends = np.concatenate(([encoder.bos_id], ids, [encoder.eos_id]))
            self._writers[document.split].add_tokens(with_ends.astype(np.int32))
            if len(self.sizes) < self._num_sampled:
                self.sizes.append(len(with_ends))
        self._documents = []
        self._num_bytes = 0
