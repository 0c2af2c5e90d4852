"""Part 2 of the micro ladder: granularity and sparsity at XS, 34 runs.

    python -m modse_jax sweep --sweep=configs/sweeps/micro_grid.py --workdir=sweeps/micro_grid

The question: how does the loss depend on g and s if the active width is fixed? Every shape is
trained at one rate, and a warning says so: train the best cells at the neighboring rates before you
conclude.
"""

from fractions import Fraction

from configs.sweeps import micro_ladder
from modse_jax.sweeps.definition import Sweep, product, seeds

GRANULARITIES = tuple(Fraction(1, k) for k in (1, 2, 4, 8))
SPARSITIES = (1, 4, 16, 64)
CELLS = [(int(s / g), g) for g in GRANULARITIES for s in SPARSITIES]


def get_sweep() -> Sweep:
    """Returns the sweep."""
    size = micro_ladder.SIZES["XS"]
    return Sweep(
        base=micro_ladder.base_config(size),
        arms=product(
            micro_ladder.shapes(size, CELLS), micro_ladder.rates(micro_ladder.RATE), seeds(0, 1)
        ),
        # The router of 512 experts adds 22% to the FLOPs of the dense model.
        fixed={"tokens": 0, "flops_per_token": 0.25},
    )
