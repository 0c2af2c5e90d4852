"""A shared expert in the layer: 31 routed experts of width 240, top-3, and one that is always on.

    python train.py --config=configs/study/shared_in_layer.py --workdir=runs/shared_in_layer

The shared expert reads what the routed experts read, and its output is added to theirs, as in
DeepSeekMoE. It takes the place of one routed and of one active expert, so that the parameters and
FLOPs are those of grid_cell.py, but for a column of the router. The study has no runs with this
placement; compare with shared_parallel.py.
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    config = arms.build_shared(size, 31, Fraction(1, 4), Fraction(1, 4), placement="in_layer")
    return loading.to_option_dict(config)
