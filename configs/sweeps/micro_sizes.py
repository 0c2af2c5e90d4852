"""Part 4 of the micro ladder: granularity at M, eight times the expert parameters, 8 runs.

    python -m modse_jax sweep --sweep=configs/sweeps/micro_sizes.py --workdir=sweeps/micro_sizes

The question: does the order of granularities at XS hold for a model of six times its size?
"""

from fractions import Fraction

from configs.sweeps import micro_ladder
from modse_jax.sweeps.definition import Sweep, product, seeds

SPARSITY = 8
CELLS = [(SPARSITY * k, Fraction(1, k)) for k in (2, 4, 8)]


def get_sweep() -> Sweep:
    """Returns the sweep."""
    size = micro_ladder.SIZES["M"]
    return Sweep(
        base=micro_ladder.base_config(size),
        arms=product(
            micro_ladder.shapes(size, CELLS), micro_ladder.rates(micro_ladder.RATE), seeds(0, 1)
        ),
        fixed=micro_ladder.FIXED,
    )
