"""Checks of option values, each alone and against each other. All raise UserError."""

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

from modse_jax.config.option_fields import fields_of, get_option
from modse_jax.errors import UserError
from modse_jax.moe import expert_widths, layer_options

SET_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # of a validation set


def check_fields(config: Any) -> None:
    """Checks the limits of every option alone."""
    for path, field in fields_of(type(config)):
        value, rule = get_option(config, path), field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}={value} must be finite")
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{path}={value!r} must be one of {', '.join(rule['choices'])}")
        for name, sign, bad in (
            ("minimum", ">=", lambda v, b: v < b),
            ("above", ">", lambda v, b: v <= b),
            ("below", "<", lambda v, b: v >= b),
        ):
            if rule[name] is not None and bad(value, rule[name]):
                raise UserError(f"{path}={value} must be {sign} {rule[name]}")


def check_model(config: Any) -> None:
    """Checks the options of the transformer against each other."""
    m = config.model
    if m.dim % m.num_heads:
        divisors = [n for n in range(1, m.dim + 1) if m.dim % n == 0 and (m.dim // n) % 2 == 0]
        raise UserError(
            f"model.dim={m.dim} is not divisible by model.num_heads={m.num_heads}; "
            f"possible values: {', '.join(map(str, divisors[:12]))}"
        )
    if (m.dim // m.num_heads) % 2:
        raise UserError(
            f"head size model.dim/model.num_heads={m.dim // m.num_heads} must be even for RoPE"
        )
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        raise UserError(
            f"model.num_heads={m.num_heads} is not divisible by model.num_kv_heads={m.num_kv_heads}"
        )
    if config.data.sequence_length > m.context_length:
        raise UserError(
            f"data.sequence_length={config.data.sequence_length} is longer than "
            f"model.context_length={m.context_length}; lower the first or raise the second"
        )


def check_moe(config: Any) -> None:
    """Checks the options of the mixture-of-experts layers against each other."""
    if not config.is_dense:
        _check_pools(config)
        _check_experts(config)
        _check_dispatch(config)
    check_shared_expert(config)
    advanced = config.advanced
    if advanced.tail_rows > advanced.block_rows:
        raise UserError(
            f"advanced.tail_rows={advanced.tail_rows} is larger than "
            f"advanced.block_rows={advanced.block_rows}"
        )


def _check_pools(config: Any) -> None:
    """Checks the numbers of experts, choices and hidden units of every pool."""
    moe = config.moe
    if not moe.pools and moe.top_k > moe.num_experts:
        raise UserError(
            f"moe.top_k={moe.top_k} is larger than moe.num_experts={moe.num_experts}; lower the "
            "first or raise the second"
        )
    if moe.pools and moe.pairs:
        raise UserError(
            "moe.pairs=True compares widths with moe.width, which moe.pools replaces; set "
            "moe.pairs=False"
        )
    for number, (experts, width, top_k) in enumerate(moe.pools):
        pool = f"moe.pools: pool {number}, ({experts}, {width}, {top_k}),"
        if experts < 1 or top_k < 1 or width < 0:
            raise UserError(
                f"{pool} must be (experts, width, top_k) with at least 1 expert and a top_k of at "
                "least 1"
            )
        if top_k > experts:
            raise UserError(
                f"{pool} has top_k={top_k}, more than its {experts} experts; lower its top_k or "
                "give it more experts"
            )
        if moe.widths and width:
            raise UserError(
                f"{pool} has width {width}, but moe.widths gives the width of every expert; set "
                "the width of every pool to 0, or moe.widths=()"
            )
        if not moe.widths and not width:
            raise UserError(f"{pool} has width 0; give it a width, or set moe.widths")


def _check_experts(config: Any) -> None:
    """Checks the widths of the experts, and which experts copy their input."""
    moe = config.moe
    try:
        if moe.widths:
            expert_widths.check_widths(moe.widths)
            if len(moe.widths) != config.num_experts:
                raise ValueError(
                    f"{len(moe.widths)} widths for {config.num_experts} experts; give one width "
                    "for each expert, or change moe.num_experts or the pools"
                )
        if moe.pairs:
            expert_widths.check_pairs(config.widths, moe.width)
    except ValueError as error:
        raise UserError(f"moe.widths: {error}") from None
    try:
        expert_widths.check_copy_experts(moe.copy_experts, config.widths)
    except ValueError as error:
        raise UserError(f"moe.copy_experts: {error}") from None


def _check_dispatch(config: Any) -> None:
    """Checks the options of balancing, capacity and exchange."""
    moe = config.moe
    for path in ("moe.capacity_factor", "evaluation.capacity_factor"):
        try:
            layer_options.check_capacity_factor(get_option(config, path))
        except ValueError as error:
            raise UserError(f"{path}={error}") from None
    if moe.exchange == "all_to_all" and (moe.placement != "whole" or moe.capacity_factor):
        raise UserError(
            "moe.exchange=all_to_all needs whole experts and no capacity: set "
            "moe.placement=whole and moe.capacity_factor=0, or choose moe.exchange=gather"
        )
    if moe.bias_rule != "none" and moe.gate == "uniform":
        raise UserError(
            f"moe.bias_rule={moe.bias_rule} does not fit moe.gate=uniform: its gates are all 1/k, "
            "so the cross-entropy does not train the router, and the bias alone would choose the "
            "experts; set moe.bias_rule=none or choose another gate"
        )


def check_shared_expert(config: Any) -> None:
    """Checks the shared expert: it needs a width, a placement, and MoE layers beside it."""
    moe = config.moe
    if moe.shared_width and moe.shared_placement == "none":
        raise UserError(
            f"moe.shared_width={moe.shared_width} needs a placement: set moe.shared_placement="
            "in_layer (added to the output of the MoE layer) or moe.shared_placement=parallel (the "
            "MoE layer reads the input of the block), or set moe.shared_width=0"
        )
    if moe.shared_placement != "none" and not moe.shared_width:
        raise UserError(
            f"moe.shared_placement={moe.shared_placement} needs a shared expert: set "
            "moe.shared_width above 0, or moe.shared_placement=none"
        )
    if moe.shared_width and config.model.dense_width:
        raise UserError(
            f"moe.shared_width={moe.shared_width} needs MoE layers, but model.dense_width="
            f"{config.model.dense_width} replaces them by a dense FFN: set one of the two to 0"
        )


def check_flop_match(config: Any) -> None:
    """Checks that a token uses as many hidden units as the dense FFN of moe.flop_matched_width."""
    claimed = config.moe.flop_matched_width
    if not claimed or config.active_width == claimed:
        return
    raise UserError(
        f"moe.flop_matched_width={claimed}, but a token uses {config.active_width} hidden units "
        f"per layer, which is {config.active_width / claimed} of it instead of 1: "
        f"{_list_active_widths(config)}; change the widths or the experts per token, or set "
        "moe.flop_matched_width=0"
    )


def _list_active_widths(config: Any) -> str:
    """Returns where the hidden units of a token come from, as a sum."""
    if config.is_dense:
        return f"model.dense_width={config.model.dense_width}"
    terms = [f"shared {config.moe.shared_width}"] if config.moe.shared_width else []
    first = 0
    for number, (experts, top_k) in enumerate(config.pools):
        widths = config.widths[first : first + experts]
        first += experts
        name = f"pool {number}: " if len(config.pools) > 1 else ""
        terms.append(f"{name}{top_k} of mean width {Fraction(sum(widths), experts)}")
    return " + ".join(terms)


def check_data(config: Any) -> None:
    """Checks the weights and names of a mixture, and the names of validation sets."""
    mixture = config.data.mixture
    total = sum(weight for _, weight in mixture)
    for name, weight in mixture:
        if not math.isfinite(weight) or weight <= 0 or weight < total / 1000:
            raise UserError(
                f"data.mixture: the weight of {name!r} is {weight}; weights must be "
                "positive, and none below a thousandth of their sum"
            )
    if len({name for name, _ in mixture}) < len(mixture):
        raise UserError(f"data.mixture={mixture} names a directory twice; add up its weights")
    check_set_names([name for name, _ in config.data.validation_sources])


def check_set_names(names: list[str]) -> None:
    """Checks the names of validation sets, which become names of directories."""
    for name in names:
        if not re.fullmatch(SET_NAME, name):
            raise UserError(
                f"data.validation_sources: {name!r} is not a name for a set; use 1 to 64 letters "
                "(a-z, A-Z), digits, - and _, of which the first is a letter or a digit"
            )
    # Some file systems do not distinguish upper and lower case.
    folded = [name.lower() for name in names]
    for number, name in enumerate(folded):
        if name in folded[:number]:
            raise UserError(
                f"data.validation_sources: the name {names[number]!r} is used twice (upper and "
                "lower case count as equal); give every set a name of its own"
            )


def check_training(config: Any) -> None:
    """Checks the options of training, evaluation and the mesh."""
    t = config.training
    if t.batch_size % t.gradient_accumulation:
        raise UserError(
            f"training.batch_size={t.batch_size} is not divisible by "
            f"training.gradient_accumulation={t.gradient_accumulation}"
        )
    if t.rewind and (len(t.rewind) != 2 or min(t.rewind) < 1):
        raise UserError(
            f"training.rewind={t.rewind} must be (saved step, batches to skip), or () for off"
        )
    if 0 < t.spike_factor <= 1:
        raise UserError(f"training.spike_factor={t.spike_factor} must be above 1, or 0 for off")
    o = config.optimizer
    for name in ("initial_learning_rate", "final_learning_rate"):
        if getattr(o, name) > o.learning_rate:
            raise UserError(
                f"optimizer.{name}={getattr(o, name)} is above the peak "
                f"optimizer.learning_rate={o.learning_rate}"
            )
    e = config.evaluation
    if not e.prompts or not all(e.prompts):
        raise UserError(f"evaluation.prompts={e.prompts} must be non-empty texts, at least one")
    if config.evaluation.top_p > 1:
        raise UserError(f"evaluation.top_p={config.evaluation.top_p} must be <= 1")
    mesh = dataclasses.asdict(config.mesh)
    if 0 in mesh.values() or list(mesh.values()).count(-1) > 1:
        raise UserError(
            f"{', '.join(f'mesh.{k}={v}' for k, v in mesh.items())}: each must be a number of "
            "devices; one of them may be -1 for all remaining devices"
        )
