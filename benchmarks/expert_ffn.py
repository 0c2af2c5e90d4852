"""Times one grouped expert FFN, forward and forward + backward.

    python -m benchmarks.expert_ffn [--json=FILE] [--cases=modse,equal] \
        [--backends=blocked,ragged_dot] [--repeats=9]

Every case is timed side by side with a dense SwiGLU of the same FLOPs: one matmul for all tokens,
of the width that makes the FLOPs equal. The MoDSE case is also compared with the equal-width case.
The backend `ragged_dot` is what JAX offers without this project: every expert is padded to the
widest one.

Legend: N routed tokens, D model width, H hidden units of all experts, E experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from modse_jax.config.options import AdvancedConfig
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import block_sizes, select
from modse_jax.moe.experts.block_sizes import Blocks
from modse_jax.moe.experts.expert_weights import ExpertWeights
from modse_jax.runtime import sharding

CASES = flags.DEFINE_list("cases", None, "Cases to time; all by default.")
BACKENDS = flags.DEFINE_list("backends", ["blocked", "ragged_dot"], "Backends to time.")
DIM = flags.DEFINE_integer("dim", 384, "Model width D.")
TOKENS = flags.DEFINE_integer("tokens", 4096, "Number of tokens before routing.")
DTYPE = flags.DEFINE_string("dtype", "float32", "Compute type.")
BLOCKS = flags.DEFINE_list(
    "blocks", None, "block_rows, tail_rows and saved_activations; by default those of the config."
)

# Padding more experts than this would take minutes, and the result would be the same.
MAX_EXPERTS_TO_PAD = 8


class Routing(NamedTuple):
    """Widths of experts, and the tokens routed to them."""

    widths: tuple[int, ...]
    rows: np.ndarray  # [E]

    @property
    def work(self) -> int:
        """The sum over routed tokens of their expert's width; FLOPs are proportional to it."""
        return int(self.rows @ np.array(self.widths))


class Inputs(NamedTuple):
    """Arguments of the timed functions."""

    x_ND: jax.Array
    rows_E: jax.Array
    weights: ExpertWeights
    dy_ND: jax.Array


class Passes(NamedTuple):
    """The timed functions; both take the fields of Inputs."""

    forward: Callable
    forward_backward: Callable


def list_cases(dim: int, tokens: int) -> dict[str, Routing]:
    """Returns the cases by name. Tokens choose experts at random unless the name says otherwise."""
    rng = np.random.default_rng(0)
    modse = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    width = int(2.5 * dim)

    def route(experts: int, rows: int) -> np.ndarray:
        return rng.multinomial(rows, np.full(experts, 1 / experts))

    eight = route(8, 2 * tokens)
    one_empty = np.insert(route(7, 2 * tokens), 3, 0)
    all_on_one = np.eye(8, dtype=int)[0] * 2 * tokens
    return {
        "modse": Routing(modse, eight),
        "equal": Routing((width,) * 8, eight),
        "64 experts top-8": Routing((width // 4,) * 64, route(64, 8 * tokens)),
        "1024 experts": Routing((16,) * 1024, route(1024, 8 * tokens)),
        "one empty": Routing(modse, one_empty),
        "all on one": Routing(modse, all_on_one),
    }


def padded_ragged_dot(
    x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, widths: Sequence[int]
) -> jax.Array:
    """Computes the expert FFN by jax.lax.ragged_dot, with every expert padded to the widest."""
    w_gate = _pad_experts(weights.w_gate, widths, axis=1)
    w_up = _pad_experts(weights.w_up, widths, axis=1)
    w_down = _pad_experts(weights.w_down, widths, axis=0)
    gate = jax.lax.ragged_dot(x_ND, w_gate, rows_E)
    up = jax.lax.ragged_dot(x_ND, w_up, rows_E)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, rows_E)


def _pad_experts(weight: jax.Array, widths: Sequence[int], axis: int) -> jax.Array:
    """Returns the weights of all experts, stacked, with hidden units on `axis` padded by zeros."""
    padded = []
    for offset, width in zip(expert_widths.offsets(widths), widths):
        part = jax.lax.slice_in_dim(weight, offset, offset + width, axis=axis)
        padding = [(0, 0), (0, 0)]
        padding[axis] = (0, max(widths) - width)
        padded.append(jnp.pad(part, padding))
    return jnp.stack(padded)


def make_passes(widths: Sequence[int], backend: str, chip: str, blocks: Blocks) -> Passes:
    """Returns the timed functions of a backend; "dense" is one matmul for all tokens."""

    def forward(
        x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, dy_ND: jax.Array
    ) -> jax.Array:
        if backend == "dense":
            hidden = jax.nn.silu(x_ND @ weights.w_gate) * (x_ND @ weights.w_up)
            return hidden @ weights.w_down
        if backend == "ragged_dot":
            return padded_ragged_dot(x_ND, rows_E, weights, widths)
        placement = expert_placement.place_experts(widths, 1, "whole")
        return select.expert_ffn(x_ND, rows_E, weights, placement, backend, blocks, chip)

    def forward_backward(
        x_ND: jax.Array, rows_E: jax.Array, weights: ExpertWeights, dy_ND: jax.Array
    ) -> tuple[jax.Array, tuple]:
        def loss(x_ND: jax.Array, weights: ExpertWeights) -> jax.Array:
            y_ND = forward(x_ND, rows_E, weights, dy_ND)
            return jnp.sum(y_ND * dy_ND, dtype=jnp.float32)

        return jax.value_and_grad(loss, (0, 1))(x_ND, weights)

    return Passes(forward, forward_backward)


def random_inputs(dim: int, widths: Sequence[int], rows: Sequence[int], dtype: str) -> Inputs:
    """Returns random tokens, weights and output gradient for a routing."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = sum(widths)
    routed = int(sum(rows))
    weights = ExpertWeights(
        0.05 * jax.random.normal(keys[0], (dim, hidden), dtype),
        0.05 * jax.random.normal(keys[1], (dim, hidden), dtype),
        0.05 * jax.random.normal(keys[2], (hidden, dim), dtype),
    )
    x_ND = jax.random.normal(keys[3], (routed, dim), dtype)
    dy_ND = jax.random.normal(keys[4], (routed, dim), dtype)
    return Inputs(x_ND, jnp.asarray(rows, jnp.int32), weights, dy_ND)


class Job(NamedTuple):
    """One backend on one case."""

    passes: Passes
    inputs: Inputs


def _list_jobs(
    cases: dict[str, Routing],
    backends: Sequence[str],
    dim: int,
    tokens: int,
    dtype: str,
    blocks: Blocks,
) -> dict[tuple[str, str], Job]:
    """Returns the jobs by case and backend, of every case the dense one first."""
    chip = sharding.chip_name(None)
    jobs = {}
    for name, routing in cases.items():
        dense_width = -(-routing.work // tokens)  # has the same FLOPs
        jobs[name, "dense"] = Job(
            make_passes((), "dense", chip, blocks),
            random_inputs(dim, (dense_width,), [tokens], dtype),
        )
        for backend in backends:
            if backend == "ragged_dot" and len(routing.widths) > MAX_EXPERTS_TO_PAD:
                continue
            jobs[name, backend] = Job(
                make_passes(routing.widths, backend, chip, blocks),
                random_inputs(dim, routing.widths, routing.rows, dtype),
            )
    return jobs


def measure(
    names: Sequence[str],
    backends: Sequence[str],
    dim: int,
    tokens: int,
    dtype: str,
    repeats: int,
    blocks: Blocks,
) -> list[dict]:
    """Times cases by name. Returns the rows of the result file."""
    all_cases = list_cases(dim, tokens)
    cases = {name: all_cases[name] for name in names}
    jobs = _list_jobs(cases, backends, dim, tokens, dtype, blocks)
    functions = {}
    for pass_name in Passes._fields:
        for key, job in jobs.items():
            functions[(*key, pass_name)] = (getattr(job.passes, pass_name), tuple(job.inputs))
    compiled = timing.compile_all(functions)
    seconds = timing.time_interleaved(compiled, repeats, warmup=3, calls=4, single_call_seconds=1)
    results = []
    for case, backend in jobs:
        both = seconds[case, backend, "forward_backward"]
        over_equal = None
        equal = seconds.get(("equal", backend, "forward_backward"))
        if case == "modse" and equal:
            # At equal FLOPs: the mean width of the chosen experts depends on the routing.
            time_ratio = timing.median_ratio(both, equal)
            over_equal = time_ratio * all_cases["equal"].work / all_cases["modse"].work
        results.append(
            {
                "case": case,
                "backend": backend,
                "platform": sharding.chip_name(None),
                "dtype": dtype,
                "forward_seconds": float(np.median(seconds[case, backend, "forward"])),
                "forward_backward_seconds": float(np.median(both)),
                "over_dense": timing.median_ratio(both, seconds[case, "dense", "forward_backward"]),
                "over_equal_width": over_equal,
                "compile_seconds": compiled[case, backend, "forward_backward"].compile_seconds,
                "peak_bytes": compiled[case, backend, "forward_backward"].peak_bytes,
            }
        )
    return results


def _format_row(row: dict) -> str:
    equal = f"{row['over_equal_width']:7.3f}" if row["over_equal_width"] else " " * 7
    return (
        f"{row['case']:18} {row['backend']:10} {1e3 * row['forward_seconds']:8.1f}ms "
        f"{1e3 * row['forward_backward_seconds']:8.1f}ms {row['over_dense']:7.3f} {equal} "
        f"{row['compile_seconds']:7.1f}s"
    )


def main(_: Sequence[str]) -> None:
    """Prints a line for each case and backend, and writes --json."""
    names = CASES.value or list(list_cases(DIM.value, TOKENS.value))
    blocks = block_sizes.Blocks(
        AdvancedConfig.block_rows, AdvancedConfig.tail_rows, AdvancedConfig.saved_activations
    )
    if BLOCKS.value:
        body, tail, saved = BLOCKS.value
        blocks = block_sizes.Blocks(int(body), int(tail), float(saved))
    rows = measure(
        names, BACKENDS.value, DIM.value, TOKENS.value, DTYPE.value, timing.REPEATS.value, blocks
    )
    print(
        f"{'case':18} {'backend':10} {'forward':>10} {'both':>10} {'/dense':>7} {'/equal':>7} "
        f"{'compile':>8}"
    )
    for row in rows:
        print(_format_row(row))
    timing.write(rows)


if __name__ == "__main__":
    timing.run(main)
