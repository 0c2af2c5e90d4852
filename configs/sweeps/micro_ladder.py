"""What the sweeps of the micro ladder share: three sizes of models for two CPU cores.

The data is the source of Python's standard library with 2,048 sentencepiece pieces. A run trains on
20 tokens per parameter of a dense model without embeddings, in many small steps, because on a CPU
small steps learn more per second.

    micro_rates.py    part 1: learning rates of three shapes, 12 runs of XS, about 12 minutes
    micro_grid.py     part 2: granularity and sparsity, 34 runs of XS
    micro_layers.py   part 3: capacity, shared experts, pools and widths, 24 runs of S
    micro_sizes.py    part 4: granularity, 8 runs of M
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ml_collections import ConfigDict

from modse_jax.config.loading import default_config
from modse_jax.sweeps.definition import Arm, choices

TOKENS_PER_PARAMETER = 20
DENSE_RATIO = 4  # width of the dense FFN over the model width
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
FINAL_RATIO = 0.1  # last learning rate over the peak
RATE = 1e-2  # of the parts after micro_rates; choose it by the results of that part

# Routers make the FLOPs of shapes differ.
FIXED = {"tokens": 0, "flops_per_token": 0.05}


class Size(NamedTuple):
    """A size of the model."""

    dim: int
    num_layers: int
    num_heads: int

    @property
    def dense_width(self) -> int:
        """Returns the width of the dense FFN."""
        return DENSE_RATIO * self.dim

    @property
    def steps(self) -> int:
        """Returns the number of training steps."""
        parameters = self.num_layers * (4 * self.dim**2 + 3 * self.dim * self.dense_width)
        return TOKENS_PER_PARAMETER * parameters // (BATCH_SIZE * SEQUENCE_LENGTH)


# 73,728, 196,608 and 442,368 parameters without embeddings.
SIZES = {
    "XS": Size(dim=48, num_layers=2, num_heads=2),
    "S": Size(dim=64, num_layers=3, num_heads=2),
    "M": Size(dim=96, num_layers=3, num_heads=3),
}


def base_config(size: Size) -> ConfigDict:
    """Returns the config of a size, which every arm overrides with its layer."""
    config = default_config()
    config.model.update(
        dim=size.dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        context_length=SEQUENCE_LENGTH,
        vocab_size=2048,
    )
    config.moe.flop_matched_width = size.dense_width
    config.moe.width = size.dense_width
    config.moe.num_experts = 1
    config.moe.top_k = 1
    config.moe.gate = "softmax_top_k"
    config.moe.auxiliary_over_layers = "mean"
    config.data.update(
        source="python_stdlib", tokenizer="sentencepiece", sequence_length=SEQUENCE_LENGTH
    )
    config.training.update(
        batch_size=BATCH_SIZE, steps=size.steps, log_every=50, checkpoint_every=500
    )
    config.checkpoint.keep = 2
    config.optimizer.warmup_steps = 50
    config.advanced.update(loss_chunk=512, block_rows=256)
    return config


def dense(size: Size) -> dict:
    """Returns the options of the dense arm."""
    return {"model.dense_width": size.dense_width}


def experts(size: Size, num_experts: int, granularity: Fraction) -> dict:
    """Returns the options of n experts of granularity g, of which a token uses 1 / g."""
    return {
        "moe.num_experts": num_experts,
        "moe.top_k": int(1 / granularity),
        "moe.width": int(granularity * size.dense_width),
    }


def rates(*peaks: float) -> list[Arm]:
    """Returns an arm for every peak of the learning rate, whose schedule ends at a tenth of it."""
    return choices(
        {
            f"rate={peak:g}": {
                "optimizer.learning_rate": peak,
                "optimizer.final_learning_rate": FINAL_RATIO * peak,
            }
            for peak in peaks
        }
    )


def shapes(size: Size, cells: Sequence[tuple[int, Fraction]]) -> list[Arm]:
    """Returns the dense arm, and an arm for every (number of experts, granularity)."""
    return choices(
        {
            "dense": dense(size),
            **{f"n{n} g{g}": experts(size, n, g) for n, g in cells},
        }
    )
