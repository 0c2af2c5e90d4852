"""Part 1 of the micro ladder: three shapes at four learning rates, on two CPU cores.

    python -m modse_jax sweep --sweep=configs/sweeps/micro_rates.py --workdir=sweeps/micro_rates

The question: which learning rate suits which shape? The later parts use the answer. The shapes need
the same FLOPs per token, up to their routers: a dense FFN, 32 experts of a quarter of its width of
which a token uses four, and 16 experts of its full width of which a token uses one.
"""

from fractions import Fraction

from configs.sweeps import micro_ladder
from modse_jax.sweeps.definition import Sweep, product

CELLS = ((32, Fraction(1, 4)), (16, Fraction(1)))


def get_sweep() -> Sweep:
    """Returns the sweep."""
    size = micro_ladder.XS
    return Sweep(
        base=micro_ladder.base_config(size),
        arms=product(micro_ladder.shapes(size, CELLS), micro_ladder.rates(1e-3, 3e-3, 1e-2, 3e-2)),
        fixed=micro_ladder.FIXED,
    )
