"""A capacity limit: an expert takes at most 1.2 times its even share of tokens in training.

    python train.py --config=configs/study/capacity.py --workdir=runs/capacity

The layer is that of grid_cell.py. Tokens over the limit are dropped, token by token in the order of
the batch. Validation is dropless; for the study's, which drops too, add
--config.evaluation.capacity_factor=1.2, or evaluate the checkpoints both ways. Both are worth
reporting: much of what a limit seems to cost may be tokens that are dropped in validation.

The study's plot, with the limit in training and validation: 5.730 (dropless: 5.449).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    config = arms.build_mixture(size, 32, Fraction(1, 4))
    return loading.to_option_dict(arms.limit_capacity(config, 1.2))
