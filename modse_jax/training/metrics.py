"""Converts the results of a step into the rows of the logs, and into the line that is printed.

Legend: E experts, K top-k.
"""

import math
from typing import Any

import numpy as np

from modse_jax.config.options import Config
from modse_jax.model import accounting
from modse_jax.moe import expert_placement
from modse_jax.moe.layer_options import Pool, pool_ranges
from modse_jax.moe.router import RouterStatistics


def routing_by_layer(
    statistics: RouterStatistics,
    widths: tuple[int, ...],
    pools: tuple[Pool, ...],
    placement: expert_placement.Placement | None = None,
) -> list[dict]:
    """Summarizes routing statistics, as routing.jsonl contains them.

    Args:
      statistics: sums over a step or a data split, with a leading axis of layers.
      widths: hidden dimensions of the experts.
      pools: the pools of experts, one after another.
      placement: how this run places experts on devices, whose straggler factor is reported as
        "in_use"; None reports none.

    Returns:
      One dict of plain numbers per layer; none for a dense model, which has no routing:
        tokens_per_expert, tokens_per_expert_by_choice: tokens routed to each expert.
        mean_gate: mean gate of each expert.
        max_over_mean: load imbalance, the maximum over the mean of tokens per expert of a pool; of
          the least balanced pool.
        entropy: mean entropy of the probabilities of a pool's experts, nats; the mean over pools.
        pools: one dict per pool, with its own max_over_mean, entropy and dropped.
        count_weighted_width, gate_weighted_width: mean width of the chosen experts, weighted by
          the number of tokens or by gates.
        straggler: {placement: straggler factor}, for several ways to place experts on devices: the
          maximum over the mean of tokens x width per device, if a single expert axis processed the
          whole batch without dropping tokens.
        dropped: tokens dropped because of limited capacity.
    """
    if not widths:
        return []
    placements = expert_placement.reference_placements(widths)
    if placement is not None:
        placements = {"in_use": placement, **placements}
    return [
        _summarize_layer(statistics, layer, np.array(widths), pools, placements)
        for layer in range(len(statistics.tokens))
    ]


def _summarize_layer(
    statistics: RouterStatistics,
    layer: int,
    widths_E: np.ndarray,
    pools: tuple[Pool, ...],
    placements: dict[str, expert_placement.Placement],
) -> dict:
    counts_KE = np.asarray(statistics.counts_KE[layer], np.int64)
    gates_E = np.asarray(statistics.gates_E[layer], np.float64)
    counts_E = counts_KE.sum(axis=0)
    of_pools = [
        _summarize_pool(statistics, layer, index, counts_E[pool.experts])
        for index, pool in enumerate(pool_ranges(pools))
    ]
    straggler = {
        name: expert_placement.straggler_factor(counts_E.tolist(), placement)
        for name, placement in placements.items()
    }
    return {
        "layer": layer,
        "tokens_per_expert": counts_E.tolist(),
        "tokens_per_expert_by_choice": counts_KE.tolist(),
        "mean_gate": [_ratio(gate, count) for gate, count in zip(gates_E, counts_E)],
        "max_over_mean": max(pool["max_over_mean"] for pool in of_pools),
        "entropy": sum(pool["entropy"] for pool in of_pools) / len(of_pools),
        "count_weighted_width": _ratio(counts_E @ widths_E, counts_E.sum()),
        "gate_weighted_width": _ratio(gates_E @ widths_E, gates_E.sum()),
        "straggler": straggler,
        "dropped": sum(pool["dropped"] for pool in of_pools),
        "pools": of_pools,
    }


def _summarize_pool(
    statistics: RouterStatistics, layer: int, index: int, counts_E: np.ndarray
) -> dict:
    """Summarizes the statistics of one pool, with the tokens of each of its experts."""
    tokens = max(int(statistics.tokens[layer]), 1)
    return {
        "max_over_mean": _ratio(counts_E.max(), counts_E.mean()),
        "entropy": float(statistics.entropy_P[layer][index]) / tokens,
        "dropped": int(statistics.dropped_P[layer][index]),
    }


def train_row(
    config: Config,
    step: int,
    metrics: Any,
    step_seconds: float,
    bytes_per_token: float,
    peak_flops: float | None,
) -> dict:
    """Returns the row of metrics.jsonl for one training step.

    Args:
      config: the config of the run.
      step: the step, from 1.
      metrics: the `train_step.Metrics` of the step.
      step_seconds: mean duration of the steps since the previous row.
      bytes_per_token: bytes of text per token of the training data.
      peak_flops: peak FLOP/s of all devices together, or None if unknown.
    """
    length = config.data.sequence_length
    tokens = config.training.batch_size * length
    rows_E = count_computed_rows(config, metrics.statistics)

    def mfu(flops_per_token: int) -> float | None:
        """Returns the model FLOPs utilization."""
        if not peak_flops:
            return None
        return flops_per_token * tokens / step_seconds / peak_flops

    row = {
        "step": step,
        "split": "train",
        "tokens": step * tokens,
        "loss": float(metrics.loss),
        "bits_per_byte": float(metrics.loss) / math.log(2) / bytes_per_token,
        "balance_loss": float(metrics.balance_loss),
        "z_loss": float(metrics.z_loss),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "tokens_per_second": tokens / step_seconds,
        "mfu_nominal": mfu(accounting.nominal_flops_per_token(config, length)),
        "mfu_realised": mfu(accounting.realized_flops_per_token(config, length, rows_E, tokens)),
        "step_seconds": step_seconds,
        "skipped_steps": int(metrics.skipped),
        **_row_of_options(config, metrics),
    }
    return {name: _finite_or_none(value) for name, value in row.items()}


def count_computed_rows(config: Config, statistics: RouterStatistics) -> np.ndarray:
    """Returns the tokens that every expert computed, summed over layers, [E].

    Padding is never routed. Dropped tokens are known per pool. They are taken from the experts of
    the pool in proportion to their tokens, experts of width 0 excepted, which drop none. So the
    FLOPs are exact if no token is dropped or the other experts of the pool have one width.

    Args:
        config: the config of the run.
        statistics: sums over a step, with a leading axis of layers.
    """
    if config.is_dense:
        return np.zeros(0)
    rows_LE = np.asarray(statistics.counts_KE, np.float64).sum(axis=1)
    dropped_LP = np.asarray(statistics.dropped_P, np.float64)
    has_width_E = np.array(config.widths) > 0
    first = 0
    for index, pool in enumerate(config.pools):
        experts = first + np.flatnonzero(has_width_E[first : first + pool.num_experts])
        routed_L = np.maximum(rows_LE[:, experts].sum(axis=1), 1)
        rows_LE[:, experts] *= (1 - dropped_LP[:, index] / routed_L)[:, None]
        first += pool.num_experts
    return rows_LE.sum(axis=0)


def _row_of_options(config: Config, metrics: Any) -> dict:
    """Returns the values that only runs with certain options log."""
    row: dict[str, Any] = {}
    if config.moe.capacity_factor:
        row["dropped"] = count_dropped(metrics.statistics)
    if config.moe.width_penalty_weight:
        row["width_penalty"] = float(metrics.width_penalty)
    if metrics.vocab_z_loss is not None:
        row["vocab_z_loss"] = float(metrics.vocab_z_loss)
    if metrics.bias_range is not None:
        smallest, largest = np.asarray(metrics.bias_range).T
        row["router_bias_min"] = smallest.tolist()
        row["router_bias_max"] = largest.tolist()
    return row


def count_dropped(statistics: RouterStatistics) -> int:
    """Returns the number of routed tokens over capacity in all layers."""
    return int(np.asarray(statistics.dropped_P, np.int64).sum())


def _finite_or_none(value: Any) -> Any:
    """Replaces NaN and infinity by None, because JSON cannot represent them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def console_line(row: dict, layers: list[dict], total_steps: int) -> str:
    """Returns the line that is printed for a training step.

    Args:
      row: the row from `train_row`, with "data_wait" (share of time spent waiting for data) and
        "epochs" ({dataset: epochs}).
      layers: from `routing_by_layer`; none for a dense model.
      total_steps: the last step of the run.
    """

    def number(name: str, form: str) -> str:
        return "nan" if row[name] is None else format(row[name], form)

    dropped = sum(layer["dropped"] for layer in layers)
    epochs = max(row["epochs"].values())
    parts = [
        f"step {row['step']}/{total_steps}",
        f"loss {number('loss', '.4f')}",
        f"{number('bits_per_byte', '.3f')} bits/byte",
    ]
    if layers:
        load = max(layer["max_over_mean"] for layer in layers)
        parts += [f"balance {number('balance_loss', '.3f')}", f"load {load:.2f}"]
    parts += [
        f"grad {number('grad_norm', '.3f')}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
    ]
    if row["mfu_realised"] is not None:
        parts.append(f"mfu {row['mfu_realised']:.0%}")
    if dropped:
        parts.append(f"dropped {dropped}")
    if row["skipped_steps"]:
        parts.append(f"skipped {row['skipped_steps']}")
    if row["data_wait"] > 0.05:
        parts.append(f"waits for data {row['data_wait']:.0%}")
    if epochs > 1:
        parts.append(f"epoch {epochs:.1f}")
    remaining = (total_steps - row["step"]) * row["step_seconds"]
    parts.append(f"eta {duration(remaining)}")
    return "  ".join(parts)


def validation_line(step: int, total_steps: int, result: dict) -> str:
    """Returns the line that is printed for a validation.

    Args:
      step: the step that was validated.
      total_steps: the last step of the run.
      result: from `validation.together`, with what `validation.summarize_sets` adds.
    """
    parts = [
        f"step {step}/{total_steps}",
        f"validation loss {result['loss']:.4f}",
        f"{result['bits_per_byte']:.4f} bits/byte",
    ]
    if "dropped" in result:
        parts.append(f"dropped {result['dropped']}")
    if "sets" in result:
        parts.append(f"macro-average of {len(result['sets'])} sets {result['macro_loss']:.4f}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns a duration as text, such as "1h05m" or "3m07s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _ratio(numerator: float, denominator: float) -> float:
    """Returns the quotient as a float, or 0 if the denominator is 0."""
    return float(numerator) / float(denominator) if denominator else 0.0
