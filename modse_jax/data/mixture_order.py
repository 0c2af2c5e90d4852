"""The order in which training reads records, from one dataset or from a mixture of several.

Training reads an endless sequence of records; batch n of B rows is positions n * B to n * B + B - 1
of it. This module computes which record is at a position, without reading any data.
"""

import functools
from typing import NamedTuple

import grain
import numpy as np

from modse_jax.config.options import Config
from modse_jax.data.training_data import TrainingData

BLOCK = 4096  # positions; in each block of them, every dataset of a mixture has its exact share


class RecordId(NamedTuple):
    """A record: the index of its dataset in the mixture, and its number in the training split."""

    dataset: int
    record: int


class _BlockOrder(NamedTuple):
    """The order in which the datasets are read within one block of BLOCK positions.

    Attributes:
        datasets: [BLOCK], the index of the dataset at each position.
        ranks: [BLOCK], how often the same dataset occurs at earlier positions of the block.
    """

    datasets: np.ndarray
    ranks: np.ndarray


class MixtureOrder:
    """Computes which record is at a position of the endless sequence of training records.

    In every block of BLOCK positions each dataset gets its share, rounded to a record, in an order
    that is drawn for the block. Within a dataset, every epoch reads all records once, in a new
    order. The result depends only on data.shuffle_seed and the position, so training can resume at
    any position.
    """

    def __init__(self, data: TrainingData, config: Config):
        self._seed = config.data.shuffle_seed
        self._batch_size = config.training.batch_size
        self._num_datasets = len(data.datasets)
        self._cumulative_weights = np.cumsum(data.weights)
        self._cumulative_weights[-1] = 1.0  # exact, whatever the rounding of the sum
        self._shuffled_records = []
        for index, dataset in enumerate(data.datasets):
            records = grain.MapDataset.source(range(len(dataset.splits["train"])))
            seed = _seed_of_dataset(self._seed, index, data.has_independent_seeds)
            shuffled = records.seed(seed).shuffle().repeat()
            self._shuffled_records.append(shuffled)
        self._block_order = functools.lru_cache(maxsize=4)(self._draw_block)

    def counts(self, num_positions: int) -> list[int]:
        """Returns how many records of each dataset are at the first `num_positions` positions."""
        block, num_in_block = divmod(num_positions, BLOCK)
        counts = self._counts_before_block(block)
        if self._num_datasets == 1:
            return [counts[0] + num_in_block]
        if num_in_block:
            datasets = self._block_order(block).datasets[:num_in_block]
            for index in range(self._num_datasets):
                counts[index] += int(np.sum(datasets == index))
        return counts

    def batch(self, number: int, rows: range | tuple[int, ...] | list[int]) -> list[RecordId]:
        """Returns which records are the given rows of training batch `number`."""
        first_position = number * self._batch_size
        return [self._record_at(first_position + row) for row in rows]

    def _record_at(self, position: int) -> RecordId:
        if self._num_datasets == 1:
            return RecordId(0, int(self._shuffled_records[0][position]))
        block, offset = divmod(position, BLOCK)
        order = self._block_order(block)
        dataset = int(order.datasets[offset])
        index = self._counts_before_block(block)[dataset] + int(order.ranks[offset])
        return RecordId(dataset, int(self._shuffled_records[dataset][index]))

    def _counts_before_block(self, block: int) -> list[int]:
        """Returns the number of records of each dataset in all blocks before block `block`.

        Cumulative sums of the shares are rounded, not the shares, so that the counts sum to exactly
        block * BLOCK.
        """
        boundaries = [0]
        for weight in self._cumulative_weights:
            boundaries.append(int(np.floor(block * BLOCK * weight)))
        return [end - start for start, end in zip(boundaries, boundaries[1:])]

    def _draw_block(self, block: int) -> _BlockOrder:
        """Draws the order of the datasets in the block of number `block`."""
        before = self._counts_before_block(block)
        after = self._counts_before_block(block + 1)
        shares = [end - start for start, end in zip(before, after)]
        rng = np.random.default_rng((self._seed, block))
        datasets = rng.permutation(np.repeat(np.arange(len(shares)), shares))
        ranks = np.zeros(BLOCK, int)
        for dataset, share in enumerate(shares):
            ranks[datasets == dataset] = np.arange(share)
        return _BlockOrder(datasets, ranks)


def _seed_of_dataset(shuffle_seed: int, index: int, is_independent: bool) -> int:
    """Returns the seed of the order of a dataset's records.

    The first dataset has the seed of the run. If the others had the seeds that follow it, as in
    older versions, dataset 1 of a run with seed 0 would be in the order of dataset 0 with seed 1.

    Args:
        shuffle_seed: data.shuffle_seed.
        index: index of the dataset in the mixture.
        is_independent: False returns the seed of older versions.
    """
    if not is_independent:
        return shuffle_seed + index
    if index == 0:
        return shuffle_seed
    return int(np.random.SeedSequence((shuffle_seed, index)).generate_state(1)[0])
