"""First pass of a preparation: counts the documents, chooses the split, and finds duplicates."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from modse_jax.config.options import DataConfig
from modse_jax.data import sources, tokenizers, validation_split
from modse_jax.data.prepare import worker_pool
from modse_jax.data.prepare.working_directory import WorkingDirectory
from modse_jax.data.sources import Part
from modse_jax.data.sources.text_files import PIECE_BYTES
from modse_jax.errors import UserError
from modse_jax.runtime import files

# Hashes of up to this many documents are compared in one step; more are compared in buckets.
MAX_DOCUMENTS_IN_MEMORY = 1_000_000

HASH_BUCKETS = 64

HASH_BYTES = 8


@dataclasses.dataclass
class PartScan:
    """Findings of the first pass in a part.

    Attributes:
        documents: valid documents: not empty, and UTF-8 unless invalid bytes are replaced.
        bytes: bytes of their text.
        empty: empty documents.
        undecodable: documents that are not UTF-8.
        below: documents whose holdout score is below the requested fraction.
        least: lowest holdout score.
        greatest: highest holdout score.
    """

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    undecodable: int = 0
    below: int = 0
    least: float = 1.0
    greatest: float = 0.0


class ScanResult(NamedTuple):
    """Findings of the first pass in all parts.

    Attributes:
        threshold: documents with a lower holdout score belong to the validation split.
        dropped: for each part, the numbers of the documents that are not used.
        counts: counts of documents, under the names that they have in the card.
    """

    threshold: float
    dropped: list[np.ndarray]
    counts: dict[str, int]


class SplitDocument(NamedTuple):
    """A document that is used, and its split."""

    text: bytes
    split: str


def scan_documents(
    data: DataConfig, parts: list[Part], directory: WorkingDirectory, workers: int
) -> ScanResult:
    """Scans all parts, in several processes.

    Raises:
        UserError: the source has no valid document, or only one and no validation source.
    """
    scans = worker_pool.run_over_parts(
        functools.partial(_scan_part, data, directory), parts, workers, "reading"
    )
    num_empty = sum(scan.empty for scan in scans)
    num_undecodable = sum(scan.undecodable for scan in scans)
    if not sum(scan.documents for scan in scans):
        raise UserError(
            f"source {data.source!r} has no document that is not empty and is UTF-8 "
            f"({num_empty} empty, {num_undecodable} not UTF-8)"
        )
    threshold = _choose_threshold(data, parts, scans)
    duplicates = find_duplicates([directory.hashes_path(i) for i in range(len(parts))])
    nothing = [numbers[:0] for numbers in duplicates]
    dropped = duplicates if data.drop_duplicates else nothing
    counts = {
        "empty_documents": num_empty,
        "undecodable_documents": num_undecodable,
        "duplicate_documents": sum(map(len, duplicates)),
        "dropped_documents": sum(map(len, dropped)),
    }
    return ScanResult(threshold, dropped, counts)


def _choose_threshold(data: DataConfig, parts: list[Part], scans: list[PartScan]) -> float:
    """Returns the holdout threshold of the parts whose documents are split by name."""
    split_by_name = [
        scan for scan, part in zip(scans, parts) if part.is_validation is None and scan.documents
    ]
    if not split_by_name:
        return 0.0
    if sum(scan.documents for scan in split_by_name) == 1:
        raise UserError(
            f"source {data.source!r} is a single document of {split_by_name[0].bytes} bytes, which "
            "cannot be split into training and validation; give more files, or one file of over "
            f"{PIECE_BYTES} bytes with blank lines, or a validation_source"
        )
    return validation_split.holdout_threshold(
        sum(scan.below for scan in split_by_name),
        min(scan.least for scan in split_by_name),
        max(scan.greatest for scan in split_by_name),
        data.validation_fraction,
    )


def _scan_part(
    data: DataConfig, directory: WorkingDirectory, part_number: int, part: Part
) -> PartScan:
    """Scans a part and writes what it finds, or reads what an earlier run has written."""
    scan_path = directory.scan_path(part_number)
    if scan_path.exists():
        return PartScan(**files.read_json(scan_path))
    scan = PartScan()
    hashes = array("Q")
    for name, text in read_valid_documents(part, data.undecodable, scan):
        score = validation_split.holdout_score(name)
        scan.documents += 1
        scan.bytes += len(text)
        scan.below += score < data.validation_fraction
        scan.least = min(scan.least, score)
        scan.greatest = max(scan.greatest, score)
        digest = hashlib.blake2b(text, digest_size=HASH_BYTES).digest()
        hashes.append(int.from_bytes(digest, "big"))
    hashes_path = directory.hashes_path(part_number)
    with open(hashes_path, "wb") as file:
        hashes.tofile(file)
    files.flush_to_disk(
        hashes_path
    )  # before the file whose presence says that the hashes are there
    files.write_atomically(scan_path, json.dumps(dataclasses.asdict(scan)))
    return scan


def read_valid_documents(
    part: Part, undecodable: str, scan: PartScan
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, text) of the documents of a part that are neither empty nor undecodable.

    Args:
        part: the part to read.
        undecodable: "skip", "replace" or "fail": what to do with a document that is not UTF-8.
        scan: counts the empty and undecodable documents.

    Raises:
        UserError: a document is not UTF-8, and `undecodable` is "fail".
    """
    for document in sources.read_part(part):
        text = document.text
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            scan.undecodable += 1
            if undecodable == "fail":
                raise UserError(
                    f"{part.description}: document {document.name} is not UTF-8 (byte "
                    f"{error.start}); undecodable=skip leaves such documents out, "
                    "undecodable=replace replaces the invalid bytes"
                ) from None
            if undecodable == "skip":
                continue
            text = text.decode("utf-8", "replace").encode()
        if text:
            yield document.name, text
        else:
            scan.empty += 1


def read_split_documents(
    data: DataConfig, threshold: float, dropped: np.ndarray, part: Part
) -> Iterator[SplitDocument]:
    """Yields the documents of a part that are used, with their splits."""
    dropped_numbers = set(dropped.tolist())
    documents = read_valid_documents(part, data.undecodable, PartScan())
    for number, (name, text) in enumerate(documents):
        if number in dropped_numbers:
            continue
        is_validation = part.is_validation
        if is_validation is None:
            is_validation = validation_split.holdout_score(name) < threshold
        yield SplitDocument(text, "validation" if is_validation else "train")


def find_duplicates(hash_files: list[pathlib.Path]) -> list[np.ndarray]:
    """Finds the documents whose hash equals that of an earlier document.

    Many hashes are compared in buckets, so that only a fraction of them is in memory.

    Args:
        hash_files: for each part, a file with a uint64 hash of each document.

    Returns:
        For each part, the sorted numbers of its duplicates.
    """
    num_documents = [file.stat().st_size // HASH_BYTES for file in hash_files]
    starts = np.cumsum([0, *num_documents])  # number of the first document of each part
    num_buckets = 1 if starts[-1] < MAX_DOCUMENTS_IN_MEMORY else HASH_BUCKETS
    found = [
        _find_duplicates_in_bucket(hash_files, starts, bucket, num_buckets)
        for bucket in range(num_buckets)
    ]
    duplicates = np.sort(np.concatenate(found))
    edges = np.searchsorted(duplicates, starts)
    return [
        duplicates[edges[i] : edges[i + 1]] - starts[i]  # numbers within the part
        for i in range(len(hash_files))
    ]


def _find_duplicates_in_bucket(
    hash_files: list[pathlib.Path], starts: np.ndarray, bucket: int, num_buckets: int
) -> np.ndarray:
    """Returns the numbers, over all parts, of the duplicates whose hash is in the bucket."""
    hashes = []
    numbers = []
    for file, start in zip(hash_files, starts):
        all_hashes = np.fromfile(file, np.uint64)
        in_bucket = all_hashes % np.uint64(num_buckets) == bucket
        hashes.append(all_hashes[in_bucket])
        numbers.append(np.flatnonzero(in_bucket) + start)
    first_occurrences = np.unique(np.concatenate(hashes), return_index=True)[1]
    return np.delete(np.concatenate(numbers), first_occurrences)


def train_tokenizer(
    data: DataConfig,
    parts: list[Part],
    scan: ScanResult,
    directory: WorkingDirectory,
    vocab_size: int,
) -> tokenizers.Tokenizer:
    """Trains a tokenizer on the training documents, or reads the one of an earlier run."""
    path = directory.tokenizer_path
    if not path.exists():
        texts = _read_training_texts(data, parts, scan)
        model = tokenizers.train_sentencepiece(texts, vocab_size).serialize()
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(model)
        temporary.replace(path)
    return tokenizers.deserialize("sentencepiece", path.read_bytes(), str(path))


def _read_training_texts(data: DataConfig, parts: list[Part], scan: ScanResult) -> Iterator[bytes]:
    for part, dropped in zip(parts, scan.dropped):
        for document in read_split_documents(data, scan.threshold, dropped, part):
            if document.split == "train":
                yield document.text
