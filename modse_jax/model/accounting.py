"""Numbers of parameters and FLOPs of a model, computed from its config alone.

Tests check the numbers of parameters against the built model. FLOPs count the multiplications and
additions of matmuls, including attention scores over the full context. This is the convention of
PaLM (appendix B), which most published values of model FLOPs utilization use.

Legend: D model, E experts, L length.
"""

from typing import NamedTuple

import numpy as np

from modse_jax.config.options import Config


class ParameterCounts(NamedTuple):
    """Numbers of parameters, summed over layers."""

    embeddings: int
    attention: int
    experts: int  # all experts, used or not
    gates: int  # the router
    norms: int

    @property
    def total(self) -> int:
        """Returns the number of all parameters."""
        return sum(self)

    @property
    def weights(self) -> int:
        """Returns the number of parameters in attention, experts and embeddings.

        The tables of the paper count these; they leave out gates and norms.
        """
        return self.embeddings + self.attention + self.experts


def count_parameters(config: Config) -> ParameterCounts:
    """Returns the number of parameters of every part of the model."""
    model = config.model
    D = model.dim
    E = config.num_experts
    key_value_dim = (model.num_kv_heads or model.num_heads) * (D // model.num_heads)
    router_gate = D * E
    router_noise = D * E + E if config.moe.router_noise == "learned" else 0
    num_embeddings = 1 if model.tie_embeddings else 2
    return ParameterCounts(
        embeddings=num_embeddings * model.vocab_size * D,
        attention=model.num_layers * (2 * D * D + 2 * D * key_value_dim),
        experts=model.num_layers * 3 * D * sum(config.widths),
        gates=model.num_layers * (router_gate + router_noise),
        norms=(2 * model.num_layers + 1) * D,
    )


def active_expert_parameters(config: Config, mean_width: float) -> int:
    """Returns the expert parameters that a token uses, summed over layers.

    Args:
        mean_width: mean width of the K experts of a token.
    """
    return round(config.model.num_layers * 3 * config.model.dim * config.top_k * mean_width)


def active_parameters(config: Config, mean_width: float | None = None) -> int:
    """Returns the parameters that a token uses, without gates and norms, as in the paper.

    Args:
        mean_width: mean width of the K experts of a token; None for the mean over all experts,
            which is right if all experts get equal numbers of tokens.
    """
    counts = count_parameters(config)
    width = nominal_width(config) if mean_width is None else mean_width
    return counts.weights - counts.experts + active_expert_parameters(config, width)


def nominal_width(config: Config) -> float:
    """Returns the mean width of all experts.

    It is the mean width of the chosen experts if all experts get equal numbers of tokens.
    """
    return sum(config.widths) / len(config.widths)


def realized_width(config: Config, tokens_E: np.ndarray) -> float:
    """Returns the mean width of the chosen experts, weighted by their numbers of tokens.

    Args:
        tokens_E: number of tokens routed to every expert, with any leading axes, which are summed.
    """
    num_experts = len(config.widths)
    tokens_E = np.asarray(tokens_E, np.float64).reshape(-1, num_experts).sum(axis=0)
    return float(tokens_E @ np.array(config.widths) / max(tokens_E.sum(), 1))


def train_flops_per_token(config: Config, sequence_length: int, mean_width: float) -> float:
    """Returns the FLOPs of the forward and backward pass per token.

    The backward pass counts twice the forward pass. So every active weight in a matmul counts 6
    FLOPs, and the attention scores and their sum over values count 12 * num_layers * D * L.

    Args:
        mean_width: mean width of the K experts of a token.
    """
    model = config.model
    head = model.vocab_size * model.dim
    attention = count_parameters(config).attention
    router = model.num_layers * model.dim * config.num_experts
    weights = head + attention + router + active_expert_parameters(config, mean_width)
    scores = model.num_layers * model.dim * sequence_length
    return 6 * weights + 12 * scores
