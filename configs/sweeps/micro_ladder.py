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

from ml_collections import ConfigDict

from modse_jax.config.loading import default_config
from modse_jax.study import arms
from modse_jax.study.arms import Size
from modse_jax.study.recipe import FINAL_RATIO
from modse_jax.sweeps.definition import Arm, choices

SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
RATE = 1e-2  # of the parts after micro_rates; choose it by the results of that part

# Routers make the FLOPs of shapes differ.
FIXED = {"tokens": 0, "flops_per_token": 0.05}

# The numbers of parameters are those of attention and the dense FFN.
XS = Size("XS", 73_728, dim=48, num_layers=2, num_heads=2, vocab_size=2048)
S = Size("S", 196_608, dim=64, num_layers=3, num_heads=2, vocab_size=2048)
M = Size("M", 442_368, dim=96, num_layers=3, num_heads=3, vocab_size=2048)


def base_config(size: Size) -> ConfigDict:
    """Returns the config of a size, which every arm overrides with its layer."""
    config = default_config()
    config.update_from_flattened_dict(arms.size_options(size, BATCH_SIZE * SEQUENCE_LENGTH))
    config.update_from_flattened_dict(arms.mixture_options(size, 1, Fraction(1)))
    config.model.context_length = SEQUENCE_LENGTH
    config.moe.gate = "softmax_top_k"
    config.moe.auxiliary_over_layers = "mean"
    config.data.update(
        source="python_stdlib", tokenizer="sentencepiece", sequence_length=SEQUENCE_LENGTH
    )
    config.training.update(batch_size=BATCH_SIZE, log_every=50, checkpoint_every=500)
    config.checkpoint.keep = 2
    config.optimizer.warmup_steps = 50
    config.advanced.update(loss_chunk=512, block_rows=256)
    return config


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
            "dense": arms.dense_options(size),
            **{f"n{n} g{g}": arms.mixture_options(size, n, g) for n, g in cells},
        }
    )
