"""Two pools with a router each: 16 experts of width 240, top-2, and 32 of width 120, top-4.

    python train.py --config=configs/study/two_pools.py --workdir=runs/two_pools

Each pool has half of the active and half of the total FFN parameters, so s = 8. The output is
(2 y_1 + 4 y_2) / 6. Compare with one pool of either width: grid_cell.py (n = 32, g = 1/4) and
n = 64, g = 1/8.

The study's plot: 5.539 (g = 1/4: 5.449, g = 1/8: 5.571).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    pools = (
        arms.PoolOfArm(experts=16, granularity=Fraction(1, 4), active=2),
        arms.PoolOfArm(experts=32, granularity=Fraction(1, 8), active=4),
    )
    return loading.to_option_dict(arms.build_pools(size, pools))
