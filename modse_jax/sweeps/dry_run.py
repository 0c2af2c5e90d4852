"""Describes the arms of a sweep and what they would cost, without training anything.

Numbers of parameters and FLOPs are exact. Seconds and memory are estimates: seconds are the nominal
FLOPs over a speed that is the same for all arms, and small or narrow arms are slower than that;
memory does not know what XLA fuses.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax

from modse_jax.config.options import Config
from modse_jax.evaluation.text_table import Column, text_table
from modse_jax.model import accounting
from modse_jax.runtime import peak_rate
from modse_jax.study.notation import LayerShape, PoolShape
from modse_jax.sweeps import matching, results
from modse_jax.sweeps.definition import ResolvedArm
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.training import metrics

ASSUMED_UTILIZATION = 0.4  # of the peak, if no run has been measured

STATE_BYTES = 12  # of a parameter: its value and two moments of AdamW, float32
GRADIENT_BYTES = 4

GIB = 2**30

COLUMNS = ("arm", "n", "k", "s", "g", "E", "G", "A", "parameters", "FLOPs/token", "tokens", "time")
HEADER = (*COLUMNS, "GiB")


class Speed(NamedTuple):
    """The speed that predictions assume.

    Attributes:
        flops_per_second: nominal FLOPs of training per second.
        origin: where the number is from.
    """

    flops_per_second: float
    origin: str


def describe_sweep(
    arms: Sequence[ResolvedArm], directory: SweepDirectory | None, flops_per_second: float
) -> str:
    """Returns a table with a line for each arm, and the total.

    Args:
        arms: the arms.
        directory: the workdir, whose results have a measured speed; None without one.
        flops_per_second: the speed to assume; 0 to measure it.
    """
    speed = find_speed(directory, flops_per_second)
    rows = [_describe_arm(arm, speed) for arm in arms]
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    columns = [
        Column(width, "left" if i == 0 else "right", 0 if i == 0 else 2)
        for i, width in enumerate(widths)
    ]
    tokens = sum(matching.count_tokens(arm.config) for arm in arms)
    flops = sum(count_flops(arm.config) for arm in arms)
    total = (
        f"{len(arms)} arms, {tokens:,} tokens, {flops:.3e} FLOPs; "
        f"{format_seconds(flops / speed.flops_per_second)} at "
        f"{speed.flops_per_second:.3g} FLOP/s ({speed.origin})"
    )
    notes = (
        "n experts, k per token, s expert parameters over dense, g width over dense (Slicing and "
        "Dicing); E = s, G = 1/g (Krajewski); A active share (Ling)\n"
        "time and memory per device are estimates; FLOPs are nominal"
    )
    return f"{text_table(columns, [HEADER, *rows])}\n{total}\n{notes}"


def find_speed(directory: SweepDirectory | None, flops_per_second: float) -> Speed:
    """Returns the speed to assume: the given one, that of finished runs, or a share of the peak."""
    if flops_per_second:
        return Speed(flops_per_second, "--flops_per_second")
    measured = _measured_speed(directory) if directory is not None else 0.0
    if measured:
        return Speed(measured, "the runs in the workdir")
    peak = peak_rate.peak_flops(jax.devices())
    if peak is None:
        return Speed(1e12, "a guess; set --flops_per_second")
    return Speed(ASSUMED_UTILIZATION * peak, f"{ASSUMED_UTILIZATION:.0%} of this machine's peak")


def _measured_speed(directory: SweepDirectory) -> float:
    """Returns the nominal FLOPs per second of training, over all finished runs of a workdir.

    It is 0 if no run has finished.
    """
    flops = 0.0
    seconds = 0.0
    for result in results.find_other_results(directory, set()):
        if result["state"] == results.FINISHED:
            config = results.read_config(result)
            flops += count_flops(config)
            seconds += result["metrics"]["training_seconds"]
    return flops / seconds if seconds else 0.0


def count_flops(config: Config) -> int:
    """Returns the nominal FLOPs of all training steps of a config."""
    return matching.count_flops_per_token(config) * matching.count_tokens(config)


def layer_shape(config: Config) -> LayerShape:
    """Returns the shape of the layers relative to the dense FFN.

    That is the one of `moe.flop_matched_width`; if it is not set, one as wide as all that a token
    uses.
    """
    dim = config.model.dim
    if config.is_dense:
        dense = PoolShape(1, 1, Fraction(1))
        return LayerShape((dense,), dense_over_dim=Fraction(config.model.dense_width, dim))
    active = accounting.nominal_routed_width(config) + config.moe.shared_width
    unit = Fraction(config.moe.flop_matched_width) or active
    pools = []
    first = 0
    for pool in config.pools:
        widths = config.widths[first : first + pool.num_experts]
        mean = Fraction(sum(widths), len(widths))
        pools.append(PoolShape(pool.num_experts, pool.top_k, mean / unit))
        first += pool.num_experts
    return LayerShape(tuple(pools), config.moe.shared_width / unit, unit / dim)


def estimate_memory(config: Config) -> int:
    """Returns about how many bytes a training step needs on one device that holds everything.

    It counts the state, the gradients, the activations that the backward pass reads, and the logits
    of one chunk. With rematerialization, only the input of each block is saved.
    """
    model = config.model
    parameters = accounting.count_parameters(config).total
    micro_batch = config.training.batch_size // config.training.gradient_accumulation
    tokens = micro_batch * config.data.sequence_length
    bytes_per_number = 4 if model.dtype == "float32" else 2
    per_token = model.dim
    if model.remat == "none":
        hidden = model.dense_width or (
            accounting.nominal_routed_width(config) + config.moe.shared_width
        )
        # Attention saves its input, q, k, v, output and projection; an FFN its input, two hidden
        # activations and their product, and its output.
        per_token = 8 * model.dim + 3 * int(hidden)
    activations = tokens * model.num_layers * per_token * bytes_per_number
    logits = 2 * min(tokens, config.advanced.loss_chunk) * model.vocab_size * 4
    return parameters * (STATE_BYTES + GRADIENT_BYTES) + activations + logits


def _describe_arm(arm: ResolvedArm, speed: Speed) -> tuple[str, ...]:
    config = arm.config
    shape = layer_shape(config)
    return (
        arm.name,
        str(shape.experts),
        str(shape.active),
        _format_fraction(shape.sparsity),
        _format_fraction(shape.granularity),
        _format_fraction(shape.expansion_rate),
        _format_fraction(shape.krajewski_granularity),
        _format_fraction(shape.activation_ratio),
        f"{accounting.count_parameters(config).total:,}",
        f"{matching.count_flops_per_token(config):,}",
        f"{matching.count_tokens(config):,}",
        format_seconds(count_flops(config) / speed.flops_per_second),
        f"{estimate_memory(config) / GIB:.2f}",
    )


def _format_fraction(value: Fraction) -> str:
    """Returns a fraction exactly if it is short, else rounded."""
    return str(value) if len(str(value)) <= 6 else f"{float(value):.4g}"


def format_seconds(seconds: float) -> str:
    """Returns a time as text; from a minute on as "3m07s" or "1h05m"."""
    return f"{seconds:.1f}s" if seconds < 60 else metrics.duration(seconds)
