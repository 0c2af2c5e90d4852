"""Packing predicts every token once, and best_fit cuts no document that fits into a record."""

import numpy as np
import pytest

from modse_jax.data import packing


def pack(kind, documents, length):
    """Returns (tokens, segments) of all records, as lists."""
    packer = packing.make_packer(kind, length, 0)
    blocks = [block for ids in documents for block in packer.add(ids)]
    blocks += packer.finish()
    tokens = np.concatenate([block.tokens for block in blocks])
    segments = np.concatenate([block.segments for block in blocks])
    return tokens.tolist(), segments.tolist()


def test_concat_overlaps_by_one_and_numbers_segments_from_one():
    documents = [np.arange(10, 17), np.arange(20, 23), np.arange(30, 36)]
    tokens, segments = pack("concat", documents, 4)
    assert tokens == [
        [10, 11, 12, 13, 14],
        [14, 15, 16, 20, 21],
        [21, 22, 30, 31, 32],
        [32, 33, 34, 35, 0],
    ]
    assert segments == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2],
        [1, 1, 2, 2, 2],
        [1, 1, 1, 1, 0],
    ]


def test_concat_cuts_more_tokens_than_it_holds():
    documents = [np.arange(1, 100 + i) for i in range(40)]
    tokens, segments = pack("concat", documents, 4)
    stream = np.concatenate(documents)
    assert len(tokens) > packing.SLICE_RECORDS
    assert [record[0] for record in tokens] == stream[:-1:4].tolist()
    num_padding = sum(record.count(0) for record in segments)
    assert num_padding == -(len(stream) - 1) % 4


def test_best_fit_cuts_no_document_that_fits_and_predicts_every_token_once():
    documents = [np.arange(1, 1 + size) for size in (9, 3, 5, 2, 12, 4)]
    tokens, segments = pack("best_fit", documents, 8)
    sizes = []
    for record in segments:
        sizes += [record.count(segment) for segment in range(1, max(record) + 1)]
    assert sorted(sizes) == sorted([9, 3, 5, 2, 9, 4, 4])  # 12 = 9 + 4 - 1, shared
    num_predicted = sum(len(document) - 1 for document in documents)
    assert sum(size - 1 for size in sizes) == num_predicted
    for record, ids in zip(tokens, segments):
        for segment in range(1, max(ids) + 1):
            piece = [token for token, found in zip(record, ids) if found == segment]
            assert piece == list(range(piece[0], piece[0] + len(piece)))


def test_assign_best_fit_fills_bins_with_the_largest_first():
    assert packing.assign_best_fit([5, 4, 3, 6], 9) == [[0, 1], [2, 3]]


def test_estimate_waste_compares_both_packings():
    waste = packing.estimate_waste([9, 3, 5, 2, 12, 4], 8)
    assert waste["best_fit"]["cut"] == 0 < waste["concat"]["cut"] < 1
    assert waste["concat"]["padding"] == pytest.approx(1 - 34 / 40)
    assert waste["best_fit"]["padding"] == 0
    waste = packing.estimate_waste([6, 6, 6], 8)
    assert waste["best_fit"]["padding"] == pytest.approx(1 / 3)
