"""Kernels in chunks of rows: outputs, gradients and memory for every fill of the chunks.

The kernels of these tests are written in plain JAX. They leave NaN wherever a kernel would leave
its buffers unwritten.

Legend: N rows, D model dimension, E experts, H flat hidden axis.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import chunks, pallas_gpu, swiglu
from tests.helpers.expert_kernels import compute_output_and_gradients, make_inputs, run_reference

DIM = 8
WIDTHS = (6, 2, 5, 3)
TILES = pallas_gpu.Tiles(rows=8)

# A shard with half of the experts of a layer.
HALF_OF_THE_EXPERTS = expert_placement.Placement(((0, 1, 2, 3), (4, 5, 6, 7)), (WIDTHS, WIDTHS))


class PlainKernels:
    """The interface of a kernel module, over every row and hidden unit, with selects.

    `calls` records (function, number of rows, save).
    """

    calls = []

    @staticmethod
    def _owned(rows_E, num_rows, placement):
        """Returns a mask [N, H]: row n belongs to the expert of hidden unit h."""
        widths = placement.widths[0]
        expert_H = jnp.asarray(np.repeat(np.arange(len(widths)), widths))
        expert_N = jnp.searchsorted(jnp.cumsum(rows_E), jnp.arange(num_rows), side="right")
        return expert_N[:, None] == expert_H[None, :]

    @classmethod
    def forward(cls, x_ND, rows_E, weights, shard, placement, tiles, interpret, save):
        cls.calls.append(("forward", x_ND.shape[0], save))
        w_gate, w_up, w_down = weights
        owned_NH = cls._owned(rows_E, x_ND.shape[0], placement)
        gate_NH = jnp.where(owned_NH, x_ND @ w_gate, jnp.nan)
        up_NH = jnp.where(owned_NH, x_ND @ w_up, jnp.nan)
        y_ND = jnp.where(owned_NH, jax.nn.silu(gate_NH) * up_NH, 0) @ w_down
        return y_ND, (gate_NH, up_NH, owned_NH) if save else None

    @classmethod
    def backward(cls, x_ND, rows_E, weights, shard, saved, dy_ND, placement, tiles, interpret):
        cls.calls.append(("backward", x_ND.shape[0]))
        w_gate, w_up, w_down = weights
        gate_NH, up_NH, owned_NH = saved
        routed_N1 = owned_NH.any(axis=1, keepdims=True)
        x_ND, dy_ND = jnp.where(routed_N1, x_ND, 0), jnp.where(routed_N1, dy_ND, 0)
        gradients = swiglu.swiglu_backward(gate_NH, up_NH, dy_ND @ w_down.T)
        hidden_NH, dgate_NH, dup_NH = (jnp.where(owned_NH, a, 0) for a in gradients)
        dx_ND = dgate_NH @ w_gate.T + dup_NH @ w_up.T
        return dx_ND, x_ND.T @ dgate_NH, x_ND.T @ dup_NH, hidden_NH.T @ dy_ND


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
def test_chunks_match_reference(rows, num_rows):
    """There is NaN in all padding rows of x and dy, and in all unused saved activations."""
    placement = HALF_OF_THE_EXPERTS
    assert chunks.chunk_rows(num_rows, placement, TILES.rows) < num_rows
    inputs = make_inputs(WIDTHS, rows, num_rows, DIM)
    computed = jax.jit(lambda inputs: run_in_chunks(inputs, placement))(inputs)
    expected = run_reference(inputs, WIDTHS)
    for array, want in zip(computed, expected, strict=True):
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-5)


def run_in_chunks(inputs, placement):
    """Returns the output and all gradients."""

    def plain_kernels(x, weights):
        shard = jnp.int32(0)
        arguments = (x, inputs.rows_E, *weights, shard, PlainKernels, placement, TILES)
        return chunks.run_in_chunks(*arguments)

    return compute_output_and_gradients(plain_kernels, inputs)


def trace_training_pass(num_rows, placement):
    """Returns the jaxpr of one forward and backward pass, and the calls of the kernels in it."""
    inputs = make_inputs(WIDTHS, (3, 4, 5, 6), num_rows, DIM)
    PlainKernels.calls.clear()
    jaxpr = jax.make_jaxpr(lambda inputs: run_in_chunks(inputs, placement))(inputs)
    return jaxpr, list(PlainKernels.calls)


def test_one_chunk_adds_nothing_to_the_kernels():
    placement = expert_placement.Placement(((0, 1, 2, 3),), (WIDTHS,))
    jaxpr, calls = trace_training_pass(64, placement)
    assert calls == [("forward", 64, True), ("backward", 64)]
    primitives = {equation.primitive.name for equation in jaxpr.eqns}
    assert not {"while", "scan", "dynamic_update_slice"} & primitives


def list_shapes(jaxpr):
    """Yields the shape of every intermediate array, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from list_shapes(getattr(inner, "jaxpr", inner))


def test_chunks_bound_the_activations_and_save_only_those_of_the_first():
    """83 rows are chunks of 56 and 27, which is padded to 56.

    No array of hidden activations has more than 56 rows, and the backward pass recomputes the
    second chunk alone.
    """
    jaxpr, calls = trace_training_pass(83, HALF_OF_THE_EXPERTS)
    assert calls == [
        ("forward", 56, True),
        ("forward", 56, False),
        ("backward", 56),
        ("forward", 56, True),
        ("backward", 56),
    ]
    shapes = set(list_shapes(jaxpr.jaxpr))
    num_hidden = sum(WIDTHS)
    assert max(shape[0] for shape in shapes if shape[1:] == (num_hidden,)) == 56


def test_no_loop_depends_on_the_routing():
    """A loop with a data-dependent trip count would make a GPU wait for the host.

    Every loop over chunks is a scan, whose length is static.
    """
    experts = ((0, 1, 2, 3), *((e,) for e in range(4, 20)))
    placement = expert_placement.Placement(experts, (WIDTHS,) * 17)
    jaxpr, _ = trace_training_pass(96, placement)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [3, 3]
    assert "while" not in {equation.primitive.name for equation in jaxpr.eqns}


@pytest.mark.parametrize(
    "num_rows, num_shards, tile_rows, expected",
    [
        (131_072, 1, 128, 131_072),  # the shard receives every row
        (524_288, 4, 128, 163_840),  # a quarter of the rows, and a quarter more
        (100, 4, 128, 100),  # less than a tile
        (0, 4, 128, 0),
    ],
)
def test_chunk_has_room_for_a_quarter_more_than_balanced_routing(
    num_rows, num_shards, tile_rows, expected
):
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 64)
    placement = expert_placement.place_experts(widths, num_shards, "whole")
    assert chunks.chunk_rows(num_rows, placement, tile_rows) == expected


def test_chunks_divide_the_rows_of_every_expert():
    rows_E = jnp.asarray([5, 0, 17, 3])
    parts = [chunks.rows_in_chunk(rows_E, first, 8).tolist() for first in range(0, 32, 8)]
    assert parts == [[5, 0, 3, 0], [0, 0, 8, 0], [0, 0, 6, 2], [0, 0, 0, 1]]
