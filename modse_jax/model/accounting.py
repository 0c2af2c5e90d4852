"""Parameters and FLOPs of a model from its config alone; tests check them against the built model.

FLOPs count multiplications and additions of matrix products, attention scores over the whole context included (the
convention of PaLM, appendix B, which most published MFU use). Legend: D model, E experts, K top-k, H flat hidden axis.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from modse_jax.config.options import Config
from modse_jax.runtime import chips


class Parameters(NamedTuple):
    """Counts over all layers. `experts` are all of them; `gates` and `norms` are what the paper's totals leave out."""

    embeddings: int
    attention: int
    experts: int
    gates: int
    norms: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def weights(self) -> int:
        """Attention, experts and embeddings: what the paper's tables count."""
        return self.embeddings + self.attention + self.experts


def parameters(config: Config) -> Parameters:
    """Every parameter of the model."""
    m, D, E = config.model, config.model.dim, config.moe.num_experts
    kv = (m.num_kv_heads or m.num_heads) * (D // m.num_heads)
    gates = 2 * D * E + E if config.moe.gate_term == "learned" else D * E
    return Parameters(
        embeddings=m.vocab_size * D * (1 if m.tie_embeddings else 2),
        attention=m.num_layers * (2 * D * D + 2 * D * kv),
        experts=m.num_layers * 3 * D * sum(config.widths),
        gates=m.num_layers * gates,
        norms=(2 * m.num_layers + 1) * D,
    )


def active_experts(config: Config, mean_width: float) -> int:
    """Expert parameters that K experts of the given mean width use, over all layers."""
    return round(config.model.num_layers * 3 * config.model.dim * config.moe.top_k * mean_width)


def active_parameters(config: Config, mean_width: float | None = None) -> int:
    """Parameters a token meets, gates and norms left out as in the paper.

    Args: mean_width: of the chosen experts; by default the mean over experts, right when all get equal counts.
    """
    width = nominal_width(config) if mean_width is None else mean_width
    return parameters(config).weights - parameters(config).experts + active_experts(config, width)


def nominal_width(config: Config) -> float:
    """Mean expert width: the mean of the chosen experts when all get equal counts."""
    return sum(config.widths) / len(config.widths)


def realised_width(config: Config, tokens_E: np.ndarray) -> float:
    """Mean width of the chosen experts, weighted by tokens per expert ([..., E], any leading axes)."""
    tokens_E = np.asarray(tokens_E, np.float64).reshape(-1, len(config.widths)).sum(axis=0)
    return float(tokens_E @ np.array(config.widths) / max(tokens_E.sum(), 1))


def train_flops_per_token(config: Config, sequence_length: int, mean_width: float) -> float:
    """Forward and backward: 3 x forward; 6 per active weight met in a product, and 12 * layers * D * L for scores."""
    m = config.model
    p = parameters(config)
    head = m.vocab_size * m.dim
    weights = head + p.attention + m.num_layers * m.dim * config.moe.num_experts
    return (
        6 * (weights + active_experts(config, mean_width))
        + 12 * m.num_layers * m.dim * sequence_length
    )


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s of devices of one kind together: from the table, on CPU measured by a float32 matrix product (the devices
    of a process share its cores); None where unknown."""
    chip = chips.chip_name(devices[0])
    if chip == "cpu":
        return _measure_cpu() * len({device.process_index for device in devices})
    return chips.CHIPS[chip].teraflops * 1e12 * len(devices) if chip in chips.CHIPS else None


@functools.cache
def _measure_cpu(size: int = 1536, repeats: int = 5) -> float:
    """Best of a few products of square matrices: what this machine reaches, not what its maker prints."""
    import time

    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
