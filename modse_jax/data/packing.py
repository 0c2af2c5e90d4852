"""Documents to records of a fixed number of tokens.

A record has one token more than it predicts, the last of the one before it in the same document, so that every token of
a document but its first is predicted exactly once. Segment ids number the documents of a record from 1; 0 is padding.

concat: documents laid end to end and cut; only the last record is padded, but most records begin in the middle of a
document. best_fit: a document that fits into a record is never cut; records end in padding (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling").
"""

import bisect
from collections.abc import Iterator

import numpy as np

WINDOW = 4096  # pieces that best_fit looks at together


class Packer:
    """Token arrays in, (tokens, segments) int32 [n, length + 1] out, in blocks of records; `rest` at the end."""

    def __init__(self, kind: str, length: int, pad_id: int):
        self._length, self._pad_id, self._best_fit = length, pad_id, kind == "best_fit"
        self._pieces, self._size, self._document = [], 0, 0

    def add(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._document += 1
        if self._best_fit:
            for start in range(0, max(len(ids) - 1, 1), self._length):
                self._pieces.append(ids[start : start + self._length + 1])
                if len(self._pieces) >= WINDOW:
                    yield self._filled()
            return
        step = 512 * self._length  # a long document goes through in slices
        for start in range(0, len(ids), step):
            piece = ids[start : start + step]
            self._pieces.append((piece, np.full(len(piece), self._document, np.int32)))
            self._size += len(piece)
            if self._size > step:
                yield self._cut(False)

    def rest(self) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._best_fit:
            return [self._filled()] if self._pieces else []
        return [self._cut(True)] if self._size > 1 else []

    def _cut(self, last):
        """Whole records of documents laid end to end; the last one padded, or what is left kept."""
        tokens, segments = (np.concatenate(a) for a in zip(*self._pieces))
        if last:
            missing = -(len(tokens) - 1) % self._length
            tokens = np.pad(tokens, (0, missing), constant_values=self._pad_id)
            segments = np.pad(segments, (0, missing))
        whole = (len(tokens) - 1) // self._length
        at = np.arange(whole)[:, None] * self._length + np.arange(self._length + 1)[None, :]
        self._pieces = [(tokens[whole * self._length :], segments[whole * self._length :])]
        self._size = len(self._pieces[0][0])
        segments = segments[at]
        return tokens[at], np.where(segments > 0, segments - segments[:, :1] + 1, 0)

    def _filled(self):
        pieces, self._pieces = self._pieces, []
        bins = best_fit([len(p) for p in pieces], self._length + 1)
        tokens = np.full((len(bins), self._length + 1), self._pad_id, np.int32)
        segments = np.zeros((len(bins), self._length + 1), np.int32)
        for row, members in enumerate(bins):
            at = 0
            for number, member in enumerate(members, 1):
                end = at + len(pieces[member])
                tokens[row, at:end], segments[row, at:end] = pieces[member], number
                at = end
        return tokens, segments


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Bins of indices whose sizes sum to at most `room`: the largest first, each into the bin that it fills best."""
    bins, spaces = [], []  # spaces: (room left, bin), sorted
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found = bisect.bisect_left(spaces, (sizes[index], -1))
        if found == len(spaces):
            bins.append([index])
            left, number = room - sizes[index], len(bins) - 1
        else:
            left, number = spaces.pop(found)
            bins[number].append(index)
            left -= sizes[index]
        if left > 1:
            bisect.insort(spaces, (left, number))
    return [sorted(members) for members in sorted(bins, key=min)]


def waste(sizes: list[int], length: int) -> dict[str, dict[str, float]]:
    """{packing: {"padding": share of tokens, "cut": share of the documents that would fit a record and are cut}}, for
    documents of these token counts."""
    ends = np.cumsum(sizes)
    fits = np.array(sizes) <= length + 1
    cut = (
        (ends - sizes) // length != (ends - 2) // length
    ) & fits  # its first and last but one in two records
    records = -(-(int(ends[-1]) - 1) // length)
    pieces = [
        min(length + 1, size - start)
        for size in sizes
        for start in range(0, max(size - 1, 1), length)
    ]
    bins = sum(
        len(best_fit(pieces[i : i + WINDOW], length + 1)) for i in range(0, len(pieces), WINDOW)
    )
    return {
        "concat": {
            "padding": 1 - (int(ends[-1]) - 1) / (records * length),
            "cut": float(cut.sum() / max(fits.sum(), 1)),
        },
        "best_fit": {"padding": 1 - sum(pieces) / (bins * (length + 1)), "cut": 0.0},
    }
