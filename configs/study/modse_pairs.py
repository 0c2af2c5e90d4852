"""MoDSE's pairs of widths in the recipe of Slicing and Dicing: 8 experts of mean width 480, top-2.

    python train.py --config=configs/study/modse_pairs.py --workdir=runs/modse_pairs

The widths are 864 + 96, 768 + 192, 576 + 384 and 480 + 480: the ratios of the MoDSE paper, with the
total width and the nominal FLOPs of n = 8, g = 1/2. One router chooses among all widths, so the
realized FLOPs depend on it. Compare with equal widths, `arms.build_mixture("50M", 8, 1/2)`. The
ratios give whole numbers of hidden units in the sizes 50M, 200M and 500M.

The study has no such arm; with equal widths it prints 5.617.
"""

from fractions import Fraction

from ml_collections import ConfigDict

from modse_jax.config import loading
from modse_jax.errors import UserError
from modse_jax.moe import expert_widths
from modse_jax.study import arms


def get_config(size: str = "50M") -> ConfigDict:
    """Returns the config.

    Raises:
        UserError: a width of this size is not a whole number.
    """
    config = arms.build_mixture(size, 8, Fraction(1, 2))
    dense_width = config.moe.flop_matched_width
    if dense_width % 10:
        raise UserError(
            f"size {size} has no pairs of widths: its dense width, {dense_width}, is not divisible "
            "by 10; choose 50M, 200M or 500M"
        )
    # A pair of the paper has 5 times the model width; here it has the dense width.
    pairs = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dense_width // 5)
    options = {"moe.widths": pairs, "moe.pairs": True}
    return loading.to_option_dict(loading.override_options(config, options))
