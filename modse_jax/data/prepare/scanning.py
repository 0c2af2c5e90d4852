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

from modse_jax.config.options import UNDECODABLE, DataConfig
from modse_jax.data import sources, tokenizers, validation_split
from modse_jax.data.prepare import worker_pool
from modse_jax.data.prepare.working_directory import WorkingDirectory
from modse_jax.data.sources import Part
from modse_jax.data.sources.text_files import PIECE_BYTES
from modse_jax.errors import UserError
from modse_jax.runtime import choices, files

# Hashes of up to this many documents are compared in one step; more are compared in buckets.
MAX_DOCUMENTS_IN_MEMORY = 1_000_000

HASH_BUCKETS = 64

HASH_BYTES = 8


@dataclasses.dataclass
class PartScan:
    """Findings of the first pass in one part of the source.

    The holdout score of a document is a hash of its name in [0, 1), by which documents are assigned
    to the validation split.

    Attributes:
        documents: number of valid documents: not empty, and UTF-8 unless invalid bytes are
            replaced.
        bytes: bytes of their text.
        empty: number of empty documents.
        undecodable: number of documents that are not UTF-8.
        below: number of valid documents whose holdout score is below the requested fraction of
            validation documents.
        least: lowest holdout score of a valid document.
        greatest: highest holdout score of a valid document.
    """

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    undecodable: int = 0
    below: int = 0
    least: float = 1.0
    greatest: float = 0.0


class ScanResult(NamedTuple):
    """Findings of the first pass in all parts of the source.

    Attributes:
        threshold: documents with a holdout score (a hash of the name in [0, 1)) below it belong to
            the validation split.
        dropped: for each part, the numbers of the duplicate documents that are not used. Valid
            documents are numbered from 0.
        counts: counts of empty, undecodable, duplicate and dropped documents, by their names in the
            card.
    """

    threshold: float
    dropped: list[np.ndarray]
    counts: dict[str, int]


class SplitDocument(NamedTuple):
    """The text of a document that passed all filters, and the split that it belongs to."""

    text: bytes
    split: str  # "train" or "validation"


def scan_documents(
    data: DataConfig, parts: list[Part], directory: WorkingDirectory, workers: int
) -> ScanResult:
    """Reads all documents once, in several processes, and returns what the second pass needs.

    Args:
        data: the options of the preparation.
        parts: the parts of the source, which processes read independently.
        directory: the working directory, which receives the findings in each part.
        workers: number of processes.

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
    """Returns the threshold of the validation split.

    A document of a part of the source that is divided between the splits belongs to the validation
    split if its holdout score, a hash of its name in [0, 1), is below the threshold. Parts that lie
    in one split as a whole do not use it. It is 0 if all parts do.
    """
    split_by_name = [
        scan for scan, part in zip(scans, parts) if part.is_validation is None and scan.documents
    ]
    if not split_by_name:
        return 0.0
    if sum(scan.documents for scan in split_by_name) == 1:
        raise UserError(
            f"source {data.source!r} is a single document of {split_by_name[0].bytes} bytes, which "
            "cannot be split into training and validation; give more files, or one file of over "
            f"{2 * PIECE_BYTES} bytes, or a validation_source"
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
    """Scans a part and writes the findings, unless a run that was killed has written them."""
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
    # The hashes must be on disk before the file whose existence marks this part as complete.
    files.flush_to_disk(hashes_path)
    files.write_atomically(scan_path, json.dumps(dataclasses.asdict(scan)))
    return scan


def read_valid_documents(
    part: Part, undecodable: str, scan: PartScan
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, text) of the documents of a part that are neither empty nor undecodable.

    Args:
        part: the part to read.
        undecodable: "skip", "replace" or "fail": what to do with a document that is not UTF-8.
        scan: its counts of empty and undecodable documents are increased.

    Raises:
        UserError: a document is not UTF-8, and `undecodable` is "fail".
    """
    choices.check(UNDECODABLE, "undecodable", undecodable)
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
    """Yields the documents of a part that are used, with their splits.

    Args:
        data: the options of the preparation.
        threshold: documents with a holdout score below it belong to the validation split, unless
            the entire part belongs to one split.
        dropped: numbers of the valid documents of the part that are not used.
        part: the part to read.
    """
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
    """Finds the documents whose hash equals that of an earlier document of any part.

    If there are many hashes, they are compared in buckets by their remainder modulo HASH_BUCKETS,
    so that only a fraction of them is in memory.

    Args:
        hash_files: for each part, a file with a uint64 hash of each document.

    Returns:
        For each part, the sorted numbers of its duplicates; the first document of a part is 0.
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
    """Returns the numbers of the duplicates whose hash modulo num_buckets is `bucket`.

    Documents are numbered over all parts; `starts` are the numbers of the first document of each.
    """
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
    """Trains a tokenizer on the training documents, unless a run that was killed has done so."""
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
