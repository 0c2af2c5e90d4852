"""Outputs and gradients of the expert FFN equal a float64 numpy loop over rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import block_sizes, blocked, expert_weights, select
from tests.helpers import numpy_reference

D = 6


CASES = {  # widths, rows per expert, padding rows
    "unequal": ((9, 1, 5, 5, 9, 1), (7, 3, 20, 1, 9, 2), 5),
    "equal": ((5,) * 4, (11, 3, 9, 2), 0),
    "empty experts": ((9, 1, 5, 5), (0, 13, 0, 7), 3),
    "all on one": ((7, 3, 5, 5), (0, 0, 31, 0), 1),
    "one expert": ((8,), (17,), 2),
    "no rows at all": ((4, 4), (0, 0), 6),
    "many small": ((3,) * 20 + (2,) * 12, tuple(range(32)), 4),
}


def numbers(case):
    widths, rows, spare = CASES[case]
    rng = np.random.default_rng(len(case))
    shapes = dict(w_gate=(D, sum(widths)), w_up=(D, sum(widths)), w_down=(sum(widths), D))
    w = {k: rng.normal(size=s) for k, s in shapes.items()}
    x, dy = (rng.normal(size=(sum(rows) + spare, D)) for _ in range(2))
    return widths, rows, w, x, dy


def numpy_value_and_grads(widths, rows, w, x, dy):
    """Returns y, dx and a dict of weight gradients of sum(y * dy), computed row by row."""
    y, dx, dw = np.zeros_like(x), np.zeros_like(x), {k: np.zeros_like(v) for k, v in w.items()}
    owner = np.repeat(np.arange(len(rows)), rows)
    for n, e in enumerate(owner):
        s = slice(expert_widths.offsets(widths)[e], expert_widths.offsets(widths)[e] + widths[e])
        u, v = x[n] @ w["w_gate"][:, s], x[n] @ w["w_up"][:, s]
        sig = 1 / (1 + np.exp(-u))
        y[n] = (u * sig * v) @ w["w_down"][s]
        dh = w["w_down"][s] @ dy[n]
        dw["w_down"][s] += np.outer(u * sig * v, dy[n])
        du, dv = dh * v * (sig + u * sig * (1 - sig)), dh * u * sig
        dw["w_gate"][:, s] += np.outer(x[n], du)
        dw["w_up"][:, s] += np.outer(x[n], dv)
        dx[n] = w["w_gate"][:, s] @ du + w["w_up"][:, s] @ dv
    return y, dx, dw


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def value_and_grads(x, rows, w, dy, widths, backend, saved=0.0, chip="cpu"):
    def f(x, w):
        return select.expert_ffn(
            x,
            rows,
            expert_weights.ExpertWeights(**w),
            expert_placement.place_experts(widths, 1, "whole"),
            backend,
            block_sizes.Blocks(8, 4, saved),
            chip,
        )

    y, pull = jax.vjp(f, x, w)
    return (y, *pull(dy))


@pytest.mark.parametrize(
    "case,backend,saved",
    [(c, b, 0.0) for c in CASES for b in ("reference", "blocked")]
    + [
        ("unequal", "blocked", 0.5),
        ("empty experts", "blocked", 0.9),
        ("all on one", "blocked", 9.0),
    ],
)
def test_outputs_and_gradients_equal_numpy(case, backend, saved):
    widths, rows, w, x, dy = numbers(case)
    expected = numpy_value_and_grads(widths, rows, w, x, dy)
    x[sum(rows) :], dy[sum(rows) :] = np.nan, np.nan  # padding rows may hold anything
    x, w, dy = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, w, dy))
    y, dx, dw = value_and_grads(x, jnp.asarray(rows, jnp.int32), w, dy, widths, backend, saved)
    for got, want in zip(jax.tree.leaves((y, dx, dw)), jax.tree.leaves(expected)):
        scale = max(1e-3, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got) / scale, want / scale, atol=2e-6)


@pytest.mark.parametrize(
    "case, saved, chip",
    [
        ("unequal", 0.5, "h100"),
        pytest.param("empty experts", 0.9, "h100", marks=pytest.mark.slow),
        ("all on one", 9.0, "h100"),
        ("unequal", 0.5, "cpu"),
    ],
)
def test_unwritten_saved_activations_are_never_read(case, saved, chip, monkeypatch):
    """The buffer of saved activations may be NaN at first."""
    widths, rows, w, x, dy = numbers(case)
    expected = numpy_value_and_grads(widths, rows, w, x, dy)
    x[sum(rows) :], dy[sum(rows) :] = np.nan, np.nan
    x, w, dy = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, w, dy))
    sizes = []

    def nan(shape, dtype, rows_E, chip):
        sizes.append(shape[0])
        return jnp.full(shape, jnp.nan, dtype)

    monkeypatch.setattr(blocked, "_unwritten", nan)
    arrays = jax.jit(lambda *a: value_and_grads.__wrapped__(*a, widths, "blocked", saved, chip))(
        x, jnp.asarray(rows, jnp.int32), w, dy
    )
    assert sizes and max(sizes) > 0
    for got, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(expected)):
        scale = max(1e-3, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got) / scale, want / scale, atol=2e-6)


@pytest.mark.parametrize("saved", [0.0, 1.0])
def test_residuals_hold_no_empty_array(saved):
    """jaxlib 0.11.2 crashes if an empty array leaves a shard_map."""
    widths, rows, w, x, _ = numbers("unequal")
    _, pull = jax.vjp(
        lambda x: select.expert_ffn(
            x,
            jnp.asarray(rows),
            expert_weights.ExpertWeights(**w),
            expert_placement.place_experts(widths, 1, "whole"),
            "blocked",
            block_sizes.Blocks(8, 4, saved),
            "cpu",
        ),
        jnp.asarray(x, jnp.float32),
    )
    assert all(leaf.size for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize(
    "kind, shards, saved",
    [
        ("whole", 2, 1.0),
        ("split", 2, 0.0),
        pytest.param("whole", 2, 0.0, marks=pytest.mark.slow),
        pytest.param("split", 2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_all_shards_run_one_program(kind, shards, saved):
    """The shard is an argument of the compiled program. Padding rows are NaN."""
    placement = (
        expert_placement.place_experts((10, 2, 8, 4, 4, 4, 4), 2, kind)
        if kind == "whole"
        else expert_placement.place_experts((8, 2, 4), 2, kind)
    )
    columns, rng = sum(placement.widths[0]), np.random.default_rng(0)
    w = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in dict(w_gate=(D, columns), w_up=(D, columns), w_down=(columns, D)).items()
    }
    x, dy = (
        jnp.asarray(rng.normal(size=(40, D)), jnp.float32).at[31:].set(jnp.nan) for _ in range(2)
    )

    @functools.partial(jax.jit, static_argnums=1)
    def run(shard, backend, rows):
        def f(x, w):
            blocks = block_sizes.Blocks(8, 4, saved)
            return select.expert_ffn(
                x, rows, expert_weights.ExpertWeights(**w), placement, backend, blocks, "cpu", shard
            )

        y, pull = jax.vjp(f, x, w)
        return (y, *pull(dy))

    for shard in range(shards):
        own = len(placement.experts[shard])
        rows = jnp.asarray(
            [*rng.multinomial(31, np.full(own, 1 / own)), *[0] * (placement.slots - own)], jnp.int32
        )
        for a, b in zip(
            *(jax.tree.leaves(run(shard, backend, rows)) for backend in ("blocked", "reference"))
        ):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1, float(jnp.abs(b).max())))


def test_weights_of_experts_without_rows_are_never_read():
    """NaN in all weights of experts without rows changes no output and no gradient."""
    widths, rows, w, x, dy = numbers("empty experts")
    for e in (0, 2):
        s = slice(expert_widths.offsets(widths)[e], expert_widths.offsets(widths)[e] + widths[e])
        w["w_gate"][:, s] = w["w_up"][:, s] = w["w_down"][s] = np.nan
    x, w, dy = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, w, dy))
    y, dx, dw = value_and_grads(x, jnp.asarray(rows, jnp.int32), w, dy, widths, "blocked")
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((y, dx, dw)))


def test_bfloat16_matmuls_accumulate_in_float32():
    widths, rows, w, x, dy = numbers("unequal")
    expected = numpy_value_and_grads(widths, rows, w, x, dy)[0]
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, w, dy))
    y, _, dw = value_and_grads(
        low[0], jnp.asarray(rows, jnp.int32), low[1], low[2], widths, "blocked"
    )
    assert y.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.bfloat16 for a in dw.values())
    assert np.abs(np.asarray(y, np.float64) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("chip", ["cpu", "h100"])
def test_weight_gradients_are_summed_over_blocks_in_float32(chip):
    """4,096 rows in blocks of 8: a sum in bfloat16 would lose the small terms."""
    rows, rng = 4096, np.random.default_rng(0)
    w = {
        k: jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        for k, s in dict(w_gate=(D, 4), w_up=(D, 4), w_down=(4, D)).items()
    }
    x, dy = (jnp.asarray(1 + 0.1 * rng.normal(size=(rows, D)), jnp.bfloat16) for _ in range(2))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), ((4,), (rows,), w, x, dy))
    got = value_and_grads(x, jnp.asarray([rows], jnp.int32), w, dy, (4,), "blocked", 0.0, chip)[2]
    for name, want in numpy_value_and_grads((4,), (rows,), *exact[2:])[2].items():
        assert np.abs(np.asarray(got[name], np.float64) - want).max() < 0.01 * np.abs(want).max()


@pytest.mark.parametrize(
    "experts, width, top, backend",
    [(64, 2, 8, "blocked"), (1024, 1, 8, "blocked"), (8, 3, 8, "blocked")],
)
def test_many_experts_and_dense_routing_equal_numpy(experts, width, top, backend):
    """The last case routes every token to every expert."""
    rng, tokens = np.random.default_rng(0), 16
    rows = (
        rng.multinomial(tokens * top, np.full(experts, 1 / experts))
        if top < experts
        else np.full(experts, tokens)
    )
    w = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in dict(
            w_gate=(D, experts * width), w_up=(D, experts * width), w_down=(experts * width, D)
        ).items()
    }
    x, dy = (jnp.asarray(rng.normal(size=(tokens * top, D)), jnp.float32) for _ in range(2))
    got = value_and_grads(x, jnp.asarray(rows, jnp.int32), w, dy, (width,) * experts, backend)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (w, x, dy))
    want = numpy_value_and_grads((width,) * experts, rows, *exact)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1, float(np.abs(b).max())))


def test_saved_range_does_not_overflow_32_bits():
    """One expert has 2^20 rows and width 2^12. Its 2^33 elements would wrap to 0 in 32 bits."""
    expert = blocked.Expert(jnp.int32(0), jnp.int32(2**20), jnp.int32(0), 2**12)
    size, placement = 2**28, expert_placement.place_experts((2**12,), 1, "whole")
    sizes = blocked.BlockSizes((), (8, 4))
    fits, here, after = blocked.find_saved_range(size, placement, sizes, expert, jnp.int32(100))
    assert not fits and int(here) == size - 2 * 8 * 2**12 and int(after) == 100
    few = expert._replace(num_rows=jnp.int32(5))
    fits, here, after = blocked.find_saved_range(size, placement, sizes, few, jnp.int32(100))
    assert fits and int(here) == 100 and int(after) == 100 + 2 * 2**12 * (4 + 4)
    assert (
        blocked.saved_buffer_size(block_sizes.Blocks(8, 4, 1.0), 2**20, placement, sizes)
        == 2**31 - 1
    )


@pytest.mark.parametrize("limit, saves", [(0.75, False), (1.25, True)])
def test_no_activations_are_saved_if_int32_cannot_index_one_block(limit, saves, monkeypatch):
    """`limit` is what int32 can index, relative to one block, whose halves must not overlap."""
    widths, rows, w, x, dy = numbers("unequal")
    expected = numpy_value_and_grads(widths, rows, w, x, dy)
    placement = expert_placement.place_experts(widths, 1, "whole")
    sizes = blocked.choose_block_sizes(block_sizes.Blocks(8, 4), len(x), len(rows), "h100")
    one_block = 2 * max(sizes.multi_block) * max(widths)
    monkeypatch.setattr(blocked, "MAX_INT32", int(limit * one_block))
    blocks = block_sizes.Blocks(8, 4, 1.25)
    assert bool(blocked.saved_buffer_size(blocks, len(x), placement, sizes)) == saves
    x, w, dy = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, w, dy))
    x, dy = x.at[sum(rows) :].set(0), dy.at[sum(rows) :].set(0)
    rows = jnp.asarray(rows, jnp.int32)
    got = value_and_grads.__wrapped__(x, rows, w, dy, widths, "blocked", 1.25, "h100")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1e-3, np.abs(b).max()))


@functools.partial(jax.jit, static_argnums=(4, 5))
def in_blocks(x, rows, w, dy, widths, blocks):
    def f(x, w):
        return select.expert_ffn(
            x,
            rows,
            expert_weights.ExpertWeights(**w),
            expert_placement.place_experts(widths, 1, "whole"),
            "blocked",
            blocks,
            "cpu",
        )

    y, pull = jax.vjp(f, x, w)
    return (y, *pull(dy))


@pytest.mark.parametrize(
    "body, tail, saved, total, experts",
    [
        (128, 8, 0.4, 260, 3),
        (64, 64, 1.0, 150, 2),
        pytest.param(128, 8, 1.25, 260, 3, marks=pytest.mark.slow),
        pytest.param(100, 8, 9.0, 400, 2, marks=pytest.mark.slow),
    ],
)
def test_single_block_and_multi_block_experts_match_the_reference(
    body, tail, saved, total, experts
):
    """Tests the row counts around every block size, and none, one and all of the rows.

    The saved activations of one expert must not overlap those of the next.
    """
    widths = (5, 3, 5)[:experts]
    sizes = blocked.choose_block_sizes(block_sizes.Blocks(body, tail, saved), total, experts, "cpu")
    assert sizes.single_block or body == 100
    rng = np.random.default_rng(0)
    w = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in dict(
            w_gate=(D, sum(widths)), w_up=(D, sum(widths)), w_down=(sum(widths), D)
        ).items()
    }
    interesting = {
        0,
        1,
        total,
        *(s + d for s in (*sizes.single_block, *sizes.multi_block) for d in (-1, 0, 1)),
    }
    for first in sorted(r for r in interesting if 0 <= r <= total):
        left = total - first
        rows = (
            (first, left)
            if experts == 2
            else (first, left // 3, left - left // 3 - min(left - left // 3, 4))
        )
        x, dy = (
            jnp.asarray(rng.normal(size=(total, D)), jnp.float32).at[sum(rows) :].set(jnp.nan)
            for _ in range(2)
        )
        got = in_blocks(x, jnp.asarray(rows), w, dy, widths, block_sizes.Blocks(body, tail, saved))
        want = value_and_grads(x, jnp.asarray(rows), w, dy, widths, "reference")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1, float(jnp.abs(b).max())))


def test_single_blocks_are_compiled_only_if_they_can_hold_an_even_share():
    few, many = (
        blocked.choose_block_sizes(block_sizes.Blocks(1024, 64), n, 8, "cpu")
        for n in (8192, 131072)
    )
    assert (
        few.single_block[0] == 512
        and few.single_block[-1] == 1536
        and few.multi_block == (1024, 512, 128)
    )
    assert many.single_block == () and many.multi_block == (1024, 512, 128)
    assert blocked.choose_block_sizes(block_sizes.Blocks(1024, 64), 2, 8, "cpu") == (
        (),
        (2,),
    )  # decoding
    assert blocked.choose_block_sizes(block_sizes.Blocks(1024, 64), 8192, 8, "h100") == (
        (),
        few.multi_block,
    )  # a loop costs more


def test_weight_gradient_transposes_x_only_on_cpu():
    """Other devices multiply transposed operands as fast, and need no copy."""
    widths, rows, w, x, dy = numbers("unequal")
    text = {
        c: value_and_grads.lower(x, np.asarray(rows), w, dy, widths, "blocked", 0.0, c).as_text()
        for c in ("cpu", "h100")
    }
    assert "optimization_barrier" in text["cpu"] and "optimization_barrier" not in text["h100"]


@pytest.mark.parametrize("chip", ["cpu", "h100"])
def test_random_widths_and_routings_agree_with_the_reference(chip):
    rng = np.random.default_rng(0)
    widths = tuple(int(w) for w in rng.integers(1, 12, 4))
    for _ in range(5):
        rows = rng.multinomial(60, rng.dirichlet(np.full(4, 0.4))).astype(np.int32)
        w = {
            k: jnp.asarray(rng.normal(size=s), jnp.float32)
            for k, s in dict(
                w_gate=(D, sum(widths)), w_up=(D, sum(widths)), w_down=(sum(widths), D)
            ).items()
        }
        x, dy = (jnp.asarray(rng.normal(size=(64, D)), jnp.float32) for _ in range(2))
        got = value_and_grads(x, jnp.asarray(rows), w, dy, widths, "blocked", 0.5, chip)
        want = value_and_grads(x, jnp.asarray(rows), w, dy, widths, "reference")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=3e-5 * max(1, float(jnp.abs(b).max())))


def test_weights_are_sliced_only_for_experts_with_rows(compiled_with_care):
    """XLA must not hoist the slices: decoding would read the weights of all experts."""
    placement = expert_placement.place_experts((9, 4, 5), 1, "whole")
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, D), (D, 18), (D, 18), (18, D))
    ]

    def layer(rows, x, *w):
        return select.expert_ffn(
            x,
            rows,
            expert_weights.ExpertWeights(*w),
            placement,
            "blocked",
            block_sizes.Blocks(8, 4),
            "cpu",
        )

    text = jax.jit(layer).lower(jax.ShapeDtypeStruct((3,), jnp.int32), *shapes).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "while(" in entry and not re.search(r"f32\[(6,[945]|[945],6)\]", entry)


def test_the_program_does_not_grow_with_the_number_of_experts():
    """It grows with the number of size classes."""

    def lines(num_experts):
        widths = (16,) * num_experts
        placement = expert_placement.place_experts(widths, 1, "whole")
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32)
            for s in ((256, D), (D, sum(widths)), (D, sum(widths)), (sum(widths), D))
        ]

        def f(x, rows, *w):
            return select.expert_ffn(
                x,
                rows,
                expert_weights.ExpertWeights(*w),
                placement,
                "blocked",
                block_sizes.Blocks(64, 8),
                "cpu",
            )

        rows = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
        return len(jax.jit(f).lower(shapes[0], rows, *shapes[1:]).as_text().splitlines())

    assert lines(1024) <= lines(8)


def test_widths_that_do_not_fit_the_weights_are_rejected():
    w = expert_weights.ExpertWeights(jnp.zeros((D, 8)), jnp.zeros((D, 8)), jnp.zeros((8, D)))
    with pytest.raises(ValueError, match=r"widths \(\(4, 5\),\) do not fit"):
        select.expert_ffn(
            jnp.zeros((4, D)),
            jnp.zeros(2, jnp.int32),
            w,
            expert_placement.place_experts((4, 5), 1, "whole"),
            "blocked",
            block_sizes.Blocks(8, 4),
            "cpu",
        )


def test_the_two_numpy_references_agree():
    widths, rows, w, x, dy = numbers("unequal")
    y = numpy_value_and_grads(widths, rows, w, x, dy)[0]
    np.testing.assert_allclose(y[0], numpy_reference.expert(x[0], w, 0, widths[0]), atol=1e-12)
