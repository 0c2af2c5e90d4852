"""A pass over held-out records: loss, bits per byte, routing. The same numbers whatever the batch size."""
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from modse_jax.data.loader import Data
from modse_jax.moe.router import RouterStatistics


def run(score: Callable, params, batches: Iterable[dict], data: Data, whole: bool) -> tuple[dict, RouterStatistics]:
    """({"loss", "bits_per_byte", "tokens"}, routing statistics summed over batches).

    Args: score: a jitted step.make_score_step. whole: the batches are all of the split, so that its byte count is
    exact; else bytes are estimated from the split's bytes per token.
    Losses are float32 per token, summed in float64.
    """
    nats, tokens, total = 0.0, 0, None
    for batch in batches:
        nll_BL, weights_BL, statistics = jax.device_get(score(params, batch))
        nats += float(np.sum(np.where(weights_BL > 0, nll_BL, 0), dtype=np.float64))
        tokens += int(weights_BL.sum())
        statistics = jax.tree.map(lambda a: a.astype(np.float64 if a.dtype.kind == "f" else np.int64), statistics)
        total = statistics if total is None else jax.tree.map(np.add, total, statistics)
    split = data.card["splits"]["validation"]
    if whole and tokens != split["tokens"]:
        raise RuntimeError(f"validation scored {tokens} tokens, but the data's card counts {split['tokens']}")
    num_bytes = split["bytes"] if whole else tokens * data.bytes_per_token("validation")
    result = {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes, "tokens": tokens}
    return result, total
