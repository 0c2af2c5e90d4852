"""The order of training records: shares of a mixture, and epochs of each dataset."""

import types

import numpy as np
import pytest

from modse_jax.data import batching
from modse_jax.data.mixture_order import BLOCK, MixtureOrder
from modse_jax.data.training_data import TrainingData
from tests.helpers.configs import tiny_config
from tests.helpers.datasets import single_dataset


def test_mixture_has_its_shares(mixture):
    data, config = mixture
    order = MixtureOrder(data, config)
    datasets = [
        record_id.dataset for number in range(2600) for record_id in order.batch(number, range(8))
    ]
    for num_records in (8, BLOCK, BLOCK + 8, 20_000):
        counts = np.bincount(datasets[:num_records], minlength=3)
        assert order.counts(num_records) == counts.tolist()
        if num_records >= BLOCK:
            shares = counts / num_records
            np.testing.assert_allclose(shares, (0.6, 0.3, 0.1), atol=0.01)


def test_every_epoch_visits_all_records_of_a_dataset_in_another_order(mixture):
    data, config = mixture
    order = MixtureOrder(data, config)
    records = {0: [], 1: [], 2: []}
    num_batches = int(2.1 * len(data.datasets[0].splits["train"]) / 0.6 / 8)
    for number in range(num_batches):
        for record_id in order.batch(number, range(8)):
            records[record_id.dataset].append(record_id.record)
    num_epochs = []
    for dataset, visited in zip(data.datasets, records.values()):
        size = len(dataset.splits["train"])
        epochs = [visited[i : i + size] for i in range(0, len(visited) - size + 1, size)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(size))
        if len(epochs) >= 2:
            assert epochs[0] != epochs[1]
        num_epochs.append(len(epochs))
    assert num_epochs[0] == 2


def first_epochs(num_datasets: int, seed: int, **options) -> list[tuple[int, ...]]:
    """Returns the order of the records of datasets of 50 records, mixed in equal shares."""
    datasets = tuple(
        types.SimpleNamespace(splits={"train": range(50)}) for _ in range(num_datasets)
    )
    data = TrainingData(datasets, (1 / num_datasets,) * num_datasets, **options)
    order = MixtureOrder(data, tiny_config(data=dict(shuffle_seed=seed)))
    records = [record_id for number in range(60) for record_id in order.batch(number, range(8))]
    return [
        tuple(record_id.record for record_id in records if record_id.dataset == dataset)[:50]
        for dataset in range(num_datasets)
    ]


def test_datasets_of_several_seeds_are_in_independent_orders():
    orders = [order for seed in range(3) for order in first_epochs(3, seed)]
    assert len(set(orders)) == 9
    assert first_epochs(1, 1) == first_epochs(3, 1)[:1]  # the first has the order that it has alone


def test_runs_of_older_versions_keep_the_order_of_their_datasets():
    first, second = (first_epochs(2, seed, has_independent_seeds=False) for seed in (0, 1))
    assert first[1] == second[0] and first[1] != first_epochs(2, 0)[1]


def test_epochs_are_reported_for_each_dataset(mixture):
    data, config = mixture
    size = len(data.datasets[0].splits["train"])
    epochs = batching.epochs(data, config, [range(1000)])
    assert epochs["a"] == pytest.approx(4800 / size, rel=0.02)


def test_only_batches_that_were_read_are_counted(mixture):
    """A rewind skips batches, here those from 5 to 204."""
    data, config = mixture
    order = MixtureOrder(data, config)
    batches = [range(5), range(205, 210)]
    read = [order.batch(number, range(8)) for numbers in batches for number in numbers]
    records = np.bincount([record_id.dataset for batch in read for record_id in batch], minlength=3)
    tokens = batching.tokens_by_dataset(data, config, batches)
    assert list(tokens.values()) == (64 * records).tolist()
    epochs = batching.epochs(data, config, batches)
    sizes = [len(dataset.splits["train"]) for dataset in data.datasets]
    assert list(epochs.values()) == pytest.approx(records / sizes)


def test_batches_hold_the_same_records_for_any_number_of_processes(mixture):
    """Compares the records of every global batch over three epochs."""
    mixed, config = mixture
    for data in (single_dataset(mixed.datasets[2]), mixed):
        batches_per_epoch = len(data.datasets[-1].splits["train"]) // 8
        order = MixtureOrder(data, config)
        numbers = range(3 * batches_per_epoch)
        expected = [order.batch(number, range(8)) for number in numbers]
        for num_processes in (2, 4):
            size = 8 // num_processes
            orders = [MixtureOrder(data, config) for _ in range(num_processes)]
            for number in numbers:
                records = []
                for process, order in enumerate(orders):
                    rows = range(process * size, (process + 1) * size)
                    records += order.batch(number, rows)
                assert records == expected[number]
