"""The bytes of a record: how records are serialized, and what a valid record looks like.

A prepared directory holds a TFDS dataset in the array_record format. A record is two integer
arrays of equal length: token ids, and segment ids that number the documents of the record.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from modse_jax.errors import UserError

DATASET_NAME = "token_records"

DATASET_VERSION = "1.0.0"

# Values that fill the arrays in the template of a serialized record, to find the arrays in its
# bytes. They fit into uint16.
TOKEN_MARK = 0xABAB

SEGMENT_MARK = 0xCDCD


def record_features(length: int, vocab_size: int) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record of `length` tokens.

    Both arrays are stored as raw bytes, in the narrowest unsigned type that holds their values.
    """
    token_dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    segment_dtype = np.uint16 if length < 2**16 else np.uint32
    return tfds.features.FeaturesDict(
        {
            "tokens": _raw_array(length, token_dtype),
            "segments": _raw_array(length, segment_dtype),
        }
    )


def _raw_array(length: int, dtype: type[np.generic]) -> tfds.features.Tensor:
    return tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")


class RecordSerializer:
    """Serializes records exactly as TFDS does, five times as fast.

    All records of a dataset have equal length, so their serialized bytes differ only in the bytes
    of the two arrays. One record of marker values is serialized by TFDS, and serves as a template
    into which the arrays are copied.
    """

    def __init__(self, length: int, vocab_size: int):
        self._features = record_features(length, vocab_size)
        self._dtypes = {name: np.dtype(f.np_dtype) for name, f in self._features.items()}
        marks = {
            "tokens": np.full(length, TOKEN_MARK).astype(self._dtypes["tokens"]),
            "segments": np.full(length, SEGMENT_MARK).astype(self._dtypes["segments"]),
        }
        template = self.serialize_with_tfds(marks)
        self._offsets = {name: template.index(mark.tobytes()) for name, mark in marks.items()}
        self._template = np.frombuffer(template, np.uint8)

    def serialize_with_tfds(self, record: dict[str, np.ndarray]) -> bytes:
        """Returns the serialized bytes of one record as TFDS makes them: the slow reference.

        `record` is {"tokens", "segments"}.
        """
        # TFDS exposes its serializer only under `core`; it is used here and nowhere else.
        serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        example = serializer.get_tf_example(self._features.encode_example(record))
        # Without `deterministic`, protobuf orders map entries differently in every process.
        return example.SerializeToString(deterministic=True)

    def __call__(self, tokens: np.ndarray, segments: np.ndarray) -> list[bytes]:
        """Returns the serialized bytes of every row of two arrays [num_records, length]."""
        rows = np.tile(self._template, (len(tokens), 1))
        for name, array in (("tokens", tokens), ("segments", segments)):
            raw = np.ascontiguousarray(array.astype(self._dtypes[name])).view(np.uint8)
            start = self._offsets[name]
            rows[:, start : start + raw.shape[1]] = raw
        return [row.tobytes() for row in rows]


def stack_records(
    records: Sequence[dict[str, Any]], ids: Sequence[int], length: int, origin: str
) -> dict[str, np.ndarray]:
    """Stacks records into int32 arrays {"tokens", "segments"} [num_records, length].

    Args:
        records: decoded records.
        ids: the number of each record, for error messages.
        length: the expected number of tokens.
        origin: the split and directory of the records, for error messages.

    Raises:
        UserError: a record has another shape.
    """
    for number, record in zip(ids, records):
        shapes = [array.shape for array in record.values()]
        if set(shapes) != {(length,)}:
            raise UserError(f"record {number} of {origin} has shapes {shapes}, not ({length},)")
    return {
        name: np.stack([record[name] for record in records]).astype(np.int32)
        for name in ("tokens", "segments")
    }


def check_records(
    batch: dict[str, np.ndarray], ids: Sequence[int], vocab_size: int, origin: str
) -> None:
    """Checks that the token and segment ids of records are valid.

    An invalid token id would cause no error later: inside a jitted function, an index that is out
    of range is silently clamped.

    Args:
        batch: the records; see `stack_records`.
        ids: the number of each record, for error messages.
        vocab_size: size of the model's vocabulary.
        origin: the split and directory of the records, for error messages.

    Raises:
        UserError: a token id is not in the vocabulary, or the segment ids do not count documents
            from 1, followed by 0 for padding.
    """
    tokens = batch["tokens"]
    is_invalid_token = (tokens < 0) | (tokens >= vocab_size)
    if is_invalid_token.any():
        row, column = np.argwhere(is_invalid_token)[0]
        raise UserError(
            f"record {ids[row]} of {origin} holds token id {tokens[row, column]}, outside the "
            f"vocabulary 0..{vocab_size - 1} (model.vocab_size={vocab_size})"
        )
    has_invalid_segments = _has_invalid_segments(batch["segments"])
    if has_invalid_segments.any():
        row = int(np.argmax(has_invalid_segments))
        raise UserError(
            f"record {ids[row]} of {origin} has segment ids that do not count documents from 1, "
            "with 0 only as padding at its end"
        )


def _has_invalid_segments(segments: np.ndarray) -> np.ndarray:
    """Returns [num_records], True if the segment ids of a record do not count 1, 2, ..."""
    difference = np.diff(segments, axis=1)
    is_padding = segments == 0
    padding_begins = (difference < 0) & is_padding[:, 1:]
    is_valid_change = (difference == 0) | (difference == 1) | padding_begins
    continues_after_padding = is_padding[:, :-1] & (difference != 0)
    return (
        (segments[:, 0] != 1) | (~is_valid_change).any(axis=1) | continues_after_padding.any(axis=1)
    )
