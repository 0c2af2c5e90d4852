"""Records are serialized exactly as TFDS does."""

import numpy as np
import pytest

from modse_jax.data.record_format import RecordSerializer, record_features


@pytest.mark.parametrize("length, vocab_size", [(9, 300), (65, 70_000)])
def test_records_are_serialized_as_tfds_does(length, vocab_size):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (5, length))
    segments = rng.integers(0, 4, (5, length))
    serializer = RecordSerializer(length, vocab_size)
    features = record_features(length, vocab_size)
    for row, serialized in enumerate(serializer(tokens, segments)):
        record = {
            "tokens": tokens[row].astype(features["tokens"].np_dtype),
            "segments": segments[row].astype(features["segments"].np_dtype),
        }
        assert serialized == serializer.serialize_with_tfds(record)
