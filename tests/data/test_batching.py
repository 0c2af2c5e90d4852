"""Training batches depend on seed and step alone; validation covers every record once."""

import random

import numpy as np
import pytest

from modse_jax.data import batching
from modse_jax.errors import UserError
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import single_dataset


def read_tokens(data, config, first_batch, num_batches, rows=()):
    """Returns the tokens [num_batches, B, L + 1] of consecutive training batches."""
    batches = batching.train_batches(data, config, first_batch, rows)
    return np.stack([next(batches)["tokens"] for _ in range(num_batches)])


def sorted_records(batches):
    return sorted(record.tobytes() for batch in batches for record in batch)


def test_batches_are_a_function_of_seed_and_step(prepared):
    data = single_dataset(prepared)
    config = tiny_config(model=dict(vocab_size=400))
    num_records = prepared.card["splits"]["train"]["records"]
    per_epoch = num_records // config.training.batch_size
    straight = read_tokens(data, config, 0, 2 * per_epoch + 3)
    for start in (1, per_epoch, per_epoch + 2):
        resumed = read_tokens(data, config, start, 2)
        np.testing.assert_array_equal(resumed, straight[start : start + 2])
    other_seed = tiny_config(model=dict(vocab_size=400), data=dict(shuffle_seed=1))
    assert not np.array_equal(straight[0], read_tokens(data, other_seed, 0, 1)[0])


def test_an_epoch_holds_no_record_twice_and_epochs_differ_in_order(prepared):
    data = single_dataset(prepared)
    config = tiny_config(model=dict(vocab_size=400))
    num_records = prepared.card["splits"]["train"]["records"]
    per_epoch = num_records // config.training.batch_size
    straight = read_tokens(data, config, 0, per_epoch + 2)
    epoch = sorted_records(straight[:per_epoch])
    records = [record["tokens"].astype(np.int32) for record in prepared.splits["train"]]
    distinct = {record.tobytes() for record in records}
    assert len(set(epoch)) == len(distinct & set(epoch))
    if len(distinct) == num_records:
        assert len(set(epoch)) == len(epoch)
    second_epoch = straight[per_epoch : per_epoch + 2]
    assert sorted_records(straight[:2]) != sorted_records(second_epoch)


def test_batches_of_a_mixture_are_equal_after_any_restart(mixture):
    data, config = mixture
    straight = read_tokens(data, config, 0, 12)
    rng = random.Random(0)
    for start in rng.sample(range(10), 4):
        resumed = read_tokens(data, config, start, 12 - start)
        np.testing.assert_array_equal(resumed, straight[start:])
        rows = (4, 5, 6, 7)
        resumed = read_tokens(data, config, start, 12 - start, rows)
        np.testing.assert_array_equal(resumed, straight[start:, rows])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_covers_every_record_once(prepared, batch_size):
    batches = list(batching.validation_batches(prepared, batch_size, 400))
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    segments = np.concatenate([batch["segments"] for batch in batches])
    records = [record["tokens"] for record in prepared.splits["validation"]]
    is_padding = (segments == 0).all(axis=1)
    np.testing.assert_array_equal(tokens[~is_padding], records)
    assert all(len(batch["tokens"]) == batch_size for batch in batches)


def test_validation_stops_at_the_limit(prepared):
    batches = list(batching.validation_batches(prepared, 2, 400, limit=3))
    segments = np.concatenate([batch["segments"] for batch in batches])
    assert (segments > 0).any(axis=1).tolist() == [True, True, True, False]


def test_token_outside_the_vocabulary_is_refused(prepared):
    config = tiny_config(model=dict(vocab_size=50))
    message = "^record .* token id .* outside the vocabulary 0..49 .model.vocab_size=50.$"
    with pytest.raises(UserError, match=message):
        next(batching.train_batches(single_dataset(prepared), config, 0))
