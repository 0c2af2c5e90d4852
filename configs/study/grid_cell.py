"""A cell of the grid of Slicing and Dicing at 50M: 32 experts of 1/4 of the dense width, top-4.

    python train.py --config=configs/study/grid_cell.py --workdir=runs/grid_cell

This is n = 32, g = 1/4, k = 4, so s = n g = 8: eight times the FFN parameters of the dense arm, at
its FLOPs. The config claims k g = 1 with `moe.flop_matched_width`; a change that breaks it is
refused. `grid_cell.py:110M` is another size; other cells are other arguments of
`arms.build_mixture`.

The study's plot: 5.449 (dense: 5.700).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    return loading.to_option_dict(arms.build_mixture(size, 32, Fraction(1, 4)))
