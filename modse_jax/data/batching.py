"""Reads training and validation batches from prepared records.

A row of a batch is one record: L + 1 tokens, of which L are predicted. Which records form training
batch n depends only on data.shuffle_seed and n (mixture_order.py), not on the number of processes.

Legend: B batch size, L predicted tokens per record.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from modse_jax.config.options import Config
from modse_jax.data.mixture_order import MixtureOrder, RecordId
from modse_jax.data.prepared_data import Dataset, read_records
from modse_jax.data.training_data import TrainingData
from modse_jax.errors import UserError

Batch = dict[str, np.ndarray]

READER_THREADS = 2

READ_AHEAD_BATCHES = 16


def train_batches(
    data: TrainingData, config: Config, first_batch: int, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """Yields the training batches from number `first_batch` on, without end.

    Threads read them ahead.

    Args:
        data: the datasets to read from.
        config: config of the run.
        first_batch: number of the first batch.
        rows: which rows of each batch this process reads; () reads all rows.

    Yields:
        int32 arrays {"tokens", "segments"} [number of rows read, L + 1].

    Raises:
        UserError: a record is damaged.
    """
    source = grain.MapDataset.source(BatchSource(data, config, rows))
    options = grain.ReadOptions(num_threads=READER_THREADS, prefetch_buffer_size=READ_AHEAD_BATCHES)
    batches = iter(source.to_iter_dataset(options))
    # Grain has no stable interface to start at an index without reading the elements before it.
    grain.experimental.set_next_index(batches, first_batch)
    while True:
        try:
            yield next(batches)
        except UserError as error:  # Grain appends its own lines to the message
            raise UserError(str(error).splitlines()[0]) from None


class BatchSource:
    """Random access to training batches by their number, for Grain.

    Only the given rows of each batch are read.
    """

    def __init__(self, data: TrainingData, config: Config, rows: Sequence[int]):
        self._data = data
        self._order = MixtureOrder(data, config)
        self._batch_size = config.training.batch_size
        self._vocab_size = config.model.vocab_size
        self._rows = list(rows or range(self._batch_size))

    def __len__(self) -> int:
        return 2**62 // self._batch_size  # Grain requires a length; this one is never reached

    def __getitem__(self, number: int) -> Batch:
        record_ids = self._order.batch(number, self._rows)
        length = self._data.datasets[0].card["sequence_length"] + 1
        shape = (len(record_ids), length)
        batch = {"tokens": np.zeros(shape, np.int32), "segments": np.zeros(shape, np.int32)}
        for index in sorted({record_id.dataset for record_id in record_ids}):
            rows = [row for row, found in enumerate(record_ids) if found.dataset == index]
            numbers = [record_ids[row].record for row in rows]
            dataset = self._data.datasets[index]
            records = read_records(dataset, "train", numbers, self._vocab_size)
            for name, array in records.items():
                batch[name][rows] = array
        return batch


def record_ids(data: TrainingData, config: Config, batch: int) -> list[RecordId]:
    """Returns which record each row of training batch number `batch` is."""
    rows = range(config.training.batch_size)
    return MixtureOrder(data, config).batch(batch, rows)


def epochs(data: TrainingData, config: Config, batches: Sequence[range]) -> dict[str, float]:
    """Returns {dataset name: passes over its training records} of the given batches.

    Args:
        data: the datasets.
        config: config of the run.
        batches: the numbers of the batches, as ranges that do not overlap.
    """
    counts = _records_per_dataset(data, config, batches)
    return {
        dataset.name: count / len(dataset.splits["train"])
        for dataset, count in zip(data.datasets, counts)
    }


def tokens_by_dataset(
    data: TrainingData, config: Config, batches: Sequence[range]
) -> dict[str, int]:
    """Returns {dataset name: predicted tokens, with padding} of the given batches; see `epochs`."""
    counts = _records_per_dataset(data, config, batches)
    return {
        dataset.name: count * config.data.sequence_length
        for dataset, count in zip(data.datasets, counts)
    }


def _records_per_dataset(data: TrainingData, config: Config, batches: Sequence[range]) -> list[int]:
    order = MixtureOrder(data, config)
    batch_size = config.training.batch_size
    totals = [0 for _ in data.datasets]
    for numbers in batches:
        before = order.counts(numbers.start * batch_size)
        after = order.counts(numbers.stop * batch_size)
        totals = [total + end - start for total, start, end in zip(totals, before, after)]
    return totals


def validation_batches(
    dataset: Dataset, batch_size: int, vocab_size: int, limit: int = 0, rows: Sequence[int] = ()
) -> Iterator[Batch]:
    """Yields batches of the validation records of a dataset, in order, each record exactly once.

    The last batch is filled with rows whose tokens and segments are 0 (padding).

    Args:
        dataset: the dataset to read from.
        batch_size: rows of the global batch.
        vocab_size: size of the model's vocabulary.
        limit: number of records to read; 0 reads all.
        rows: which rows of each batch this process reads; () reads all rows.

    Yields:
        int32 arrays {"tokens", "segments"} [number of rows read, L + 1].
    """
    num_records = len(dataset.splits["validation"])
    count = min(limit or num_records, num_records)
    rows = rows or range(batch_size)
    for start in range(0, count, batch_size):
        real_rows = [index for index, row in enumerate(rows) if start + row < count]
        numbers = [start + rows[index] for index in real_rows]
        # If all rows of this process are padding, a record is read only for the shapes of arrays.
        records = read_records(dataset, "validation", numbers or [0], vocab_size)
        batch = {}
        for name, array in records.items():
            batch[name] = np.zeros((len(rows), array.shape[1]), array.dtype)
            batch[name][real_rows] = array[: len(numbers)]
        yield batch
