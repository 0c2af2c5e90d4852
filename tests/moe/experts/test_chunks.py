"""Kernels in chunks of rows: outputs, gradients and memory for every fill of the chunks; and the
order of the tasks of kernel A.

The chunks are tested with kernels written in plain JAX, which keep NaN wherever a kernel would
leave its buffers unwritten.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import (
    chunks,
    expert_weights,
    pallas_gpu,
    reference_ffn,
    swiglu,
    tile_lists,
)

D = 8


WIDTHS = (6, 2, 5, 3)


class PlainKernels:
    """The interface of a kernel module, over every row and hidden unit, with selects."""

    calls = []

    @staticmethod
    def _owned(rows_E, num_rows, placement):
        """Whether row n belongs to the expert of hidden unit h."""
        widths = placement.widths[0]
        expert_H = jnp.asarray(np.repeat(np.arange(len(widths)), widths))
        expert_N = jnp.searchsorted(jnp.cumsum(rows_E), jnp.arange(num_rows), side="right")
        return expert_N[:, None] == expert_H[None, :]

    @classmethod
    def forward(cls, x_ND, rows_E, weights, shard, placement, tiles, interpret, keep):
        cls.calls.append(("forward", x_ND.shape[0], keep))
        w_gate, w_up, w_down = weights
        owned_NH = cls._owned(rows_E, x_ND.shape[0], placement)
        gate_NH = jnp.where(owned_NH, x_ND @ w_gate, jnp.nan)
        up_NH = jnp.where(owned_NH, x_ND @ w_up, jnp.nan)
        y_ND = jnp.where(owned_NH, jax.nn.silu(gate_NH) * up_NH, 0) @ w_down
        return y_ND, (gate_NH, up_NH, owned_NH) if keep else None

    @classmethod
    def backward(cls, x_ND, rows_E, weights, shard, kept, dy_ND, placement, tiles, interpret):
        cls.calls.append(("backward", x_ND.shape[0]))
        w_gate, w_up, w_down = weights
        gate_NH, up_NH, owned_NH = kept
        routed_N1 = owned_NH.any(axis=1, keepdims=True)
        x_ND, dy_ND = jnp.where(routed_N1, x_ND, 0), jnp.where(routed_N1, dy_ND, 0)
        gradients = swiglu.swiglu_backward(gate_NH, up_NH, dy_ND @ w_down.T)
        hidden_NH, dgate_NH, dup_NH = (jnp.where(owned_NH, a, 0) for a in gradients)
        dx_ND = dgate_NH @ w_gate.T + dup_NH @ w_up.T
        return dx_ND, x_ND.T @ dgate_NH, x_ND.T @ dup_NH, hidden_NH.T @ dy_ND


def place_half(widths):
    """A shard with half of the experts of a layer."""
    return expert_placement.Placement(((0, 1, 2, 3), (4, 5, 6, 7)), (widths, widths))


def make_case(rows, num_rows):
    rng = np.random.default_rng(0)
    shapes = (D, sum(WIDTHS)), (D, sum(WIDTHS)), (sum(WIDTHS), D)
    weights = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    x, dy = (jnp.asarray(rng.normal(size=(num_rows, D)), jnp.float32) for _ in range(2))
    x, dy = (a.at[sum(rows) :].set(jnp.nan) for a in (x, dy))
    return x, jnp.asarray(rows, jnp.int32), weights, dy


def output_and_gradients(function, x, weights, dy):
    y, pull = jax.vjp(function, x, weights)
    return jax.tree.leaves((y, pull(dy)))


@pytest.mark.parametrize(
    "rows, num_rows",
    [
        ((4, 0, 5, 6), 64),  # the first of two chunks
        ((20, 10, 3, 12), 64),  # two chunks, the second one partly
        ((10, 30, 20, 4), 64),  # all rows of all chunks
        ((0, 64, 0, 0), 64),  # one expert with all rows
        ((0, 0, 0, 0), 64),  # no routed tokens
        ((39, 1, 1, 39), 83),  # an expert ends where a chunk does; a short last chunk
        ((0, 7, 50, 26), 83),  # the short last chunk is full
    ],
)
def test_chunks_equal_the_reference(rows, num_rows):
    """Outputs and gradients, with NaN in all padding rows of x and dy and in all unused
    activations that the kernels keep."""
    placement, tiles = place_half(WIDTHS), pallas_gpu.Tiles(rows=8)
    assert chunks.chunk_rows(num_rows, placement, tiles.rows) < num_rows
    x, rows, weights, dy = make_case(rows, num_rows)

    def in_chunks(x, weights):
        arguments = (x, rows, *weights, jnp.int32(0), PlainKernels, placement, tiles)
        return chunks.run_in_chunks(*arguments)

    def slow(x, weights):
        return reference_ffn.reference(x, rows, expert_weights.ExpertWeights(*weights), WIDTHS)

    got = output_and_gradients(jax.jit(in_chunks), x, weights, dy)
    want = output_and_gradients(slow, x, weights, jnp.nan_to_num(dy))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def trace(num_rows, placement):
    """The jaxpr of one training pass and the calls of the kernels in it."""
    x, rows, weights, dy = make_case((3, 4, 5, 6), num_rows)
    PlainKernels.calls.clear()

    def both(x, weights, dy):
        def in_chunks(x, weights):
            arguments = (x, rows, *weights, jnp.int32(0), PlainKernels, placement)
            return chunks.run_in_chunks(*arguments, pallas_gpu.Tiles(rows=8))

        return output_and_gradients(in_chunks, x, weights, dy)

    jaxpr = jax.make_jaxpr(both)(x, weights, dy)
    return jaxpr, list(PlainKernels.calls)


def test_one_chunk_is_the_kernels_and_nothing_else():
    jaxpr, calls = trace(64, expert_placement.Placement(((0, 1, 2, 3),), (WIDTHS,)))
    assert calls == [("forward", 64, True), ("backward", 64)]
    names = {equation.primitive.name for equation in jaxpr.eqns}
    assert not {"while", "scan", "dynamic_update_slice"} & names


def list_shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from list_shapes(getattr(inner, "jaxpr", inner))


def test_chunks_bound_the_activations_and_keep_only_those_of_the_first():
    """83 rows are chunks of 56 and 27, which is padded: no array of hidden activations has more than 56 rows,
    and the backward pass recomputes the second chunk alone."""
    jaxpr, calls = trace(83, place_half(WIDTHS))
    assert calls == [
        ("forward", 56, True),
        ("forward", 56, False),
        ("backward", 56),
        ("forward", 56, True),
        ("backward", 56),
    ]
    shapes = set(list_shapes(jaxpr.jaxpr))
    assert max(shape[0] for shape in shapes if shape[1:] == (sum(WIDTHS),)) == 56


def test_no_loop_depends_on_the_routing():
    """A loop whose length is data would make a GPU wait for the host: every loop of the chunks
    is a scan, whose length is static."""
    placement = expert_placement.Placement(
        ((0, 1, 2, 3), *((e,) for e in range(4, 20))), (WIDTHS,) * 17
    )
    jaxpr, calls = trace(96, placement)
    names = [e.primitive.name for e in jaxpr.eqns]
    lengths = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert "while" not in names and lengths == [3, 3]


@pytest.mark.parametrize(
    "num_rows, shards, tile_rows, rows",
    [
        (131_072, 1, 128, 131_072),  # every row is this shard's
        (524_288, 4, 128, 163_840),  # a quarter of them, and a quarter more
        (100, 4, 128, 100),  # less than a tile
        (0, 4, 128, 0),
    ],
)
def test_rows_of_a_chunk(num_rows, shards, tile_rows, rows):
    placement = expert_placement.place_experts(
        expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 64), shards, "pairs"
    )
    assert chunks.chunk_rows(num_rows, placement, tile_rows) == rows


def test_chunks_divide_the_rows_of_every_expert():
    rows_E = jnp.asarray([5, 0, 17, 3])
    parts = [chunks.rows_in_chunk(rows_E, first, 8) for first in range(0, 32, 8)]
    assert [p.tolist() for p in parts] == [[5, 0, 3, 0], [0, 0, 8, 0], [0, 0, 6, 2], [0, 0, 0, 1]]


# ---- the order of the tasks of kernel A ----


def list_tasks(work):
    live = int(work.num_tasks)
    columns = (work.expert_T, work.row_tile_T, work.column_tile_T, work.flat_tile_T)
    return list(zip(*(np.asarray(c)[:live].tolist() for c in columns)))


def most_columns(tasks, window):
    """The most distinct tiles of the weights in any run of so many tasks."""
    flat = [task[3] for task in tasks]
    return max(len(set(flat[i : i + window])) for i in range(max(1, len(flat) - window + 1)))


@pytest.mark.parametrize("seed", range(4))
def test_grouped_tasks_are_the_same_tasks(seed):
    """Random routings and widths: every task once, whatever the size of the groups."""
    rng = np.random.default_rng(seed)
    widths = tuple(int(w) for w in 64 * rng.integers(1, 9, 5))
    rows_E = rng.multinomial(rng.integers(0, 3000), rng.dirichlet(np.full(5, 0.5)))
    placement, tiles = expert_placement.place_experts(widths, 1, "pairs"), pallas_gpu.Tiles()
    num_tiles = -(-3000 // tiles.rows)
    columns = tile_lists.list_column_tiles(placement, 0, num_tiles * tiles.rows, tiles)
    arguments = (jnp.asarray(rows_E, jnp.int32), columns, tiles, num_tiles)
    grouped = tile_lists.list_grouped_hidden_out_tasks(*arguments, int(rng.integers(1, 12)))
    tasks = list_tasks(grouped)
    assert sorted(tasks) == sorted(list_tasks(tile_lists.list_hidden_in_tasks(*arguments)))
    assert len(set(tasks)) == len(tasks)
    assert int(grouped.row_tile_T.max()) < num_tiles and int(grouped.flat_tile_T.min()) >= 0
    assert int(grouped.flat_tile_T.max()) < sum(widths) // tiles.hidden


def test_grouped_tasks_read_few_weights_at_a_time():
    """With even routing over the widths of 300Mx8, the tasks of a wave of 132 read at most a
    fifth of the widest expert's weights; in the order of visits they would read all of them."""
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)
    placement, tiles = expert_placement.place_experts(widths, 1, "pairs"), pallas_gpu.Tiles()
    num_tiles = 256
    columns = tile_lists.list_column_tiles(placement, 0, num_tiles * tiles.rows, tiles)
    rows_E = jnp.full(8, num_tiles * tiles.rows // 8 - 3, jnp.int32)
    arguments = (rows_E, columns, tiles, num_tiles)
    grouped = tile_lists.list_grouped_hidden_out_tasks(*arguments, pallas_gpu.VISITS_PER_GROUP)
    assert most_columns(list_tasks(grouped), 132) <= max(widths) // tiles.hidden // 5
    for task, following in itertools.pairwise(list_tasks(grouped)):  # a snake: no jump back
        assert task[0] != following[0] or abs(task[3] - following[3]) <= 1
    by_visit = list_tasks(tile_lists.list_hidden_in_tasks(*arguments))
    assert most_columns(by_visit, 132) >= max(widths) // tiles.hidden
