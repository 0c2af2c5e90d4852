"""Descriptions of the auxiliary losses: their weights, and what they add at perfect balance.

Other code divides these losses by other numbers: by the experts per token, the experts, or the
layers. A weight therefore means something only together with the value of its loss at perfect
balance. A run prints both when it starts, and a warning if only these losses train the router.
"""

import math
from typing import NamedTuple

from modse_jax.config.options import Config
from modse_jax.moe.layer_options import RENORMALIZED_GATES


class AuxiliaryLoss(NamedTuple):
    """A loss that is added to the cross-entropy.

    Attributes:
      name: its name.
      weight: its weight; the loss is not used if it is 0.
      normalization: how it is normalized.
      value: a reference value for users to compare with: what the loss is, before it is
        multiplied by the weight, if `condition` holds.
      condition: the state of the router or of the model, in words, for which theory gives `value`,
        such as perfectly balanced routing.
    """

    name: str
    weight: float
    normalization: str
    value: float
    condition: str

    def line(self) -> str:
        """Returns the line that a run prints."""
        return (
            f"{self.name}: weight {self.weight:g}, {self.normalization}; {self.value:.6g} "
            f"{self.condition}, which adds {self.weight * self.value:.3g} to the loss"
        )


def description_lines(config: Config) -> list[str]:
    """Returns a line for each auxiliary loss that is used, and one for the bias rule, if any."""
    if config.is_dense:
        vocabulary = _vocabulary_z_loss(config)
        return [vocabulary.line()] if vocabulary.weight else []
    losses = [
        _balance_loss(config),
        _width_penalty(config),
        _router_z_loss(config),
        _vocabulary_z_loss(config),
    ]
    lines = [loss.line() for loss in losses if loss.weight]
    if config.moe.bias_rule != "none":
        lines.append(_bias_line(config))
    return lines


def router_warnings(config: Config) -> list[str]:
    """Returns a warning if the cross-entropy has no gradient with respect to a router."""
    gate = config.moe.gate
    consequence = "so the cross-entropy does not train the router; only auxiliary losses can"
    if config.is_dense:
        return []
    if gate == "uniform":
        return [f"warning: moe.gate=uniform ignores the router's logits, {consequence}"]
    # A softmax over the single expert of a pool is 1, even if it is not renormalized.
    if gate in RENORMALIZED_GATES:
        reason = "with one expert per token"
        constant = [pool.top_k == 1 for pool in config.pools]
    elif gate == "softmax_top_k":
        reason = "with a single expert"
        constant = [pool.num_experts == 1 for pool in config.pools]
    else:
        return []
    numbers = [str(number) for number, is_constant in enumerate(constant) if is_constant]
    if not numbers:
        return []
    place = f" in pool {', '.join(numbers)} of moe.pools" if len(config.pools) > 1 else ""
    return [f"warning: moe.gate={gate} is always 1 {reason}{place}, {consequence}"]


def _balance_loss(config: Config) -> AuxiliaryLoss:
    moe = config.moe
    choices = "first choices" if moe.balance_loss_count == "argmax" else "all choices"
    if moe.balance_loss_over_choices == "mean":
        choices = f"mean over {choices}"
    per_layer = sum(_value_at_balance(config))
    return AuxiliaryLoss(
        name="load-balancing loss",
        weight=moe.balance_loss_weight,
        normalization=f"{choices}, {_over_layers(config)}",
        value=per_layer * _layer_factor(config),
        condition="at perfect balance",
    )


def _value_at_balance(config: Config) -> list[int]:
    """Returns the load-balancing loss of each pool if its experts are equally loaded.

    It is the number of choices of a token that are counted, or 1 for their mean.
    """
    moe = config.moe
    if moe.balance_loss_count == "argmax" or moe.balance_loss_over_choices == "mean":
        return [1 for _ in config.pools]
    return [pool.top_k for pool in config.pools]


def _width_penalty(config: Config) -> AuxiliaryLoss:
    is_mean = config.moe.width_penalty_scale == "mean"
    per_layer = 0.0
    first = 0
    for pool in config.pools:
        widths = config.widths[first : first + pool.num_experts]
        mean = sum(widths) / len(widths)
        unit = mean if is_mean else max(widths)
        per_layer += pool.top_k * mean / unit if unit else 0.0
        first += pool.num_experts
    return AuxiliaryLoss(
        name="width penalty",
        weight=config.moe.width_penalty_weight,
        normalization=(
            f"widths over their {'mean' if is_mean else 'maximum'}, {_over_layers(config)}"
        ),
        value=per_layer * _layer_factor(config),
        condition="at perfect balance",
    )


def _router_z_loss(config: Config) -> AuxiliaryLoss:
    per_layer = sum(math.log(pool.num_experts) ** 2 for pool in config.pools)
    return AuxiliaryLoss(
        name="router z-loss",
        weight=config.moe.z_loss_weight,
        normalization=f"mean over tokens, {_over_layers(config)}",
        value=per_layer * _layer_factor(config),
        condition="if all router logits are 0",
    )


def _vocabulary_z_loss(config: Config) -> AuxiliaryLoss:
    return AuxiliaryLoss(
        name="vocabulary z-loss",
        weight=config.training.vocab_z_loss_weight,
        normalization="mean over targets",
        value=math.log(config.model.vocab_size) ** 2,
        condition="if all logits are 0",
    )


def _over_layers(config: Config) -> str:
    verb = "averaged" if config.moe.auxiliary_over_layers == "mean" else "summed"
    return f"{verb} over {config.model.num_layers} layers"


def _layer_factor(config: Config) -> int:
    """Returns the factor from the value of one layer to the value that is weighted."""
    return 1 if config.moe.auxiliary_over_layers == "mean" else config.model.num_layers


def _bias_line(config: Config) -> str:
    moe = config.moe
    schedule = "constant"
    if moe.bias_schedule != "constant":
        schedule = f"{moe.bias_schedule} decay to 0 at step {config.training.steps}"
    recentered = ", recentered to mean 0" if moe.bias_recenter else ""
    return f"router bias: {moe.bias_rule} rule, rate {moe.bias_rate:g}, {schedule}{recentered}"
