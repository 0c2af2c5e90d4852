"""Measures what many narrow experts cost: memory, routing, growth with their number, and pools.

    python -m benchmarks.many_experts [--json=FILE] [--parts=memory,share,...] [--repeats=9]

The parts are

    memory      the peak memory of a training step of one block with 1,024 experts of width 60,
                top-16: as XLA plans it, and as the process grows
    share       the share of routing in the time of that layer: the router, its losses, the plan
                of the dispatch, and both directions of the dispatch
    experts     the time of a layer from 8 to 1,024 experts of one width and one top-k
    granularity the time of a layer from 8 to 1,024 experts whose width times top-k is constant
    pools       two pools over one pool of the same experts and the same number of choices
    accounting  the parameters and FLOPs of all arms of the study

All layers have model width 240 (the study's 50M), and all times are those of the forward and the
backward pass in float32. Cases that are compared run in turn in one process. Times are reported as
ratios of them. --json keeps the parts that the file already has and this run does not measure.

Legend: B sequences in a batch, L sequence length, D model width, N routed tokens, E experts.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import expert_ffn, timing
from modse_jax.config import device_mesh, loading
from modse_jax.config.options import AdvancedConfig, Config
from modse_jax.errors import UserError
from modse_jax.model import accounting
from modse_jax.moe import layer, layer_options
from modse_jax.moe.experts import block_sizes
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.runtime import memory_usage, sharding
from modse_jax.study import arms
from modse_jax.training import programs

PARTS = flags.DEFINE_list("parts", None, "Parts to measure; all by default.")

DIM = 240  # the study's 50M
SEQUENCE_LENGTH = 512
SEQUENCES = 8

BALANCE_LOSS_WEIGHT = 1e-2
Z_LOSS_WEIGHT = 1e-3


class Shape(NamedTuple):
    """The experts of a layer, all of one width.

    Attributes:
        experts: number of experts n.
        top_k: experts per token k, over all pools.
        width: hidden units of an expert.
        pools: number of pools that the experts and the choices are divided into.
    """

    experts: int
    top_k: int
    width: int
    pools: int = 1

    @property
    def name(self) -> str:
        pools = f" in {self.pools} pools" if self.pools > 1 else ""
        return f"{self.experts} of {self.width}, top-{self.top_k}{pools}"

    @property
    def router_options(self) -> layer_options.RouterOptions:
        pool = layer_options.Pool(self.experts // self.pools, self.top_k // self.pools)
        return layer_options.RouterOptions(gate="softmax_top_k", pools=(pool,) * self.pools)


class Workload(NamedTuple):
    """The tokens that a layer is timed with."""

    dim: int
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


WORKLOAD = Workload(DIM, SEQUENCES, SEQUENCE_LENGTH)

# The most experts of the study, at the narrow end: a sixteenth of the dense width 960.
NARROW = Shape(experts=1024, top_k=16, width=60)

# The study's cells of 1/8 of the dense width. A token uses the same weights in all of them.
EXPERT_LADDER = tuple(Shape(n, top_k=8, width=120) for n in (8, 64, 256, 1024))

# A token uses 960 hidden units in all of them.
GRANULARITY_LADDER = (Shape(8, 1, 960), Shape(64, 4, 240), Shape(256, 8, 120), NARROW)

POOL_SHAPES = (Shape(64, 8, 120), NARROW)
POOL_REPEATS = 21  # at least, because the difference is small


class RoutingOnly(layer.MoELayer):
    """A layer whose experts return their input: what is left is routing, dispatch and combination.

    The barriers keep XLA from fusing the two directions of the dispatch, which the experts separate
    in a whole layer.
    """

    def _expert_ffn(
        self, x_ND: jax.Array, rows_E: jax.Array, experts: ExpertWeights, shard: jax.Array | int
    ) -> jax.Array:
        del experts, shard
        return jax.lax.optimization_barrier((x_ND, rows_E))[0]


def build_layer(shape: Shape, dim: int, layer_class: type[layer.MoELayer]) -> layer.MoELayer:
    """Returns a layer with random weights."""
    blocks = block_sizes.Blocks(
        AdvancedConfig.block_rows, AdvancedConfig.tail_rows, AdvancedConfig.saved_activations
    )
    return layer_class(
        dim,
        (shape.width,) * shape.experts,
        shape.router_options,
        layer_options.ExpertOptions(blocks=blocks),
        rngs=nnx.Rngs(0),
    )


def layer_case(
    shape: Shape, workload: Workload, layer_class: type[layer.MoELayer] = layer.MoELayer
) -> tuple[Callable, tuple]:
    """Returns (function, arguments) of the forward and backward pass of a layer.

    The function returns ((loss, router statistics), (gradients of the weights, gradient of the
    input)). The gradients of the experts' weights are left out for `RoutingOnly`, in which they are
    0.
    """
    graph, router, experts = nnx.split(
        build_layer(shape, workload.dim, layer_class), nnx.PathContains("router_gate"), ...
    )
    keys = jax.random.split(jax.random.key(1))
    form = (workload.sequences, workload.length, workload.dim)
    x_BLD, dy_BLD = (jax.random.normal(key, form) for key in keys)
    is_whole = layer_class is layer.MoELayer
    trained, fixed = ((router, experts), ()) if is_whole else ((router,), (experts,))

    def run(trained: tuple, x_BLD: jax.Array, fixed: tuple, dy_BLD: jax.Array) -> Any:
        def loss(trained: tuple, x_BLD: jax.Array) -> tuple[jax.Array, Any]:
            out = nnx.merge(graph, *trained, *fixed)(x_BLD)
            total = (
                jnp.sum(out.y_BLD * dy_BLD)
                + BALANCE_LOSS_WEIGHT * out.balance_loss
                + Z_LOSS_WEIGHT * out.z_loss
            )
            return total, out.statistics

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(trained, x_BLD)

    return run, (trained, x_BLD, fixed, dy_BLD)


def experts_case(shape: Shape, workload: Workload, rows: Sequence[int]) -> tuple[Callable, tuple]:
    """Returns (function, arguments) of the experts alone, with so many tokens for each expert."""
    widths = (shape.width,) * shape.experts
    blocks = build_layer(Shape(1, 1, 1), 1, layer.MoELayer).options.blocks
    passes = expert_ffn.make_passes(widths, "auto", sharding.chip_name(None), blocks)
    inputs = expert_ffn.random_inputs(workload.dim, widths, rows, "float32")
    return passes.forward_backward, tuple(inputs)


def step_config(shape: Shape, workload: Workload) -> Config:
    """Returns the config of a model of one block with such a layer and a small vocabulary."""
    values = loading.default_config()
    values.model.update(
        dim=workload.dim, num_layers=1, num_heads=6, vocab_size=512, context_length=workload.length
    )
    values.moe.update(
        num_experts=shape.experts, top_k=shape.top_k, width=shape.width, gate="softmax_top_k"
    )
    values.data.sequence_length = workload.length
    values.training.batch_size = workload.sequences
    values.evaluation.sample_tokens = 1  # any number below the length
    values.mesh.data = 1
    return loading.from_dict(values.to_dict())


# ---- the parts ----


def measure_memory(shape: Shape, workload: Workload, steps: int = 3) -> dict:
    """Returns the memory of a training step of one block, in bytes.

    As in a training run, the step is compiled and the state is made after it. "growth" is the peak
    of the resident memory of this process over what it had before, until the state is there and in
    the steps; None where the system does not report it. Compilation and initialization need memory
    of their own, and freed memory stays in the process (runtime/malloc.py).
    """
    jax.block_until_ready(jnp.zeros(1) + 1)  # starts the backend
    config = step_config(shape, workload)
    mesh = device_mesh.build_mesh(config)
    before = _reset_peak_memory()
    step = programs.Programs().train_step(config, mesh)
    state = jax.block_until_ready(programs.Programs().initial_state(config, mesh))
    peak_at_start = _peak_memory()
    state_bytes = sum(array.nbytes for array in jax.tree.leaves(state))
    rng = np.random.default_rng(0)
    form = (workload.sequences, workload.length + 1)
    tokens = jnp.asarray(rng.integers(4, config.model.vocab_size, form), jnp.int32)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens)}
    _reset_peak_memory()
    for _ in range(steps):
        state, metrics = step.execute(state, batch)
        jax.block_until_ready(metrics)
    peak_in_steps = _peak_memory()
    analysis = step.program.memory_analysis()
    return {
        "shape": shape.name,
        "tokens": workload.tokens,
        "state_bytes": state_bytes,
        "planned_bytes": memory_usage.peak_bytes(step.program),
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "growth_at_start_bytes": _subtract(peak_at_start, before),
        "growth_in_steps_bytes": _subtract(peak_in_steps, before),
    }


def measure_share(shape: Shape, workload: Workload, repeats: int) -> dict:
    """Returns the time of routing and of the experts alone as shares of the time of the layer."""
    whole = layer_case(shape, workload)
    compiled = timing.compile_all({"layer": whole})
    (_, statistics), _ = compiled["layer"].compiled(*whole[1])
    rows = np.asarray(jnp.sum(statistics.counts_KE, axis=0)).tolist()
    compiled |= timing.compile_all(
        {
            "routing": layer_case(shape, workload, RoutingOnly),
            "experts": experts_case(shape, workload, rows),
        }
    )
    seconds = timing.time_interleaved(compiled, repeats, calls=2)
    return {
        "shape": shape.name,
        "tokens": workload.tokens,
        "routing": timing.median_ratio(seconds["routing"], seconds["layer"]),
        "experts": timing.median_ratio(seconds["experts"], seconds["layer"]),
        "seconds": float(np.median(seconds["layer"])),
    }


def measure_ladder(shapes: Sequence[Shape], workload: Workload, repeats: int) -> list[dict]:
    """Returns the time of each layer over that of the first one, and how long it compiled."""
    functions: dict[tuple[Shape, str], tuple[Callable, tuple]] = {}
    for shape in shapes:
        functions[shape, "layer"] = layer_case(shape, workload)
        functions[shape, "routing"] = layer_case(shape, workload, RoutingOnly)
    compiled = timing.compile_all(functions)
    seconds = timing.time_interleaved(compiled, repeats, calls=2)
    first = seconds[shapes[0], "layer"]
    return [
        {
            "shape": shape.name,
            "tokens": workload.tokens,
            "over_first": timing.median_ratio(seconds[shape, "layer"], first),
            "routing_over_first": timing.median_ratio(seconds[shape, "routing"], first),
            "compile_seconds": compiled[shape, "layer"].compile_seconds,
        }
        for shape in shapes
    ]


def measure_pools(shapes: Sequence[Shape], workload: Workload, repeats: int) -> list[dict]:
    """Returns the time of two pools over that of one pool of the same experts."""
    functions = {}
    for shape in shapes:
        for pools in (1, 2):
            functions[shape, pools] = layer_case(shape._replace(pools=pools), workload)
    seconds = timing.time_interleaved(timing.compile_all(functions), repeats)
    return [
        {
            "shape": shape.name,
            "tokens": workload.tokens,
            "repeats": repeats,
            "two_over_one": timing.median_ratio(seconds[shape, 2], seconds[shape, 1]),
        }
        for shape in shapes
    ]


def measure_accounting() -> dict:
    """Returns how long the parameters and FLOPs of all arms of the study take, in CPU seconds."""
    start = time.process_time()
    grid = dict(arms.build_grid())
    for config in grid.values():
        accounting.count_parameters(config)
        accounting.count_active_parameters(config)
        accounting.olmo_flops_per_token(config, config.data.sequence_length)
        accounting.nominal_flops_per_token(config, config.data.sequence_length)
    return {"arms": len(grid), "cpu_seconds": time.process_time() - start}


def list_parts(workload: Workload, repeats: int) -> dict[str, Callable[[], Any]]:
    """Returns the parts by name, in the order in which they have to be measured.

    Memory is first, because later parts leave freed memory in the process.
    """
    return {
        "memory": lambda: measure_memory(NARROW, workload),
        "share": lambda: measure_share(NARROW, workload, repeats),
        "experts": lambda: measure_ladder(EXPERT_LADDER, workload, repeats),
        "granularity": lambda: measure_ladder(GRANULARITY_LADDER, workload, repeats),
        "pools": lambda: measure_pools(POOL_SHAPES, workload, max(repeats, POOL_REPEATS)),
        "accounting": measure_accounting,
    }


# ---- the memory of this process ----


def _reset_peak_memory() -> int | None:
    """Makes the present resident memory of this process the peak so far, and returns it.

    None if the system cannot do that.
    """
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak_memory()


def _peak_memory() -> int | None:
    """Returns the peak of the resident memory in bytes; None if the system does not report it."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None


def _subtract(peak: int | None, before: int | None) -> int | None:
    return None if peak is None or before is None else peak - before


# ---- command line ----


def choose_parts(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Returns the parts to measure, in the order of `known`.

    Raises:
        UserError: a name is unknown.
    """
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(
            f"--parts has {unknown[0]!r}, which is unknown; choose from {', '.join(known)}"
        )
    return [name for name in known if names is None or name in names]


def read_results(path: str | None) -> dict[str, Any]:
    """Returns the parts that a file of results has; {} if there is none."""
    if path is None or not os.path.exists(path):
        return {}
    return json.loads(pathlib.Path(path).read_text())["parts"]


def main(_: Sequence[str]) -> None:
    """Prints a JSON object for each part, and writes --json after each."""
    parts = list_parts(WORKLOAD, timing.REPEATS.value)
    try:
        chosen = choose_parts(PARTS.value, list(parts))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    results = read_results(timing.JSON.value)
    for name in chosen:
        results[name] = parts[name]()
        print(json.dumps({name: results[name]}), flush=True)
        timing.write({"machine": timing.describe_machine(), "parts": results})


if __name__ == "__main__":
    timing.run(main)
