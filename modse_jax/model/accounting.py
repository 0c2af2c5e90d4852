"""Numbers of parameters and FLOPs of a model, computed from its config alone, to the unit.

Tests check the numbers of parameters against the built model. FLOPs are those of training: the
backward pass counts twice the forward pass. There are three numbers per token:

- nominal: the experts of a pool receive equally many tokens;
- realized: from the routing that happened, without dropped tokens and without padding;
- OLMo-core's, which the code of Slicing and Dicing logs: nominal, plus 6 for every parameter of a
  norm except QK-norm.

The first two count the multiplications and additions of matmuls (PaLM, appendix B, which most
published values of model FLOPs utilization use): 6 for every weight that a token meets, the router
and its learned noise included, the input embedding and norms not. All three count attention scores
over the full context, 12 * num_layers * D * L.

Legend: D model, E experts, L length.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from modse_jax.config.options import Config
from modse_jax.moe import expert_widths


class ParameterCounts(NamedTuple):
    """Numbers of parameters, summed over layers.

    Attributes:
        embeddings: the input embedding and the output head; one matrix if they are tied.
        attention: its four projections.
        dense: FFNs of a dense model.
        shared: shared experts.
        experts: routed experts.
        router: router matrices and the learned noise.
        norms: norms of the blocks, QK-norms and the final norm.
    """

    embeddings: int
    attention: int
    dense: int
    shared: int
    experts: int
    router: int
    norms: int

    @property
    def total(self) -> int:
        """Returns the number of all parameters."""
        return sum(self)

    @property
    def weights(self) -> int:
        """Returns the number of parameters without router and norms.

        The tables of MoDSE count these.
        """
        return self.total - self.router - self.norms


def count_parameters(config: Config) -> ParameterCounts:
    """Returns the number of parameters of every part of the model."""
    model = config.model
    D = model.dim
    num_layers = model.num_layers
    num_embeddings = 1 if model.tie_embeddings else 2
    return ParameterCounts(
        embeddings=num_embeddings * model.vocab_size * D,
        attention=num_layers * (2 * D * D + 2 * D * _key_value_dim(config)),
        dense=num_layers * 3 * D * model.dense_width,
        shared=num_layers * 3 * D * _shared_width(config),
        experts=num_layers * 3 * D * sum(config.widths),
        router=_count_router_matmuls(config) + _count_noise_scales(config),
        norms=_count_block_norms(config) + _count_qk_norms(config),
    )


def count_active_parameters(config: Config, mean_width: float | None = None) -> ParameterCounts:
    """Returns the number of parameters that a token uses, of every part of the model.

    Args:
        config: the config.
        mean_width: mean width of the experts of a token; None if the experts of a pool receive
            equally many tokens.
    """
    routed_width = nominal_routed_width(config)
    if mean_width is not None:
        routed_width = Fraction(config.top_k * mean_width)
    experts = round(_expert_parameters(config, routed_width))
    return count_parameters(config)._replace(experts=experts)


def nominal_routed_width(config: Config) -> Fraction:
    """Returns the hidden units of routed experts that a token uses per layer, exactly.

    The experts of a pool are taken to receive equally many tokens.
    """
    if config.is_dense:
        return Fraction(0)
    return expert_widths.mean_active_width(config.widths, config.pools)


def realized_width(config: Config, tokens_E: np.ndarray) -> float:
    """Returns the mean width of the chosen experts, weighted by their numbers of tokens.

    Args:
        tokens_E: number of tokens routed to every expert, with any leading axes, which are summed.
    """
    tokens_E = _sum_over_leading_axes(tokens_E, len(config.widths))
    return float(tokens_E @ np.array(config.widths) / max(tokens_E.sum(), 1))


def nominal_flops_per_token(config: Config, sequence_length: int) -> int:
    """Returns the FLOPs of training per token if the experts of a pool are equally loaded."""
    return _flops_per_token(config, sequence_length, nominal_routed_width(config))


def realized_flops_per_token(
    config: Config, sequence_length: int, rows_E: np.ndarray, tokens: int
) -> int:
    """Returns the FLOPs of training per token for the routing that happened, rounded.

    Args:
        config: the config.
        sequence_length: length of the sequences, L.
        rows_E: number of tokens that every expert computed, without dropped ones. Leading axes,
            such as layers, are summed.
        tokens: number of tokens that entered the model, padding included.
    """
    routed_width = Fraction(0)
    if not config.is_dense:
        rows_E = _sum_over_leading_axes(rows_E, len(config.widths))
        hidden_rows = float(rows_E @ np.array(config.widths))
        routed_width = Fraction(hidden_rows) / (tokens * config.model.num_layers)
    return _flops_per_token(config, sequence_length, routed_width)


def olmo_flops_per_token(config: Config, sequence_length: int) -> int:
    """Returns the nominal FLOPs of training per token as OLMo-core counts them.

    Every active parameter except the input embedding and the QK-norms counts 6, those of the other
    norms included. This reproduces the logs of the study Slicing and Dicing to the unit. Its logs
    have no run with a parallel shared expert, so whether they count its norm is not known; here it
    counts.
    """
    norms = 6 * _count_block_norms(config)
    return nominal_flops_per_token(config, sequence_length) + norms


def nominal_expert_flops_per_token(config: Config) -> int:
    """Returns the part of the nominal FLOPs of training that routed experts compute."""
    return round(6 * _expert_parameters(config, nominal_routed_width(config)))


def _flops_per_token(config: Config, sequence_length: int, routed_width: Fraction) -> int:
    """Returns the FLOPs of training per token.

    Args:
        config: the config.
        sequence_length: length of the sequences, L.
        routed_width: hidden units of routed experts that a token uses per layer.
    """
    model = config.model
    counts = count_parameters(config)
    weights = (
        model.vocab_size * model.dim
        + counts.attention
        + counts.dense
        + counts.shared
        + _count_router_matmuls(config)
    )
    scores = model.num_layers * model.dim * sequence_length
    experts = _expert_parameters(config, routed_width)
    return 6 * weights + round(6 * experts) + 12 * scores


def _expert_parameters(config: Config, routed_width: Fraction) -> Fraction:
    """Returns the parameters of experts with that many hidden units in a layer, over all layers."""
    return config.model.num_layers * 3 * config.model.dim * routed_width


def _shared_width(config: Config) -> int:
    return 0 if config.is_dense else config.moe.shared_width


def _key_value_dim(config: Config) -> int:
    """Returns the width of all key heads, or of all value heads."""
    model = config.model
    return (model.num_kv_heads or model.num_heads) * (model.dim // model.num_heads)


def _count_router_matmuls(config: Config) -> int:
    """Returns the parameters of the router's matrices."""
    if config.is_dense:
        return 0
    matrices = 2 if config.moe.router_noise == "learned" else 1
    return config.model.num_layers * matrices * config.model.dim * config.num_experts


def _count_noise_scales(config: Config) -> int:
    """Returns the parameters of the RMSNorm in the learned noise of the router."""
    if config.is_dense or config.moe.router_noise != "learned":
        return 0
    return config.model.num_layers * config.num_experts


def _count_block_norms(config: Config) -> int:
    """Returns the parameters of all norms except QK-norms.

    A block has one norm for attention and one for the FFN, and one more for a parallel shared
    expert; the position of the norms does not change their number.
    """
    is_parallel = not config.is_dense and config.moe.shared_placement == "parallel"
    norms_per_block = 3 if is_parallel else 2
    return (norms_per_block * config.model.num_layers + 1) * config.model.dim


def _count_qk_norms(config: Config) -> int:
    """Returns the parameters of the norms of queries and keys, each over the width of its heads."""
    if config.model.qk_norm == "none":
        return 0
    return config.model.num_layers * (config.model.dim + _key_value_dim(config))


def _sum_over_leading_axes(counts: np.ndarray, num_experts: int) -> np.ndarray:
    return np.asarray(counts, np.float64).reshape(-1, num_experts).sum(axis=0)
