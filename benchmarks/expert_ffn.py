"""One expert layer's feed-forward product, forward and forward + backward, over a dense one of the same active FLOPs.

    python -m benchmarks.expert_ffn [--json=FILE] [--cases=modse,equal] [--backends=blocked,ragged_dot] [--repeats=9]

Every case runs side by side with its own dense SwiGLU (the same rows x width in one product), and the MoDSE case with
the equal-width one. `ragged_dot` is what JAX has without this project: every expert padded to the widest.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import timing
from modse_jax.config.options import MoEConfig
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import block_sizes, expert_weights, select
from modse_jax.runtime import sharding

CASES = flags.DEFINE_list("cases", None, "some of the cases")


NAMES = flags.DEFINE_list("backends", ["blocked", "ragged_dot"], "backends to time")


DIM = flags.DEFINE_integer("dim", 384, "model width D")


TOKENS = flags.DEFINE_integer("tokens", 4096, "tokens T")


DTYPE = flags.DEFINE_string("dtype", "float32", "compute type")


BLOCKS = flags.DEFINE_list(
    "blocks", None, "block_rows, tail_rows, saved_activations; by default the config's defaults"
)


def cases(dim: int, tokens: int) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """{name: (widths, rows per expert)}; rows are drawn from even odds, but where the name says otherwise."""
    rng = np.random.default_rng(0)
    modse, h = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim), int(2.5 * dim)

    def even(experts, rows):
        return rng.multinomial(rows, np.full(experts, 1 / experts))

    eight = even(8, 2 * tokens)
    seven = np.insert(even(7, 2 * tokens), 3, 0)
    return {
        "modse": (modse, eight),
        "equal": ((h,) * 8, eight),
        "64 experts top-8": ((h // 4,) * 64, even(64, 8 * tokens)),
        "1024 experts": ((16,) * 1024, even(1024, 8 * tokens)),
        "one empty": (modse, seven),
        "all on one": (modse, np.eye(8, dtype=int)[0] * 2 * tokens),
    }


def padded_ragged_dot(x_ND, rows_E, weights, widths):
    """Every expert padded to the widest, and jax.lax.ragged_dot."""
    widest = max(widths)

    def pad(w, axis):
        parts = [
            jax.lax.slice_in_dim(w, o, o + n, axis=axis)
            for o, n in zip(expert_widths.offsets(widths), widths)
        ]
        return jnp.stack(
            [
                jnp.pad(p, [(0, widest - n if a == axis else 0) for a in range(2)])
                for p, n in zip(parts, widths)
            ]
        )

    gate, up = (jax.lax.ragged_dot(x_ND, pad(w, 1), rows_E) for w in weights[:2])
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, pad(weights.w_down, 0), rows_E)


def functions(widths, backend, chip, blocks):
    """(forward, forward + backward) of one backend; "dense" is one product for all rows."""

    def forward(x, rows, w, dy):
        if backend == "dense":
            return (jax.nn.silu(x @ w.w_gate) * (x @ w.w_up)) @ w.w_down
        if backend == "ragged_dot":
            return padded_ragged_dot(x, rows, w, widths)
        return select.expert_ffn(
            x, rows, w, expert_placement.place_experts(widths, 1, "pairs"), backend, blocks, chip
        )

    def both(x, rows, w, dy):
        return jax.value_and_grad(
            lambda x, w: jnp.sum(forward(x, rows, w, dy) * dy, dtype=jnp.float32), (0, 1)
        )(x, w)

    return forward, both


def arguments(dim, widths, rows, dtype):
    """Random rows, routing, weights and output gradient."""
    keys = jax.random.split(jax.random.key(0), 5)
    H = sum(widths)
    w = expert_weights.ExpertWeights(
        *(
            0.05 * jax.random.normal(k, s, dtype)
            for k, s in zip(keys, ((dim, H), (dim, H), (H, dim)))
        )
    )
    x, dy = (jax.random.normal(k, (int(sum(rows)), dim), dtype) for k in keys[3:])
    return x, jnp.asarray(rows, jnp.int32), w, dy


def run(names, backends, dim, tokens, dtype, repeats, blocks):
    """The rows of the result file."""
    chip, jobs, table = sharding.chip_name(None), {}, cases(dim, tokens)
    for case in names:
        widths, rows = table[case]
        used = -(-int(rows @ np.array(widths)) // tokens)  # one dense width with the same FLOPs
        jobs[case, "dense"] = (
            functions(None, "dense", chip, blocks),
            arguments(dim, (used,), [tokens], dtype),
        )
        for backend in backends:
            # A padded product over 1,024 experts would take minutes and prove nothing more.
            if not (backend == "ragged_dot" and len(widths) > 8):
                jobs[case, backend] = (
                    functions(widths, backend, chip, blocks),
                    arguments(dim, widths, rows, dtype),
                )
    results = []
    compiled = {
        (*key, i): job
        for i in range(2)
        for key, job in timing.compile_all({k: (f[i], a) for k, (f, a) in jobs.items()}).items()
    }
    seconds = timing.interleaved(compiled, repeats, warmup=3, calls=4, alone_over=1)
    for case, backend in jobs:
        both = seconds[case, backend, 1]
        over_equal = None
        if (
            case == "modse" and ("equal", backend, 1) in seconds
        ):  # at equal FLOPs: routing moves the mean width
            flops = [rows @ np.array(widths) for widths, rows in (table["equal"], table["modse"])]
            over_equal = timing.ratio(both, seconds["equal", backend, 1]) * flops[0] / flops[1]
        results.append(
            {
                "case": case,
                "backend": backend,
                "platform": chip,
                "dtype": dtype,
                "forward_seconds": float(np.median(seconds[case, backend, 0])),
                "forward_backward_seconds": float(np.median(both)),
                "over_dense": timing.ratio(both, seconds[case, "dense", 1]),
                "over_equal_width": over_equal,
                "compile_seconds": compiled[case, backend, 1]["compile_seconds"],
                "peak_bytes": compiled[case, backend, 1]["peak_bytes"],
            }
        )
    return results


def main(_):
    names = CASES.value or list(cases(DIM.value, TOKENS.value))
    blocks = block_sizes.Blocks(
        MoEConfig.block_rows, MoEConfig.tail_rows, MoEConfig.saved_activations
    )
    if BLOCKS.value:
        blocks = block_sizes.Blocks(
            int(BLOCKS.value[0]), int(BLOCKS.value[1]), float(BLOCKS.value[2])
        )
    rows = run(
        names, NAMES.value, DIM.value, TOKENS.value, DTYPE.value, timing.REPEATS.value, blocks
    )
    print(
        f"{'case':18} {'backend':10} {'forward':>10} {'both':>10} {'/dense':>7} {'/equal':>7} {'compile':>8}"
    )
    for r in rows:
        equal = f"{r['over_equal_width']:7.3f}" if r["over_equal_width"] else " " * 7
        print(
            f"{r['case']:18} {r['backend']:10} {1e3 * r['forward_seconds']:8.1f}ms",
            f"{1e3 * r['forward_backward_seconds']:8.1f}ms {r['over_dense']:7.3f}",
            equal,
            f"{r['compile_seconds']:7.1f}s",
        )
    timing.write(rows)


if __name__ == "__main__":
    timing.run(main)
