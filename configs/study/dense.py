"""The dense arm of Slicing and Dicing at 50M: a SwiGLU FFN of width 960 in place of every mixture.

    python train.py --config=configs/study/dense.py --workdir=runs/dense

It has no router, no experts and none of their losses. Every other arm of a size has its number of
tokens and, but for the router, its FLOPs. `dense.py:110M` is another size.

The study's plots: 5.700, the mean cross-entropy of 11 validation sets in nats.
"""

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    return loading.to_option_dict(arms.build_dense(size))
