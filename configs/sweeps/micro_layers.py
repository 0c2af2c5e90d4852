"""Part 3 of the micro ladder: forms of the layer at S, 24 runs.

    python -m modse_jax sweep --sweep=configs/sweeps/micro_layers.py --workdir=sweeps/micro_layers

Every mixture has eight times the parameters of the dense FFN, and its active width. The questions:
what does a capacity cost, in training and in evaluation? Does a shared expert help, and where? Do
two pools of different widths, or experts of different widths in one pool (MoDSE), beat equal ones?
"""

from fractions import Fraction

from configs.sweeps import micro_ladder
from modse_jax.study import arms
from modse_jax.study.arms import PoolOfArm, Size
from modse_jax.sweeps.definition import Arm, Sweep, choices, product, seeds

GRANULARITY = Fraction(1, 4)
EXPERTS = 32
CAPACITY = 1.2

POOLS = (PoolOfArm(16, GRANULARITY, 2), PoolOfArm(32, GRANULARITY / 2, 4))

# Pairs of widths in units of a quarter of the width of an equal expert; each pair sums to two.
PAIRS = ((7, 1), (6, 2), (5, 3), (4, 4))


def layer_arms(size: Size) -> list[Arm]:
    """Returns the forms of the layer."""
    equal = arms.mixture_options(size, EXPERTS, GRANULARITY)
    limited = {**equal, "moe.capacity_factor": CAPACITY}
    widths = tuple(part * equal["moe.width"] // 4 for pair in PAIRS for part in pair)

    def shared(placement: str) -> dict:
        # The shared expert replaces one routed expert, so that total and active width stay.
        return arms.shared_options(size, EXPERTS - 1, GRANULARITY, GRANULARITY, placement)

    return choices(
        {
            "dense": arms.dense_options(size),
            "equal": equal,
            "capacity": limited,
            "capacity in evaluation": {**limited, "evaluation.capacity_factor": CAPACITY},
            "shared in layer": shared("in_layer"),
            "shared parallel": shared("parallel"),
            "pools": arms.pools_options(size, POOLS),
            "pairs": {**equal, "moe.widths": widths * (EXPERTS // len(widths)), "moe.pairs": True},
        }
    )


def get_sweep() -> Sweep:
    """Returns the sweep."""
    size = micro_ladder.S
    return Sweep(
        base=micro_ladder.base_config(size),
        arms=product(layer_arms(size), micro_ladder.rates(micro_ladder.RATE), seeds(0, 1, 2)),
        fixed=micro_ladder.FIXED,
    )
