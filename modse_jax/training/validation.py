"""A pass over held-out records: loss, bits per byte, routing. The same numbers whatever the batch size."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from modse_jax.data.prepared_data import Dataset
from modse_jax.moe.router import RouterStatistics


class Scored(NamedTuple):
    """Sums over the held-out records of a dataset."""

    nats: float
    tokens: int
    bytes: float
    statistics: RouterStatistics

    def result(self) -> dict:
        return {
            "loss": self.nats / self.tokens,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
        }


def run(score: Callable, params, batches: Iterable[dict], dataset: Dataset, whole: bool) -> Scored:
    """Args: score: a jitted step.make_score_step. whole: the batches are all of the split, so that its byte count is
    exact; else bytes are estimated from the split's bytes per token. Losses are float32 per token, summed in
    float64."""
    nats, tokens, total = 0.0, 0, None
    for batch in batches:
        nll_BL, weights_BL, statistics = jax.device_get(score(params, batch))
        nats += float(np.sum(np.where(weights_BL > 0, nll_BL, 0), dtype=np.float64))
        tokens += int(weights_BL.sum())
        statistics = jax.tree.map(
            lambda a: a.astype(np.float64 if a.dtype.kind == "f" else np.int64), statistics
        )
        total = statistics if total is None else jax.tree.map(np.add, total, statistics)
    split = dataset.card["splits"]["validation"]
    if whole and tokens != split["tokens"]:
        raise RuntimeError(
            f"validation scored {tokens} tokens, but the card of {dataset.directory} counts "
            f"{split['tokens']}"
        )
    return Scored(
        nats, tokens, split["bytes"] if whole else tokens * split["bytes"] / split["tokens"], total
    )


def together(scored: dict[str, Scored]) -> tuple[dict, RouterStatistics]:
    """({"loss", "bits_per_byte", "tokens"} over all datasets, and of several each one's under "sources"; routing
    statistics of all)."""
    total = jax.tree.map(lambda *parts: sum(parts), *scored.values())
    sources = (
        {"sources": {name: s.result() for name, s in scored.items()}} if len(scored) > 1 else {}
    )
    return {**total.result(), **sources}, total.statistics
