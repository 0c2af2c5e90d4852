"""The Pallas TPU kernels in interpret mode, NaN planted wherever nothing may be read, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import expert_weights, pallas_tpu, reference_ffn, select, tile_lists

WIDTHS = (12, 4, 8, 4, 16)


PLACEMENT = expert_placement.place_experts(WIDTHS, 1, "pairs")


D, N = 16, 64


ROUTINGS = {
    "shared tiles": (13, 1, 19, 7, 20),
    "all on one": (64, 0, 0, 0, 0),
    "empty experts, rows of nobody": (0, 30, 0, 9, 0),
    "whole tiles": (8, 8, 8, 8, 32),
    "a few rows": (1, 2, 3, 4, 5),
    "no rows": (0, 0, 0, 0, 0),
}


@functools.partial(jax.jit, static_argnums=(4, 5))
def value_and_grads(x, rows, w, dy, tiles, widths):
    def f(x, w):
        if tiles is None:
            return reference_ffn.reference(x, rows, w, widths)
        return pallas_tpu.pallas_tpu(
            x, rows, *w, 0, expert_placement.place_experts(widths, 1, "pairs"), tiles, True
        )

    y, pull = jax.vjp(f, x, w)
    return (y, *pull(dy))


def numbers(rows, widths=WIDTHS, num_rows=N):
    rng = np.random.default_rng(0)
    w = expert_weights.ExpertWeights(
        *(
            jnp.asarray(rng.normal(size=s), jnp.float32)
            for s in ((D, sum(widths)), (D, sum(widths)), (sum(widths), D))
        )
    )
    x, dy = (
        jnp.asarray(rng.normal(size=(num_rows, D)), jnp.float32).at[sum(rows) :].set(jnp.nan)
        for _ in range(2)
    )
    return x, jnp.asarray(rows, jnp.int32), w, dy


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("cores", [1, 2])
def test_kernels_equal_the_reference(cores):
    """Outputs and all gradients; interpret mode fills what no kernel wrote with NaN, unused columns included."""
    for rows in ROUTINGS.values():
        x, rows, w, dy = numbers(rows)
        got = value_and_grads(x, rows, w, dy, pallas_tpu.Tiles(8, 4, 8, 16 // cores, cores), WIDTHS)
        assert_equal(got, value_and_grads(x, rows, w, dy, None, WIDTHS))


def test_shards_of_unlike_experts_run_one_program():
    """Two shards: of 3 experts and of 2, one place being empty; the shard is an argument of the compiled program."""
    placement = expert_placement.place_experts((12, 4, 8, 16, 8), 2, "pairs")
    assert placement.widths == ((12, 4, 8), (16, 8))

    tiles = pallas_tpu.Tiles(8, 4, 8, 8, 2)

    @jax.jit
    def run(x, rows, w, dy, shard):
        y, pull = jax.vjp(
            lambda x, w: pallas_tpu.pallas_tpu(x, rows, *w, shard, placement, tiles, True), x, w
        )
        return (y, *pull(dy))

    for shard, rows in enumerate(((13, 0, 31), (9, 20, 0))):
        x, counts, w, dy = numbers(rows, placement.widths[shard])
        want = value_and_grads(
            x, counts[: len(placement.widths[shard])], w, dy, None, placement.widths[shard]
        )
        assert_equal(run(x, counts, w, dy, shard), want)


def test_rows_that_do_not_fill_a_tile_and_random_widths():
    rng = np.random.default_rng(1)
    widths = tuple(int(w) for w in 4 * rng.integers(1, 5, 3))
    for _ in range(4):
        x, rows, w, dy = numbers(
            rng.multinomial(59, rng.dirichlet(np.full(3, 0.4))).tolist(), widths, 61
        )
        got = value_and_grads(x, rows, w, dy, pallas_tpu.Tiles(8, 4, 16, 16), widths)
        assert_equal(got, value_and_grads(x, rows, w, dy, None, widths))


def test_unused_columns_of_the_hidden_buffer_are_nan_in_these_tests():
    """Else the tests above would prove nothing about columns past an expert's width."""
    x, rows, w, _ = numbers(ROUTINGS["shared tiles"])
    job = pallas_tpu._make_job(x, rows, 0, PLACEMENT, pallas_tpu.Tiles(8, 4, 8, 16), True)
    matmuls = [pallas_tpu.HiddenOutMatmul(0, weights, False) for weights in (w.w_gate, w.w_up)]
    padded = pallas_tpu._pad_rows(x, job)
    (hidden,) = pallas_tpu.run_hidden_out(job, [padded], matmuls, pallas_tpu._swiglu, 1)
    owner = np.repeat(np.arange(5), ROUTINGS["shared tiles"])
    for n in (0, 13, 45):
        width = WIDTHS[owner[n]]
        assert np.isfinite(hidden[n, :width]).all()
        assert not np.isfinite(hidden[n, width:]).any() or width == max(WIDTHS)


@pytest.mark.parametrize(
    "work",
    [
        pallas_tpu.list_hidden_out_tasks,
        tile_lists.list_hidden_in_tasks,
        pallas_tpu.list_weight_tasks,
    ],
)
def test_lists_hold_every_task_once_and_stay_in_their_bound(work):
    tiles, num_tiles = pallas_tpu.Tiles(8, 4, 8, 16), N // 8
    for rows in ROUTINGS.values():
        tasks = work(
            jnp.asarray(rows, jnp.int32),
            tile_lists.list_column_tiles(PLACEMENT, 0, N, tiles),
            tiles,
            num_tiles,
        )
        end, expected = np.cumsum(rows), set()
        for e, (r, width) in enumerate(zip(rows, WIDTHS)):
            touched = range((end[e] - r) // 8, -(-end[e] // 8)) if r else range(0)
            touched = list(touched) or (
                [min((end[e] - r) // 8, num_tiles - 1)]
                if work is pallas_tpu.list_weight_tasks
                else []
            )
            expected |= {(e, tile, c) for tile in touched for c in range(width // 4)}
        live = int(tasks.num_tasks)
        got = list(
            zip(
                *(
                    np.asarray(a)[:live].tolist()
                    for a in (tasks.expert_T, tasks.row_tile_T, tasks.column_tile_T)
                )
            )
        )
        assert len(got) == len(set(got)) and set(got) == expected
        assert live <= tasks.expert_T.shape[0] == tile_lists.max_num_tasks(N, PLACEMENT, tiles)
        assert all(int(a.min()) >= 0 for a in tasks[1:] if a is not None)


def test_cores_never_share_an_output_block():
    tiles = pallas_tpu.Tiles(8, 4, 8, 16)
    work = pallas_tpu.list_hidden_out_tasks(
        jnp.asarray(ROUTINGS["shared tiles"], jnp.int32),
        tile_lists.list_column_tiles(PLACEMENT, 0, N, tiles),
        tiles,
        N // 8,
    )
    first, end = pallas_tpu.split_tasks(work, 2)
    assert (
        int(first[0]) == 0 and int(end[0]) == int(first[1]) and int(end[1]) == int(work.num_tasks)
    )
    blocks = [
        {(int(work.column_tile_T[i]), int(work.row_tile_T[i])) for i in range(int(a), int(b))}
        for a, b in zip(first, end)
    ]
    assert not blocks[0] & blocks[1]
    assert abs(int(end[0] - first[0]) - int(end[1] - first[1])) <= 5  # visits to one block at most


@pytest.mark.parametrize(
    "rows", [(0, 5, 0, 0, 0), (2, 3, 0, 0, 1), (0, 0, 0, 0, 3), (0, 0, 0, 0, 0)]
)
def test_a_core_without_tasks_of_its_own_repeats_the_last_block(rows):
    """It stores a block in any case, and what it never computed must not replace the other core's."""
    tiles, equal = (
        pallas_tpu.Tiles(8, 4, 16, 8, 2),
        expert_placement.place_experts((4,) * 5, 1, "pairs"),
    )
    work = pallas_tpu.list_hidden_out_tasks(
        jnp.asarray(rows, jnp.int32),
        tile_lists.list_column_tiles(equal, 0, N, tiles),
        tiles,
        N // 8,
    )
    first, end = pallas_tpu.split_tasks(work, 2)
    assert int(work.num_tasks) == sum(r > 0 for r in rows)  # all of them of one block
    assert first.tolist() == [0, 0] and end.tolist() == [int(work.num_tasks)] * 2


def test_cores_share_the_outputs_of_every_kernel():
    """Kernel A's tasks are split; B and C have one tile of the model axis for each core."""
    for chip, cores in (("v4", 2), ("v5p", 2), ("v5e", 1), ("v6e", 1)):
        for dim in (1536, 2048):
            tiles = pallas_tpu.tiles_for((768, 1536), dim, chip, "bfloat16")
            assert (tiles.inner, tiles.outer, tiles.cores) == (dim, dim // cores, cores)


def test_what_cannot_be_tiled_is_refused():
    with pytest.raises(
        ValueError, match="model.dim=192 is not divisible by 128; backends that take any: blocked"
    ):
        pallas_tpu.tiles_for((256, 128), 192, "v5e", "float32")
    with pytest.raises(ValueError, match="more than the 50000 that fit"):
        select.check_backend(
            "pallas_tpu",
            expert_placement.place_experts((25600,) * 8, 1, "pairs"),
            (2**20, 128),
            "v5e",
            "bfloat16",
        )


def test_a_device_whose_kernels_are_wrong_is_found(monkeypatch):
    placement = expert_placement.place_experts((128, 128, 256), 1, "pairs")
    select.self_test_kernels("pallas_tpu", placement, 128, "v5e", "bfloat16", interpret=True)
    alone = expert_placement.place_experts((128, 128), 2, "pairs")  # an expert a device
    select.self_test_kernels("pallas_tpu", alone, 128, "v5e", "float32", interpret=True)
    right = pallas_tpu.pallas_tpu
    monkeypatch.setattr(
        pallas_tpu,
        "pallas_tpu",
        lambda x, rows, w_gate, *rest: right(x, rows, w_gate.at[:, -64:].mul(2), *rest),
    )
    with pytest.raises(
        RuntimeError, match="kernels of pallas_tpu are wrong on this device: y differs"
    ):
        select.self_test_kernels("pallas_tpu", placement, 128, "v5e", "bfloat16", interpret=True)


@pytest.mark.parametrize(
    "backend, widths, rows, chip, choice",
    [
        ("auto", (256, 128), 4096, "v5e", "pallas_tpu"),
        ("auto", (256, 128), 4096, "cpu", "blocked"),
        ("auto", (256, 10), 4096, "v5e", "pallas_tpu"),
        ("auto", (100, 10), 4096, "v5e", "blocked"),
        ("auto", (25600, 128), 2**24, "v5e", "blocked"),
        ("reference", (256, 128), 4096, "v5e", "reference"),
    ],
)
def test_auto_takes_the_kernels_where_they_run(backend, widths, rows, chip, choice):
    """With a note where it does not, or where widths are padded."""
    took, why = select.select_backend(
        backend, expert_placement.place_experts(widths, 1, "pairs"), (rows, 256), chip, "bfloat16"
    )
    assert took == choice
    assert bool(why) == (
        backend == "auto" and chip == "v5e" and (took == "blocked" or 10 in widths)
    )


def test_widths_that_are_no_multiples_are_padded():
    """An odd width, and shards that need a filling expert."""
    placement, tiles = (
        expert_placement.place_experts((12, 5, 5, 5, 7), 2, "pairs"),
        pallas_tpu.Tiles(8, 4, 8, 8),
    )

    @jax.jit
    def run(x, rows, w, dy, shard):
        y, pull = jax.vjp(
            lambda x, w: select.run_kernels(
                "pallas_tpu", x, rows, w, shard, placement, (tiles, 4), True
            ),
            x,
            w,
        )
        return (y, *pull(dy))

    for shard, rows in enumerate(((13, 11, 0), (19, 20, 1))):
        x, rows, w, dy = numbers(rows, placement.widths[shard])
        assert_equal(
            run(x, rows, w, dy, jnp.int32(shard)),
            value_and_grads(x, rows, w, dy, None, placement.widths[shard]),
        )


def test_equal_widths():
    widths, rows = (8,) * 5, (13, 0, 19, 7, 20)
    x, rows, w, dy = numbers(rows, widths)
    got = value_and_grads(x, rows, w, dy, pallas_tpu.Tiles(8, 4, 8, 8, 2), widths)
    assert_equal(got, value_and_grads(x, rows, w, dy, None, widths))
