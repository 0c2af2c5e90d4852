"""Validation: the loss, bits per byte and routing statistics of the validation records.

The results do not depend on the batch size, unless experts have a capacity
(`evaluation.capacity_factor`).

Legend: B batch, L predicted tokens.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from modse_jax.data.prepared_data import Dataset
from modse_jax.model.variables import Variables
from modse_jax.moe.router import RouterStatistics
from modse_jax.training import metrics
from modse_jax.training.train_step import ScoreStep


class Scored(NamedTuple):
    """Sums over the validation records of a dataset.

    Attributes:
      nats: negative log-likelihood.
      tokens: predicted tokens.
      bytes: bytes of text in the predicted tokens.
      statistics: routing statistics.
    """

    nats: float
    tokens: int
    bytes: float
    statistics: RouterStatistics

    def result(self) -> dict:
        """Returns the mean loss in nats per token, the bits per byte, and the number of tokens."""
        return {
            "loss": self.nats / self.tokens,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
        }


def run(
    score: ScoreStep, variables: Variables, batches: Iterable[dict], dataset: Dataset, whole: bool
) -> Scored:
    """Scores validation batches.

    The losses of tokens are float32; they are summed in float64 on the host.

    Args:
      score: a jitted function from `train_step.make_score_step`.
      variables: the arrays of the model.
      batches: sharded batches.
      dataset: the dataset of the batches.
      whole: the batches are the complete validation split, so that the number of its bytes is
        known. Otherwise bytes are estimated from the mean bytes per token of the split.
    """
    nats = 0.0
    tokens = 0
    total = None
    for batch in batches:
        nll_BL, weights_BL, statistics = jax.device_get(score(variables, batch))
        nats += float(np.sum(np.where(weights_BL > 0, nll_BL, 0), dtype=np.float64))
        tokens += int(weights_BL.sum())
        statistics = jax.tree.map(_widen, statistics)
        total = statistics if total is None else jax.tree.map(np.add, total, statistics)
    split = dataset.card["splits"]["validation"]
    if not whole:
        return Scored(nats, tokens, tokens * split["bytes"] / split["tokens"], total)
    if tokens != split["tokens"]:
        raise RuntimeError(
            f"validation scored {tokens} tokens, but the card of {dataset.directory} counts "
            f"{split['tokens']}"
        )
    return Scored(nats, tokens, split["bytes"], total)


def _widen(array: np.ndarray) -> np.ndarray:
    """Converts statistics of one batch to 64 bits, so that sums over many batches stay exact."""
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def together(scored: dict[str, Scored]) -> tuple[dict, RouterStatistics]:
    """Combines the results of all datasets.

    Returns:
      The loss, bits per byte and tokens over all datasets, and the routing statistics. With several
      datasets, the result holds those of each under "sources".
    """
    total = jax.tree.map(lambda *parts: sum(parts), *scored.values())
    result = total.result()
    if len(scored) > 1:
        result["sources"] = {name: part.result() for name, part in scored.items()}
    return result, total.statistics


def summarize_sets(scored: dict[str, Scored], has_capacity: bool) -> dict:
    """Returns the results of the validation sets, and the unweighted mean of their losses.

    The mean is the macro-average of Slicing and Dicing: a small set counts as much as a large one.

    Args:
      scored: {name: sums} of every set.
      has_capacity: experts have a capacity in evaluation, so that tokens may be dropped.

    Returns:
      {"macro_loss": mean in nats per token, "sets": {name: loss, bits per byte, tokens, and with a
      capacity the dropped tokens}}; {} without sets.
    """
    if not scored:
        return {}
    sets = {name: part.result() for name, part in scored.items()}
    if has_capacity:
        for name, part in scored.items():
            sets[name]["dropped"] = metrics.count_dropped(part.statistics)
    # `fsum` rounds once, so the mean does not depend on the order of the sets.
    macro_loss = math.fsum(result["loss"] for result in sets.values()) / len(sets)
    return {"macro_loss": macro_loss, "sets": sets}
