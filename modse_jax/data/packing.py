"""Packs tokenized documents into records of a fixed number of tokens.

A record holds one token more than it predicts. If a document continues in the next record, the next
record begins with the last token of the previous one. So every token of a document except its first
is predicted exactly once. Segment ids number the documents of a record from 1; 0 marks padding.

There are two packings:

concat: documents are concatenated and the sequence is cut into records. Only the last record has
padding, but most records begin in the middle of a document.

best_fit: a document that fits into a record is never cut, and records end in padding. A document
that does not fit is cut into pieces first (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling").
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from modse_jax.runtime import choices

WINDOW = 4096  # documents, or pieces of long ones, that best_fit packs at a time

SLICE_RECORDS = 512  # concat cuts its tokens into records when it holds enough for this many


class PackedRecords(NamedTuple):
    """Records as int32 arrays [num_records, length + 1]."""

    tokens: np.ndarray
    segments: np.ndarray


class ConcatPacker:
    """Concatenates documents and cuts the sequence into records."""

    def __init__(self, length: int, pad_id: int):
        self._length = length
        self._pad_id = pad_id
        self._tokens: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []  # the number of the document of each token
        self._size = 0
        self._num_documents = 0

    def add(self, ids: np.ndarray) -> Iterator[PackedRecords]:
        """Adds a document, and yields the records that it completes.

        A long document is added slice by slice, so that memory does not grow with its length.
        """
        self._num_documents += 1
        slice_size = SLICE_RECORDS * self._length
        for start in range(0, len(ids), slice_size):
            piece = ids[start : start + slice_size]
            self._tokens.append(piece)
            self._documents.append(np.full(len(piece), self._num_documents, np.int32))
            self._size += len(piece)
            if self._size > slice_size:
                yield self._cut(is_last=False)

    def finish(self) -> list[PackedRecords]:
        """Returns the records of the tokens that are left, of which the last one is padded."""
        return [self._cut(is_last=True)] if self._size > 1 else []

    def _cut(self, is_last: bool) -> PackedRecords:
        """Cuts the added tokens into records and returns these.

        The tokens of an incomplete last record are kept for the next call, or padded if `is_last`.
        """
        tokens = np.concatenate(self._tokens)
        documents = np.concatenate(self._documents)
        if is_last:
            num_missing = -(len(tokens) - 1) % self._length
            tokens = np.pad(tokens, (0, num_missing), constant_values=self._pad_id)
            documents = np.pad(documents, (0, num_missing))
        num_records = (len(tokens) - 1) // self._length
        rest = num_records * self._length  # the last token of a record begins the next one
        self._tokens = [tokens[rest:]]
        self._documents = [documents[rest:]]
        self._size = len(tokens) - rest
        starts = np.arange(num_records)[:, None] * self._length
        positions = starts + np.arange(self._length + 1)[None, :]
        documents = documents[positions]
        segments = np.where(documents > 0, documents - documents[:, :1] + 1, 0)
        return PackedRecords(tokens[positions], segments)


class BestFitPacker:
    """Packs documents into records without cutting a document that fits into one."""

    def __init__(self, length: int, pad_id: int):
        self._length = length
        self._pad_id = pad_id
        self._pieces: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> Iterator[PackedRecords]:
        """Adds a document; whenever WINDOW documents have been added, packs and yields them.

        A document that does not fit into a record counts as several, its pieces.
        """
        for start, size in _piece_ranges(len(ids), self._length):
            self._pieces.append(ids[start : start + size])
            if len(self._pieces) >= WINDOW:
                yield self._pack_window()

    def finish(self) -> list[PackedRecords]:
        """Returns the records of the documents that are left."""
        return [self._pack_window()] if self._pieces else []

    def _pack_window(self) -> PackedRecords:
        pieces = self._pieces
        self._pieces = []
        bins = assign_best_fit([len(piece) for piece in pieces], self._length + 1)
        tokens = np.full((len(bins), self._length + 1), self._pad_id, np.int32)
        segments = np.zeros((len(bins), self._length + 1), np.int32)
        for row, members in enumerate(bins):
            start = 0
            for segment, member in enumerate(members, 1):
                end = start + len(pieces[member])
                tokens[row, start:end] = pieces[member]
                segments[row, start:end] = segment
                start = end
        return PackedRecords(tokens, segments)


def make_packer(packing: str, length: int, pad_id: int) -> ConcatPacker | BestFitPacker:
    """Returns the packer for a value of the option `packing`.

    Args:
        packing: "concat" or "best_fit".
        length: predicted tokens per record.
        pad_id: token id of padding.
    """
    packers: dict[str, type[ConcatPacker] | type[BestFitPacker]] = {
        "concat": ConcatPacker,
        "best_fit": BestFitPacker,
    }
    return choices.look_up(packers, "packing", packing)(length, pad_id)


def _piece_ranges(num_tokens: int, length: int) -> list[tuple[int, int]]:
    """Cuts a document into pieces of at most length + 1 tokens that overlap by one token.

    Returns:
        (first token, number of tokens) of each piece.
    """
    starts = range(0, max(num_tokens - 1, 1), length)
    return [(start, min(length + 1, num_tokens - start)) for start in starts]


def assign_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Assigns items to bins of limited capacity by the heuristic "best-fit decreasing".

    The largest items come first. Each goes into the bin with the least space that is enough for it,
    or into a new bin.

    Args:
        sizes: sizes of the items, each at most `capacity`.
        capacity: maximum sum of the sizes of a bin.

    Returns:
        For each bin, the indices of its items in ascending order. The bins are sorted by their
        first index.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (remaining space, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        found = bisect.bisect_left(spaces, (size, -1))
        if found == len(spaces):
            space = capacity
            number = len(bins)
            bins.append([])
        else:
            space, number = spaces.pop(found)
        bins[number].append(index)
        remaining = space - size
        if remaining > 1:  # the shortest document has two tokens: begin and end
            bisect.insort(spaces, (remaining, number))
    return [sorted(members) for members in sorted(bins, key=min)]


def estimate_waste(sizes: list[int], length: int) -> dict[str, dict[str, float]]:
    """Estimates the padding and the cut documents of both packings, from a sample of documents.

    Args:
        sizes: tokens of each document, with begin and end.
        length: predicted tokens per record.

    Returns:
        {packing: {"padding": share of tokens that are padding, "cut": share of cut documents among
        those that would fit into a record}}.
    """
    capacity = length + 1
    ends = np.cumsum(sizes)
    fits = np.array(sizes) <= capacity
    # A document is cut if its first token and its last predicting token are in two records.
    first_record = (ends - sizes) // length
    last_record = (ends - 2) // length
    is_cut = (first_record != last_record) & fits
    num_predicted = int(ends[-1]) - 1
    num_records = -(-num_predicted // length)
    pieces = [piece for size in sizes for _, piece in _piece_ranges(size, length)]
    num_bins = 0
    for start in range(0, len(pieces), WINDOW):
        num_bins += len(assign_best_fit(pieces[start : start + WINDOW], capacity))
    return {
        "concat": {
            "padding": 1 - num_predicted / (num_records * length),
            "cut": float(is_cut.sum() / max(fits.sum(), 1)),
        },
        "best_fit": {"padding": 1 - sum(pieces) / (num_bins * capacity), "cut": 0.0},
    }
