"""The grid of Slicing and Dicing: 343 mixtures and 7 dense models, with the study's recipe.

    python -m modse_jax sweep --sweep=configs/sweeps/study_grid.py --dry_run --flops_per_second=4e14

Within a size, all arms train on the same tokens with the same active width; the FLOPs of routers
differ. The study trains every arm at one learning rate, so its ranking of shapes may be one of
shapes that suit this rate: `--dry_run` warns of that. The data is not part of this repository; see
`data.source` in modse_jax/study/recipe.py.
"""

from modse_jax.study import arms
from modse_jax.sweeps.definition import Sweep, from_configs


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        arms=from_configs(dict(arms.build_grid())),
        fixed={"tokens": 0},
        fixed_within=("model.dim",),
    )
