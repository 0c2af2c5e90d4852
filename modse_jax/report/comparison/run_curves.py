"""Reads from the logs of a run its losses against four costs, and its load and drops over time.

Legend: S logged training steps, W windows of steps, L layers, E experts.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from modse_jax.config.options import Config
from modse_jax.sweeps import matching, results
from modse_jax.training import run_logs

# What a loss can be plotted against, with labels.
COSTS = {
    "tokens": "tokens",
    "nominal_flops": "nominal FLOPs",
    "realized_flops": "realized FLOPs",
    "seconds": "wall clock of training steps, seconds",
}

# The field of metrics.jsonl that holds a metric of the report, by split. Steps have no validation
# sets.
LOG_FIELDS = {
    "validation_loss": {"train": "loss", "validation": "loss"},
    "training_loss": {"train": "loss", "validation": "loss"},
    "macro_loss": {"train": "loss", "validation": "macro_loss"},
    "bits_per_byte": {"train": "bits_per_byte", "validation": "bits_per_byte"},
}

NUM_WINDOWS = 10  # of the load over training


class Curve(NamedTuple):
    """Losses of one split of a run, and what they had cost.

    Attributes:
        steps: the training steps, [S].
        losses: the losses, [S]; not a number if the log has none.
        costs: {cost of `COSTS`: [S]}, cumulative.
    """

    steps: np.ndarray
    losses: np.ndarray
    costs: Mapping[str, np.ndarray]


class Routing(NamedTuple):
    """The routing of a run over training.

    Attributes:
        tokens_W: tokens at the end of each window of logged steps.
        load_WL: load imbalance of the tokens of the window; see `results.load_imbalance`.
        dropped_W: share of routed tokens over capacity.
        validation_dropped: the same share in the last validation; None if the log has none.
        flops_per_token_S: realized FLOPs of training per token, of every logged step.
        steps_S: the logged training steps.
    """

    tokens_W: np.ndarray
    load_WL: np.ndarray
    dropped_W: np.ndarray
    validation_dropped: float | None
    flops_per_token_S: np.ndarray
    steps_S: np.ndarray


def read_routing(config: Config, training: pathlib.Path) -> Routing | None:
    """Returns the routing of a run; None if it has no routing, as a dense model.

    Args:
        config: the config of the run.
        training: the workdir of the run.
    """
    path = training / "routing.jsonl"
    if config.is_dense or not path.exists():
        return None
    counts: dict[str, dict[int, list]] = {"train": {}, "validation": {}}
    dropped: dict[str, dict[int, int]] = {"train": {}, "validation": {}}
    for row in _read_rows(path):
        of_split, step = counts.get(row["split"]), row["step"]
        if of_split is None:
            continue
        of_split.setdefault(step, []).append(np.array(row["tokens_per_expert"], np.int64))
        of_step = dropped[row["split"]]
        of_step[step] = of_step.get(step, 0) + row.get("dropped", 0)
    # A run that was killed may leave a step without all of its layers.
    num_layers = config.model.num_layers
    steps = [step for step, layers in counts["train"].items() if len(layers) == num_layers]
    if not steps:
        return None
    counts_SLE = np.array([counts["train"][step] for step in steps])
    dropped_S = np.array([dropped["train"][step] for step in steps])
    step_tokens = config.training.batch_size * config.data.sequence_length
    windows = np.array_split(np.arange(len(steps)), min(NUM_WINDOWS, len(steps)))
    load_WL = []
    for window in windows:
        counts_LE = counts_SLE[window].sum(axis=0)
        load_WL.append([results.load_imbalance(config, counts_E) for counts_E in counts_LE])
    last = max(counts["validation"], default=None)
    validation_dropped = None
    if last is not None:
        routed = sum(int(layer.sum()) for layer in counts["validation"][last])
        validation_dropped = dropped["validation"][last] / max(routed, 1)
    return Routing(
        tokens_W=np.array([steps[window[-1]] * step_tokens for window in windows]),
        load_WL=np.array(load_WL),
        dropped_W=np.array(
            [dropped_S[w].sum() / max(int(counts_SLE[w].sum()), 1) for w in windows]
        ),
        validation_dropped=validation_dropped,
        flops_per_token_S=np.array(
            [
                results.realized_flops_per_token(config, counts_LE, int(count), step_tokens)
                for counts_LE, count in zip(counts_SLE, dropped_S)
            ],
            np.float64,
        ),
        steps_S=np.array(steps),
    )


def _read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log one by one, because routing.jsonl may be large."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:  # a run that was killed may leave a line incomplete
                continue


def read_curves(
    config: Config, training: pathlib.Path, routing: Routing | None, metric: str
) -> dict[str, Curve]:
    """Returns {split: its losses}, of "train" and "validation"; {} if the run has no log.

    Args:
        config: the config of the run.
        training: the workdir of the run.
        routing: from `read_routing`.
        metric: a metric of `metrics.METRICS`.
    """
    path = training / "metrics.jsonl"
    rows = run_logs.read_log(path) if path.exists() else []
    steps = [row for row in rows if row["split"] == "train"]
    if not steps:
        return {}
    at_steps = _count_costs(config, steps, routing)
    curves = {}
    for split in ("train", "validation"):
        field = LOG_FIELDS[metric][split]
        found = [row for row in rows if row["split"] == split]
        number = np.array([row["step"] for row in found])
        losses = [row.get(field) for row in found]
        logged = np.array([row["step"] for row in steps])
        costs = {name: _cost_at(number, logged, cost) for name, cost in at_steps.items()}
        curves[split] = Curve(
            number, np.array([np.nan if loss is None else loss for loss in losses]), costs
        )
    return curves


def _count_costs(
    config: Config, rows: Sequence[Mapping], routing: Routing | None
) -> dict[str, np.ndarray]:
    """Returns the cumulative costs at logged training steps."""
    steps = np.array([row["step"] for row in rows])
    tokens = steps * config.training.batch_size * config.data.sequence_length
    nominal = matching.count_flops_per_token(config)
    per_token = np.full(len(steps), float(nominal))
    if routing is not None:
        per_token = np.interp(steps, routing.steps_S, routing.flops_per_token_S)
    # The routing between two logged steps is taken to be that of the later one.
    new_tokens = np.diff(tokens, prepend=0)
    new_steps = np.diff(steps, prepend=0)
    seconds = new_steps * np.array([row["step_seconds"] for row in rows])
    return {
        "tokens": tokens.astype(np.float64),
        "nominal_flops": tokens * float(nominal),
        "realized_flops": np.cumsum(new_tokens * per_token),
        "seconds": np.cumsum(seconds),
    }


def _cost_at(steps: np.ndarray, logged: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Returns cumulative costs at any steps; steps after the last logged one cost as it did."""
    known = np.concatenate([[0], logged])
    values = np.concatenate([[0.0], costs])
    last_slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
    return np.interp(steps, known, values) + last_slope * np.maximum(steps - known[-1], 0)


def smooth(losses: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of each loss and up to `width - 1` before it; NaNs are left out."""
    smoothed = np.empty(len(losses))
    for i in range(len(losses)):
        window = losses[max(0, i + 1 - width) : i + 1]
        known = window[np.isfinite(window)]
        smoothed[i] = known.mean() if len(known) else np.nan
    return smoothed


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean of the curves of several seeds, at the steps that all of them have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    picked = [np.searchsorted(curve.steps, steps) for curve in curves]
    losses = np.mean([curve.losses[i] for curve, i in zip(curves, picked)], axis=0)
    costs = {
        name: np.mean([curve.costs[name][i] for curve, i in zip(curves, picked)], axis=0)
        for name in COSTS
    }
    return Curve(steps, losses, costs)
