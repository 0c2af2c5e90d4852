"""The order of training records: shares of a mixture, and epochs of each dataset."""

import numpy as np
import pytest

from modse_jax.data import batching
from modse_jax.data.mixture_order import BLOCK, MixtureOrder
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


def test_epochs_are_reported_for_each_dataset(mixture):
    data, config = mixture
    size = len(data.datasets[0].splits["train"])
    epochs = batching.epochs(data, config, 1000)
    assert epochs["a"] == pytest.approx(4800 / size, rel=0.02)


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
