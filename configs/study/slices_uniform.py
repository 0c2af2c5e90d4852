"""Slices with uniform weights: the dense FFN cut into 4 experts, each weighted by 1/4, s = 1.

    python train.py --config=configs/study/slices_uniform.py --workdir=runs/slices_uniform

The weights do not depend on the router, which gets no gradient from the cross-entropy; a run warns
of it when it starts. Compare with slices_trained.py.

The study's plot: 5.768 (trained router: 5.772, dense: 5.700).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    return loading.to_option_dict(arms.build_slices(size, Fraction(1, 4), "uniform"))
