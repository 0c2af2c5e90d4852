"""The Pallas Mosaic GPU kernels in interpret mode, NaN planted wherever nothing may be read, against the reference; and
lowered for CUDA at real sizes, where no GPU is needed.

Interpret mode checks what is read, masked and stored; it does not model what runs at the same time on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import chunks, expert_weights, pallas_gpu, reference_ffn, select

INTERPRET = InterpretGPUParams(uninitialized_memory="nan")


D = 128


def numbers(widths, rows, num_rows, dtype=jnp.bfloat16, dim=D):
    rng = np.random.default_rng(0)
    w = expert_weights.ExpertWeights(
        *(
            jnp.asarray(0.08 * rng.normal(size=s), dtype)
            for s in ((dim, sum(widths)), (dim, sum(widths)), (sum(widths), dim))
        )
    )
    x, dy = (
        jnp.asarray(rng.normal(size=(num_rows, dim)), dtype).at[sum(rows) :].set(jnp.nan)
        for _ in range(2)
    )
    return x, jnp.asarray(rows, jnp.int32), w, dy


def run_gpu(x, rows, w, shard, placement, tiles, interpret=False):
    return chunks.run_in_chunks(
        x, rows, *w, jnp.int32(shard), pallas_gpu, placement, tiles, interpret
    )


def both(function, x, w, dy):
    y, pull = jax.vjp(function, x, w)
    return (y, *pull(dy))


def random_case(seed, unit, experts=4, num_rows=150):
    """Rows and widths of nobody's choosing, 5 rows of nobody."""
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(num_rows - 5, rng.dirichlet(np.full(experts, 0.4)))
    return (
        tuple(map(int, rows)),
        num_rows,
        tuple(unit * int(n) for n in rng.integers(1, 5, experts)),
    )


def assert_close(got, want, most=0.01):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.isfinite(a).all() and np.linalg.norm(a - b) <= most * np.linalg.norm(b) + 1e-30


@pytest.mark.parametrize(
    "rows, num_rows, dim, widths",
    [
        ((70, 0, 50, 9), 140, 128, (192, 64, 64, 128)),
        ((0, 0, 130, 0), 130, 128, (192, 64, 64, 128)),
        ((0, 0, 0, 0), 20, 128, (192, 64, 64, 128)),
        ((5, 40, 0, 20), 70, 256, (192, 64, 64, 128)),
        ((30, 33), 63, 128, (64, 64)),
        ((7, 90, 1), 100, 128, (64, 128, 64)),
        *(
            (rows, num_rows, 128, widths)
            for rows, num_rows, widths in (random_case(0, 64), random_case(1, 64))
        ),
    ],
)
def test_kernels_equal_the_reference(rows, num_rows, dim, widths):
    """Tiles that experts share, an empty expert, all on one, rows of nobody, no rows, equal widths, random ones; the
    interpreter fills what no kernel wrote with NaN."""
    placement, tiles = (
        expert_placement.place_experts(widths, 1, "pairs"),
        pallas_gpu.Tiles(rows=64, wide=64, stages=2, blocks=2),
    )
    x, rows, w, dy = numbers(widths, rows, num_rows, dim=dim)
    got = both(lambda x, w: run_gpu(x, rows, w, 0, placement, tiles, INTERPRET), x, w, dy)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, w, dy))
    assert_close(got, both(lambda x, w: reference_ffn.reference(x, rows, w, widths), *exact))


def test_shards_of_unlike_experts_wide_tiles_and_half_precision():
    placement = expert_placement.place_experts((256, 128, 128, 256), 2, "pairs")
    tiles = pallas_gpu.Tiles(rows=64, wide=128, stages=2, blocks=3)
    x, rows, w, dy = numbers(placement.widths[1], (10, 60), 80, jnp.float16)
    got = both(lambda x, w: run_gpu(x, rows, w, 1, placement, tiles, INTERPRET), x, w, dy)
    assert_close(
        got, both(lambda x, w: reference_ffn.reference(x, rows, w, placement.widths[1]), x, w, dy)
    )


def test_widths_that_are_no_multiples_are_padded():
    """An odd width, and shards whose padded sums differ."""
    placement = expert_placement.place_experts((70, 30, 36, 64), 2, "pairs")
    tiles = pallas_gpu.Tiles(rows=64, wide=64, stages=2, blocks=2)
    for shard, widths in enumerate(placement.widths):
        x, rows, w, dy = numbers(widths, (30, 41), 80)
        got = both(
            lambda x, w, s=shard, r=rows: select.run_kernels(
                "pallas_gpu", x, r, w, jnp.int32(s), placement, (tiles, 64), INTERPRET
            ),
            x,
            w,
            dy,
        )
        exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, w, dy))
        assert_close(
            got, both(lambda x, w, r=rows, u=widths: reference_ffn.reference(x, r, w, u), *exact)
        )


def test_the_forward_pass_alone_keeps_nothing():
    widths = (64, 128)
    placement, tiles = (
        expert_placement.place_experts(widths, 1, "pairs"),
        pallas_gpu.Tiles(rows=64, wide=64, stages=2, blocks=1),
    )
    x, rows, w, _ = numbers(widths, (30, 20), 64)
    y = run_gpu(x, rows, w, 0, placement, tiles, INTERPRET)
    assert_close(y, reference_ffn.reference(x, rows, w, widths))


@pytest.mark.parametrize(
    "dim, kind, shards",
    [  # 300Mx8 and 700Mx8
        (1536, "pairs", 1),
        (1536, "pairs", 4),
        (1536, "columns", 2),
        (2048, "pairs", 1),
        (2048, "columns", 2),
    ],
)
def test_lowered_for_hopper_without_one(dim, kind, shards):
    """Layouts, transforms, shared memory: what Mosaic refuses, it refuses here."""
    placement = expert_placement.place_experts(
        expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim), shards, kind
    )
    H, N = sum(placement.widths[0]), 131_072
    tiles = pallas_gpu.tiles_for(
        [w for widths in placement.widths for w in widths], dim, "h200", "bfloat16"
    )

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    @jax.jit
    def run(x, rows, w, dy):
        return both(lambda x, w: run_gpu(x, rows, w, 0, placement, tiles), x, w, dy)

    w = array(dim, H), array(dim, H), array(H, dim)
    traced = run.trace(array(N, dim), array(placement.slots, dtype=jnp.int32), w, array(N, dim))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward A and B; backward A, B and three of C. A shard of four has chunks of rows: the first, those in a loop, the
    # last; the later ones run A again in the backward pass.
    chunks, again = (3, 2) if shards == 4 else (1, 0)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 7 * chunks + again


def test_what_it_cannot_do_names_what_would():
    with pytest.raises(
        ValueError, match="needs one of h100, h200, this is cpu; backends that run anywhere"
    ):
        pallas_gpu.tiles_for((128,), 128, "cpu", "bfloat16")
    with pytest.raises(
        ValueError, match="model.dim=192 is not divisible by 128; backends that take any: blocked"
    ):
        pallas_gpu.tiles_for((128,), 192, "h100", "bfloat16")
    with pytest.raises(ValueError, match="not float32; set model.dtype=bfloat16"):
        select.check_backend(
            "pallas_gpu",
            expert_placement.place_experts((128,), 1, "pairs"),
            (64, 128),
            "h100",
            "float32",
        )
    with pytest.raises(ValueError, match="tasks of tiles 128 x 64, more than"):
        select.check_backend(
            "pallas_gpu",
            expert_placement.place_experts((65536,), 1, "pairs"),
            (2**22, 128),
            "h100",
            "bfloat16",
        )


def test_a_device_with_wrong_kernels_is_found(monkeypatch):
    placement = expert_placement.place_experts((64, 128), 1, "pairs")
    monkeypatch.setattr(
        pallas_gpu, "tiles_for", lambda *_: pallas_gpu.Tiles(rows=64, wide=64, stages=2, blocks=1)
    )
    select.self_test_kernels("pallas_gpu", placement, 128, "h100", "bfloat16", INTERPRET)
    right = pallas_gpu.run_hidden_in
    monkeypatch.setattr(
        pallas_gpu, "run_hidden_in", lambda *arguments: right(*arguments).at[64:128].set(0)
    )
    with pytest.raises(
        RuntimeError, match="the kernels of pallas_gpu are wrong on this device: y differs"
    ):
        select.self_test_kernels("pallas_gpu", placement, 128, "h100", "bfloat16", INTERPRET)
