"""Times one MoE layer, forward + backward, with many experts and with pools.

    python -m benchmarks.many_experts [--json=FILE] [--repeats=9] [--parts=cost,experts,pools]

All layers have model width 240 and get 4,096 random tokens in float32.

cost     1,024 experts of width 240 (and of width 60, which 50 million active parameters have),
         top-16: peak memory, and the share of routing and dispatch in the time of the layer.
experts  8 to 1,024 experts of width 120, top-8: time and compile time over those of 8 experts.
pools    two pools, (16, 240, top-2) and (32, 120, top-4), over one pool of the same 48 experts,
         top-6.

Legend: D model width, T tokens, K top-k, E experts.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import timing
from modse_jax.moe import dispatch, router
from modse_jax.moe.layer import MoELayer
from modse_jax.moe.layer_options import Pool, RouterOptions
from modse_jax.runtime import sharding

PARTS = flags.DEFINE_list("parts", ["cost", "experts", "pools"], "What to measure.")
DIM = 240
TOKENS = 4096


class Shape(NamedTuple):
    """A layer to time."""

    widths: tuple[int, ...]
    pools: tuple[Pool, ...]
    dim: int = DIM
    tokens: int = TOKENS

    @property
    def top_k(self) -> int:
        """Experts per token, over all pools."""
        return sum(pool.top_k for pool in self.pools)


def equal_shape(num_experts: int, width: int, top_k: int, **sizes: int) -> Shape:
    """Returns the shape of a layer with one pool of equal experts."""
    return Shape((width,) * num_experts, (Pool(num_experts, top_k),), **sizes)


class LayerParts:
    """Functions that run a layer, or its routing and dispatch alone, forward and backward."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.options = RouterOptions(pools=shape.pools, gate="softmax_top_k")
        layer = MoELayer(shape.dim, shape.widths, self.options, rngs=nnx.Rngs(0))
        self.graph, state = nnx.split(layer)
        self.weights = nnx.to_pure_dict(state)
        keys = jax.random.split(jax.random.key(1))
        self.x_TD = jax.random.normal(keys[0], (shape.tokens, shape.dim))
        self.dy_TD = jax.random.normal(keys[1], (shape.tokens, shape.dim))

    def layer(self) -> tuple[Callable, tuple]:
        """Returns (function, arguments) of the whole layer."""

        def run(weights: dict, x_TD: jax.Array) -> jax.Array:
            out = nnx.merge(self.graph, weights)(x_TD[None])
            return jnp.sum(out.y_BLD[0] * self.dy_TD) + out.balance_loss + out.z_loss

        return jax.value_and_grad(run, argnums=(0, 1)), (self.weights, self.x_TD)

    def routing(self) -> tuple[Callable, tuple]:
        """Returns (function, arguments) of the layer without the expert FFN."""
        valid_T = jnp.ones((self.shape.tokens,), bool)
        chip = sharding.chip_name(None)

        def run(w_gate: jax.Array, x_TD: jax.Array) -> jax.Array:
            weights = router.RouterWeights(w_gate)
            out = router.route(x_TD, valid_T, weights, self.options, self.shape.widths, chip)
            plan = dispatch.plan_dispatch(out.ids_TK, valid_T, len(self.shape.widths), chip)
            y_TD = dispatch.combine(dispatch.dispatch(x_TD, plan), out.gates_TK, plan)
            return jnp.sum(y_TD * self.dy_TD) + out.balance_loss + out.z_loss

        arguments = (self.weights["router_gate"], self.x_TD)
        return jax.value_and_grad(run, argnums=(0, 1)), arguments

    def count_tokens(self) -> list[int]:
        """Returns the number of tokens that every expert gets."""
        out = nnx.merge(self.graph, self.weights)(self.x_TD[None])
        return np.asarray(out.statistics.counts_KE).sum(axis=0).tolist()


def measure_cost(shapes: Sequence[Shape], repeats: int) -> list[dict]:
    """Measures peak memory, and the share of routing and dispatch in the time of a layer."""
    rows = []
    for shape in shapes:
        parts = LayerParts(shape)
        cases = timing.compile_all({"layer": parts.layer(), "routing": parts.routing()})
        seconds = timing.time_interleaved(cases, repeats)
        rows.append(
            {
                "part": "cost",
                **describe(shape),
                "layer_seconds": float(np.median(seconds["layer"])),
                "routing_seconds": float(np.median(seconds["routing"])),
                "routing_share": timing.median_ratio(seconds["routing"], seconds["layer"]),
                # Parameters and their gradients included.
                "peak_bytes": cases["layer"].peak_bytes,
                "parameter_bytes": 4 * sum(leaf.size for leaf in jax.tree.leaves(parts.weights)),
            }
        )
    return rows


def measure_experts(shapes: Sequence[Shape], repeats: int) -> list[dict]:
    """Compares layers of rising numbers of experts with the first one."""
    cases = {}
    for index, shape in enumerate(shapes):
        cases |= timing.compile_all({index: LayerParts(shape).layer()})
    seconds = timing.time_interleaved(cases, repeats)
    return [
        {
            "part": "experts",
            **describe(shape),
            "layer_seconds": float(np.median(seconds[index])),
            "over_first": timing.median_ratio(seconds[index], seconds[0]),
            "compile_seconds": cases[index].compile_seconds,
        }
        for index, shape in enumerate(shapes)
    ]


def measure_pools(pooled: Shape, repeats: int) -> list[dict]:
    """Compares a layer with pools to one with a single pool of the same experts."""
    single = pooled._replace(pools=(Pool(len(pooled.widths), pooled.top_k),))
    parts = {name: LayerParts(shape) for name, shape in (("pools", pooled), ("single", single))}
    cases = timing.compile_all({name: part.layer() for name, part in parts.items()})
    seconds = timing.time_interleaved(cases, repeats)
    work = {
        name: int(np.dot(part.count_tokens(), part.shape.widths)) for name, part in parts.items()
    }
    ratio = timing.median_ratio(seconds["pools"], seconds["single"])
    return [
        {
            "part": "pools",
            **describe(pooled),
            "layer_seconds": float(np.median(seconds["pools"])),
            "over_single_pool": ratio,
            # Routed tokens times hidden units: the routers spread tokens differently over widths.
            "work_over_single_pool": work["pools"] / work["single"],
        }
    ]


def describe(shape: Shape) -> dict:
    """Returns the columns that name a shape."""
    return {
        "experts": [pool.num_experts for pool in shape.pools],
        "top_k": [pool.top_k for pool in shape.pools],
        "widths": sorted(set(shape.widths)),
        "dim": shape.dim,
        "tokens": shape.tokens,
    }


def main(_: Sequence[str]) -> None:
    """Prints a JSON object for each shape, and writes --json."""
    repeats = timing.REPEATS.value
    rows = []
    if "cost" in PARTS.value:
        rows += measure_cost([equal_shape(1024, width, 16) for width in (60, 240)], repeats)
    if "experts" in PARTS.value:
        rows += measure_experts([equal_shape(n, 120, 8) for n in (8, 32, 128, 512, 1024)], repeats)
    if "pools" in PARTS.value:
        pooled = Shape((240,) * 16 + (120,) * 32, (Pool(16, 2), Pool(32, 4)))
        rows += measure_pools(pooled, repeats)
    for row in rows:
        print(json.dumps(row), flush=True)
    timing.write({"machine": timing.describe_machine(), "rows": rows})


if __name__ == "__main__":
    timing.run(main)
