"""Zero and copy experts: 32 experts of width 240, 4 whose output is 0, 4 that return their input.

    python train.py --config=configs/study/zero_and_copy.py --workdir=runs/zero_and_copy

A token chooses 5 of 40 experts. If all are chosen equally often, 4 of the 5 compute, and the FLOPs
of the experts are exactly those of grid_cell.py. What happens is up to the router: `mfu_realised`
in the metrics counts the FLOPs of the routing that happened. Experts of width 0 have no parameters
but their columns of the router.

The study has no such arm. Sources: MoE++ (arXiv 2410.07348), LongCat-Flash.
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config."""
    config = arms.build_mixture(size, 32, Fraction(1, 4))
    width = config.moe.width
    options = {
        "moe.num_experts": 40,
        "moe.top_k": 5,
        "moe.widths": (width,) * 32 + (0,) * 8,
        "moe.copy_experts": (36, 37, 38, 39),
    }
    return loading.to_option_dict(loading.override_options(config, options))
