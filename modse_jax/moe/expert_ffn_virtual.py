"""Unequal experts through a product for equal ones: every expert is cut into chunks of a common width, each an expert
of its own ("virtual"), and a row visits all chunks of its expert. SwiGLU is elementwise, so the partial results add up
to the whole, with no more arithmetic; but the rows are repeated, 30% of a layer's time in traffic by estimate.

A stop-gap for devices where XLA multiplies groups in one fused kernel (`lax.ragged_dot`). Elsewhere XLA expands that
into a product of every row with every expert, so `fused` finds out first.

Legend: N routed rows, D model, E experts, H flat hidden axis, C chunk width, V virtual experts, R repeated rows.
"""

import functools
import math
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LEAST = 128  # columns of a chunk: below, a product is bound by the repeated rows


GROUPS = 16  # of the probe


EXPANDED = 4.0  # times a dense product's time: an expansion takes GROUPS times, a fused kernel up to about twice


def chunk(widths: Sequence[int]) -> int:
    """Columns of a virtual expert. Raises ValueError where the widths have no large common part."""
    size = math.gcd(*widths)
    if size < LEAST:
        raise ValueError(
            f"virtual: widths {sorted(set(widths))} have only {size} columns in common, at least {LEAST} "
            "are needed; backends that take any: blocked, reference"
        )
    return size


def virtual(x_ND, rows_E, weights, widths: Sequence[int]):
    """See expert_ffn.reference. Gradients by differentiation."""
    size, rows_E, (w_gate, w_up, w_down) = chunk(widths), rows_E[: len(widths)], weights
    counts = np.array([w // size for w in widths])
    (N, D), dtype = x_ND.shape, x_ND.dtype
    rows_V = rows_E[np.repeat(np.arange(len(widths)), counts)]
    first_E = jnp.cumsum(rows_E) - rows_E
    row_R, live_R1 = _repeated(rows_V, first_E, counts, N)
    x_RD = jnp.where(live_R1, x_ND[row_R], 0)
    gate_VDC, up_VDC = (w.reshape(D, -1, size).transpose(1, 0, 2) for w in (w_gate, w_up))
    gate_RC, up_RC = (_grouped(x_RD, w, rows_V) for w in (gate_VDC, up_VDC))
    hidden_RC = jnp.where(live_R1, jax.nn.silu(gate_RC) * up_RC, 0).astype(dtype)
    part_RD = jnp.where(live_R1, _grouped(hidden_RC, w_down.reshape(-1, size, D), rows_V), 0)
    return _summed(part_RD, rows_E, first_E, counts, N).astype(dtype)


def _grouped(rows, weights, rows_V):
    return lax.ragged_dot(rows, weights, rows_V, preferred_element_type=jnp.float32)


def _repeated(rows_V, first_E, counts, num_rows):
    """(row of N [R], whether there is one [R, 1]). R is a bound: every row with the widest expert."""
    R = num_rows * int(counts.max())
    v_R = jnp.repeat(jnp.arange(len(rows_V)), rows_V, total_repeat_length=R)
    start_V = jnp.cumsum(rows_V) - rows_V
    expert_V = np.repeat(np.arange(len(counts)), counts)
    row_R = first_E[expert_V][v_R] + jnp.arange(R) - start_V[v_R]
    live_R = jnp.arange(R) < jnp.sum(rows_V)
    return jnp.where(live_R, row_R, 0), live_R[:, None]


def _summed(part_RD, rows_E, first_E, counts, num_rows):
    """Of every row, the sum over its expert's chunks: a gather for each, so that the order of additions is fixed."""
    row_N = jnp.arange(num_rows)
    e_N = jnp.minimum(jnp.searchsorted(jnp.cumsum(rows_E), row_N, side="right"), len(counts) - 1)
    start_E = jnp.cumsum(rows_E * counts) - rows_E * counts  # an expert's first repeated row
    mine_N = row_N < jnp.sum(rows_E)

    def add(c, y_ND):
        at_N = start_E[e_N] + c * rows_E[e_N] + row_N - first_E[e_N]
        use_N = mine_N & (c < jnp.asarray(counts)[e_N])
        return y_ND + jnp.where(use_N[:, None], part_RD[jnp.where(use_N, at_N, 0)], 0)

    return functools.reduce(
        lambda y, c: add(c, y),
        range(int(counts.max())),
        jnp.zeros((num_rows, part_RD.shape[1]), jnp.float32),
    )


def fused(device: jax.Device) -> bool:
    """Whether a grouped product on this device, its gradients included, takes about the time of a dense one. Runs both."""
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    rows, side = (1024, 128) if device.platform == "cpu" else (65536, 1024)
    x, w = jnp.ones((rows, side), dtype), jnp.ones((GROUPS, side, side), dtype)
    sizes = jnp.full((GROUPS,), rows // GROUPS, jnp.int32)
    x, w, sizes = (jax.device_put(a, device) for a in (x, w, sizes))

    def dense(x, w):
        return jnp.matmul(x, w[0], preferred_element_type=jnp.float32)

    return _seconds(lambda x, w: _grouped(x, w, sizes), x, w) < EXPANDED * _seconds(dense, x, w)


def _seconds(function, *arguments):
    both, taken = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1))), []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(both(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
