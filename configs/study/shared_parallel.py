"""A shared expert in parallel, as in the study's code: routed experts read the block's input.

    python train.py --config=configs/study/shared_parallel.py --workdir=runs/shared_parallel

31 routed experts of width 240, top-3, read the input of the block and have a norm of their own; the
shared expert of width 240 reads the sum after attention. So two things differ from grid_cell.py:
the shared expert, and the place of the routed ones. shared_in_layer.py changes only the first.

The study's plot: 5.523 (without a shared expert: 5.449).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    config = arms.build_shared(size, 31, Fraction(1, 4), Fraction(1, 4), placement="parallel")
    return loading.to_option_dict(config)
