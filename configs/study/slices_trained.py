"""Slices without more parameters: the dense FFN cut into 4 experts that are all active, s = 1.

    python train.py --config=configs/study/slices_trained.py --workdir=runs/slices_trained

The router chooses all 4 experts for every token, so it only decides their weights. Compare with
dense.py, which has the same parameters without a router, and with slices_uniform.py.

The study's plot: 5.772 (uniform weights: 5.768, dense: 5.700): slicing alone does not help.
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    return loading.to_option_dict(arms.build_slices(size, Fraction(1, 4), "softmax_top_k"))
