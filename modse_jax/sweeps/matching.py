"""Checks that the arms of a sweep are matched on what the sweep states as fixed.

A comparison of shapes is only as good as what is held fixed: a model with more parameters or more
tokens is better for reasons that have nothing to do with its shape.
"""

import collections
import difflib
import json
from collections.abc import Callable, Mapping, Sequence

from modse_jax.config.loading import override_options, to_flat_dict
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import accounting
from modse_jax.sweeps.definition import ResolvedArm, Sweep

FEWEST_RATES = 3  # learning rates per shape without which a comparison of shapes gets a warning

LEARNING_RATES = (
    "optimizer.learning_rate",
    "optimizer.initial_learning_rate",
    "optimizer.final_learning_rate",
)

# Options that do not change the shape of the model.
SEEDS = ("seed", "data.shuffle_seed")


def count_tokens(config: Config) -> int:
    """Returns the positions that a run trains on: steps x batch size x sequence length."""
    return config.training.steps * config.training.batch_size * config.data.sequence_length


def count_flops_per_token(config: Config) -> int:
    """Returns the nominal FLOPs of training per token, the router and attention included."""
    return accounting.nominal_flops_per_token(config, config.data.sequence_length)


# What a sweep can hold fixed.
QUANTITIES: dict[str, Callable[[Config], int]] = {
    "total_parameters": lambda config: accounting.count_parameters(config).total,
    "active_parameters": lambda config: accounting.count_active_parameters(config).total,
    "flops_per_token": count_flops_per_token,
    "tokens": count_tokens,
}


def check_matched(sweep: Sweep, arms: Sequence[ResolvedArm]) -> None:
    """Checks that the arms of every group agree on `sweep.fixed`.

    Raises:
        UserError: a quantity or option is unknown, or two arms differ by more than the sweep
            allows. The message names the arms and has their numbers.
    """
    for quantity in sweep.fixed:
        _check_known(quantity, QUANTITIES, "fixed")
    options = to_flat_dict(arms[0].config)
    for option in sweep.fixed_within:
        _check_known(option, options, "fixed_within")
    groups: dict[tuple, list[ResolvedArm]] = collections.defaultdict(list)
    for arm in arms:
        options = to_flat_dict(arm.config)
        groups[tuple(options[option] for option in sweep.fixed_within)].append(arm)
    for group in groups.values():
        for quantity, tolerance in sweep.fixed.items():
            _check_group(group, quantity, tolerance)


def find_missing_rates(compares_shapes: bool, arms: Sequence[ResolvedArm]) -> str:
    """Returns a warning if a sweep compares shapes at too few learning rates, else ""."""
    rates: dict[Config, set[float]] = collections.defaultdict(set)
    names: dict[Config, str] = {}
    for arm in arms:
        shape = without_rates(arm.config)
        rates[shape].add(arm.config.optimizer.learning_rate)
        names.setdefault(shape, arm.name)
    if not compares_shapes or len(rates) == 1:
        return ""
    few = [shape for shape in rates if len(rates[shape]) < FEWEST_RATES]
    if not few:
        return ""
    return (
        f"{len(few)} of {len(rates)} shapes are trained at fewer than {FEWEST_RATES} learning "
        f"rates, for example that of {names[few[0]]!r}: their ranking may only show which of them "
        "suits this rate; add an axis of optimizer.learning_rate, or set compares_shapes=False"
    )


def varying_options(arms: Sequence[ResolvedArm]) -> list[str]:
    """Returns the options in which the arms differ, in the order of the config."""
    values: dict[str, set[str]] = collections.defaultdict(set)
    for arm in arms:
        for option, value in to_flat_dict(arm.config).items():
            values[option].add(json.dumps(value))
    return [option for option, found in values.items() if len(found) > 1]


def without_rates(config: Config) -> Config:
    """Returns a config with the same learning rates and seeds as any other."""
    fixed = {**dict.fromkeys(LEARNING_RATES, 1.0), **dict.fromkeys(SEEDS, 0)}
    return override_options(config, fixed)


def _check_known(name: str, known: Mapping, where: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise UserError(f"{where} names {name!r}, which is unknown; {hint}")


def _check_group(group: Sequence[ResolvedArm], quantity: str, tolerance: float) -> None:
    counts = [(QUANTITIES[quantity](arm.config), arm.name) for arm in group]
    smallest, largest = min(counts), max(counts)
    difference = largest[0] / smallest[0] - 1
    if largest[0] - smallest[0] > tolerance * smallest[0]:
        raise UserError(
            f"the arms are not matched on {quantity}: {smallest[1]!r} has {smallest[0]:,} and "
            f"{largest[1]!r} has {largest[0]:,}, {difference:.3%} more, and the sweep allows "
            f"{tolerance:.3%}; change the arms, or what the sweep states as fixed"
        )
