"""Part 3 of the micro ladder: forms of the layer at S, 24 runs.

    python -m modse_jax sweep --sweep=configs/sweeps/micro_layers.py --workdir=sweeps/micro_layers

Every mixture has eight times the parameters of the dense FFN, and its active width. The questions:
what does a capacity cost, in training and in evaluation? Does a shared expert help, and where? Do
two pools of different widths, or experts of different widths in one pool (MoDSE), beat equal ones?
"""

from fractions import Fraction

from configs.sweeps import micro_ladder
from configs.sweeps.micro_ladder import Size
from modse_jax.sweeps.definition import Arm, Sweep, choices, product, seeds

GRANULARITY = Fraction(1, 4)
EXPERTS = 32
CAPACITY = 1.2

# Pairs of widths in units of a quarter of the width of an equal expert; each pair sums to two.
PAIRS = ((7, 1), (6, 2), (5, 3), (4, 4))


def layer_arms(size: Size) -> list[Arm]:
    """Returns the forms of the layer."""
    equal = micro_ladder.experts(size, EXPERTS, GRANULARITY)
    width = equal["moe.width"]
    limited = {**equal, "moe.capacity_factor": CAPACITY}
    # The shared expert replaces one routed expert, so that total and active width stay.
    shared = {
        **equal,
        "moe.num_experts": EXPERTS - 1,
        "moe.top_k": equal["moe.top_k"] - 1,
        "moe.shared_width": width,
    }
    widths = tuple(part * width // 4 for pair in PAIRS for part in pair)
    return choices(
        {
            "dense": micro_ladder.dense(size),
            "equal": equal,
            "capacity": limited,
            "capacity in evaluation": {**limited, "evaluation.capacity_factor": CAPACITY},
            "shared in layer": {**shared, "moe.shared_placement": "in_layer"},
            "shared parallel": {**shared, "moe.shared_placement": "parallel"},
            "pools": {"moe.pools": ((16, width, 2), (32, width // 2, 4))},
            "pairs": {**equal, "moe.widths": widths * (EXPERTS // len(widths)), "moe.pairs": True},
        }
    )


def get_sweep() -> Sweep:
    """Returns the sweep."""
    size = micro_ladder.SIZES["S"]
    return Sweep(
        base=micro_ladder.base_config(size),
        arms=product(layer_arms(size), micro_ladder.rates(micro_ladder.RATE), seeds(0, 1, 2)),
        fixed=micro_ladder.FIXED,
    )
