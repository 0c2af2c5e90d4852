"""The Pallas TPU kernels in interpret mode against the reference, and the lists of their tasks.

Interpret mode fills whatever no kernel has written with NaN, and the tests fill padding rows with
NaN, so a finite result shows that nothing was read that does not belong to the expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import expert_placement
from modse_jax.moe.experts import pallas_tpu, select, tile_lists
from tests.helpers.expert_kernels import (
    compute_output_and_gradients,
    make_inputs,
    place_on_one_shard,
    run_reference,
)

WIDTHS = (12, 4, 8, 4, 16)
PLACEMENT = place_on_one_shard(WIDTHS)
NUM_ROWS = 64
DIM = 16
TILES = pallas_tpu.Tiles(rows=8, hidden=4, inner=8, outer=16)

# Rows of each expert; the rest of the 64 rows is padding.
ROUTINGS = {
    "shared tiles": (13, 1, 19, 7, 20),
    "one expert has all rows": (64, 0, 0, 0, 0),
    "empty experts and padding rows": (0, 30, 0, 9, 0),
    "whole tiles": (8, 8, 8, 8, 32),
    "a few rows": (1, 2, 3, 4, 5),
    "no rows": (0, 0, 0, 0, 0),
}


@functools.partial(jax.jit, static_argnums=(2, 3))
def run_kernels(inputs, shard, placement, tiles):
    def kernels(x, weights):
        return pallas_tpu.pallas_tpu(
            x, inputs.rows_E, *weights, shard, placement, tiles, interpret=True
        )

    return compute_output_and_gradients(kernels, inputs)


def assert_all_close(computed, expected):
    for array, want in zip(computed, expected, strict=True):
        largest = float(jnp.abs(want).max())
        np.testing.assert_allclose(array, want, atol=2e-5 * max(1, largest))


@pytest.mark.parametrize("cores", [1, 2])
def test_kernels_match_reference_for_every_routing(cores):
    tiles = TILES._replace(outer=DIM // cores, cores=cores)
    for rows in ROUTINGS.values():
        inputs = make_inputs(WIDTHS, rows, NUM_ROWS, DIM)
        computed = run_kernels(inputs, 0, PLACEMENT, tiles)
        assert_all_close(computed, run_reference(inputs, WIDTHS))


def test_shards_with_different_experts_run_one_program():
    """Shards of 3 and of 2 experts: the second one has an empty slot. The shard is an argument."""
    placement = expert_placement.place_experts((12, 4, 8, 16, 8), 2, "whole")
    assert placement.widths == ((12, 4, 8), (16, 8))
    tiles = TILES._replace(outer=8, cores=2)
    for shard, rows in enumerate(((13, 0, 31), (9, 20, 0))):
        widths = placement.widths[shard]
        inputs = make_inputs(widths, rows, NUM_ROWS, DIM)
        computed = run_kernels(inputs, shard, placement, tiles)
        without_empty_slot = inputs._replace(rows_E=inputs.rows_E[: len(widths)])
        assert_all_close(computed, run_reference(without_empty_slot, widths))


def test_kernels_match_reference_for_partial_tiles_and_random_widths():
    rng = np.random.default_rng(1)
    widths = tuple(int(w) for w in 4 * rng.integers(1, 5, 3))
    tiles = TILES._replace(inner=16)
    for _ in range(4):
        rows = rng.multinomial(59, rng.dirichlet(np.full(3, 0.4))).tolist()
        inputs = make_inputs(widths, rows, 61, DIM)
        computed = run_kernels(inputs, 0, place_on_one_shard(widths), tiles)
        assert_all_close(computed, run_reference(inputs, widths))


def test_kernels_match_reference_for_equal_widths():
    widths = (8,) * 5
    inputs = make_inputs(widths, (13, 0, 19, 7, 20), NUM_ROWS, DIM)
    tiles = TILES._replace(outer=8, cores=2)
    computed = run_kernels(inputs, 0, place_on_one_shard(widths), tiles)
    assert_all_close(computed, run_reference(inputs, widths))


def test_widths_that_are_not_multiples_of_the_unit_are_padded():
    """One odd width, and a shard that needs one more expert to be as wide as the other."""
    placement = expert_placement.place_experts((12, 5, 5, 5, 7), 2, "whole")
    job = select.KernelJob(TILES._replace(outer=8), hidden_unit=4, model_unit=DIM)

    @jax.jit
    def run(inputs, shard):
        def kernels(x, weights):
            return select.run_kernels(
                "pallas_tpu", x, inputs.rows_E, weights, shard, placement, job, True
            )

        return compute_output_and_gradients(kernels, inputs)

    for shard, rows in enumerate(((13, 11, 0), (19, 20, 1))):
        widths = placement.widths[shard]
        inputs = make_inputs(widths, rows, NUM_ROWS, DIM)
        assert_all_close(run(inputs, jnp.int32(shard)), run_reference(inputs, widths))


def test_a_model_dimension_that_is_no_multiple_of_the_unit_is_padded():
    job = select.KernelJob(TILES, hidden_unit=4, model_unit=DIM)
    rows = ROUTINGS["empty experts and padding rows"]
    inputs = make_inputs(WIDTHS, rows, NUM_ROWS, DIM - 5)

    def kernels(x, weights):
        return select.run_kernels(
            "pallas_tpu", x, inputs.rows_E, weights, jnp.int32(0), PLACEMENT, job, True
        )

    computed = jax.jit(lambda: compute_output_and_gradients(kernels, inputs))()
    assert_all_close(computed, run_reference(inputs, WIDTHS))


def test_unused_hidden_units_are_nan_in_interpret_mode():
    """The tests above rely on it: they show that kernels do not read past an expert's width."""
    rows = ROUTINGS["shared tiles"]
    inputs = make_inputs(WIDTHS, rows, NUM_ROWS, DIM)
    job = pallas_tpu.make_job(inputs.x_ND, inputs.rows_E, 0, PLACEMENT, TILES, interpret=True)
    weights = inputs.weights
    matmuls = [
        pallas_tpu.ToHiddenMatmul(0, weights.w_gate, False),
        pallas_tpu.ToHiddenMatmul(0, weights.w_up, False),
    ]
    # 64 rows are full row tiles and need no padding.
    (hidden,) = pallas_tpu.run_to_hidden(
        job, [inputs.x_ND], matmuls, lambda gate, up: (gate * up,), num_outputs=1
    )
    expert_of_row = np.repeat(np.arange(5), rows)
    for row in (0, 13, 45):
        width = WIDTHS[expert_of_row[row]]
        assert np.isfinite(hidden[row, :width]).all()
        assert not np.isfinite(hidden[row, width:]).any()
    assert min(WIDTHS[expert_of_row[row]] for row in (0, 13, 45)) < max(WIDTHS)


# ---- task lists ----


def make_tasks(list_tasks, rows, placement=PLACEMENT, tiles=TILES):
    columns = tile_lists.list_column_tiles(placement, 0, NUM_ROWS, tiles)
    rows_E = jnp.asarray(rows, jnp.int32)
    return list_tasks(rows_E, columns, tiles, NUM_ROWS // tiles.rows)


def expected_tasks(rows, empty_experts_have_a_task):
    """Returns {(expert, row tile, column tile)} of all tasks, by the definition of a visit."""
    tasks = set()
    start = 0
    for expert, (count, width) in enumerate(zip(rows, WIDTHS)):
        end = start + count
        visited = {row // TILES.rows for row in range(start, end)}
        if not visited and empty_experts_have_a_task:
            visited = {min(start // TILES.rows, NUM_ROWS // TILES.rows - 1)}
        column_tiles = range(width // TILES.hidden)
        tasks |= {(expert, tile, column) for tile in visited for column in column_tiles}
        start = end
    return tasks


@pytest.mark.parametrize(
    "list_tasks",
    [
        pallas_tpu.list_to_hidden_tasks,
        tile_lists.list_from_hidden_tasks,
        pallas_tpu.list_weight_tasks,
    ],
)
def test_lists_contain_every_task_once_and_stay_within_their_length(list_tasks):
    max_num_tasks = tile_lists.max_num_tasks(NUM_ROWS, PLACEMENT, TILES)
    for rows in ROUTINGS.values():
        tasks = make_tasks(list_tasks, rows)
        num_tasks = int(tasks.num_tasks)
        fields = (tasks.expert_T, tasks.row_tile_T, tasks.column_tile_T)
        listed = list(zip(*(np.asarray(field)[:num_tasks].tolist() for field in fields)))
        assert len(listed) == len(set(listed))
        assert set(listed) == expected_tasks(rows, list_tasks is pallas_tpu.list_weight_tasks)
        assert num_tasks <= tasks.expert_T.shape[0] == max_num_tasks
        assert all(int(field.min()) >= 0 for field in tasks[1:] if field is not None)


def test_cores_share_no_output_block():
    tasks = make_tasks(pallas_tpu.list_to_hidden_tasks, ROUTINGS["shared tiles"])
    first, end = (bounds.tolist() for bounds in pallas_tpu.split_tasks(tasks, 2))
    assert first[0] == 0
    assert end[0] == first[1]
    assert end[1] == int(tasks.num_tasks)
    column_tiles = tasks.column_tile_T.tolist()
    row_tiles = tasks.row_tile_T.tolist()
    blocks = list(zip(column_tiles, row_tiles))
    assert not set(blocks[first[0] : end[0]]) & set(blocks[first[1] : end[1]])
    # The shares differ by at most the visits to one block.
    num_tasks = [e - f for f, e in zip(first, end)]
    assert abs(num_tasks[0] - num_tasks[1]) <= 5


@pytest.mark.parametrize(
    "rows", [(0, 5, 0, 0, 0), (2, 3, 0, 0, 1), (0, 0, 0, 0, 3), (0, 0, 0, 0, 0)]
)
def test_core_without_tasks_repeats_the_last_block(rows):
    """It writes a block in any case, which must be what the other core writes there."""
    tiles = TILES._replace(inner=16, outer=8, cores=2)
    tasks = make_tasks(pallas_tpu.list_to_hidden_tasks, rows, place_on_one_shard((4,) * 5), tiles)
    first, end = pallas_tpu.split_tasks(tasks, 2)
    num_tasks = int(tasks.num_tasks)
    assert num_tasks == sum(count > 0 for count in rows)  # all of them of one block
    assert first.tolist() == [0, 0]
    assert end.tolist() == [num_tasks] * 2


# ---- selection and self-test ----


def test_cores_share_the_outputs_of_every_kernel():
    """Kernel A's tasks are divided; B and C have one tile of the model axis for each core."""
    for chip, cores in (("v4", 2), ("v5p", 2), ("v5e", 1), ("v6e", 1)):
        for dim in (1536, 2048):
            tiles = pallas_tpu.tiles_for((768, 1536), dim, chip, "bfloat16")
            assert (tiles.inner, tiles.outer, tiles.cores) == (dim, dim // cores, cores)


def test_errors_name_an_alternative():
    with pytest.raises(
        ValueError, match="model.dim=192 is not divisible by 128; backends that take any: blocked"
    ):
        pallas_tpu.tiles_for((256, 128), 192, "v5e", "float32")
    placement = place_on_one_shard((25600,) * 8)
    with pytest.raises(ValueError, match="more than the 50000 that fit"):
        select.check_backend("pallas_tpu", placement, (2**20, 128), "v5e", "bfloat16")


@pytest.mark.slow
def test_self_test_accepts_the_kernels_with_the_tiles_of_a_chip():
    for widths, num_shards, dtype in (
        ((128, 128, 256), 1, "bfloat16"),
        ((128, 128), 2, "float32"),
    ):
        placement = expert_placement.place_experts(widths, num_shards, "pairs")
        select.self_test_kernels("pallas_tpu", placement, 128, "v5e", dtype, interpret=True)


def test_self_test_finds_wrong_kernels(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "tiles_for", lambda *_: TILES)
    monkeypatch.setattr(pallas_tpu, "unit_for", lambda *_: TILES.hidden)
    monkeypatch.setattr(select, "MODEL_UNIT", DIM)

    def self_test(placement, dtype):
        select.self_test_kernels("pallas_tpu", placement, DIM, "v5e", dtype, interpret=True)

    placement = place_on_one_shard((8, 8, 16))
    self_test(placement, "bfloat16")
    one_expert_per_device = expert_placement.place_experts((128, 128), 2, "whole")
    self_test(one_expert_per_device, "float32")
    correct = pallas_tpu.pallas_tpu

    def double_some_weights(x, rows, w_gate, *arguments):
        return correct(x, rows, w_gate.at[:, -8:].mul(2), *arguments)

    monkeypatch.setattr(pallas_tpu, "pallas_tpu", double_some_weights)
    with pytest.raises(
        RuntimeError, match="kernels of pallas_tpu are wrong on this device: y differs"
    ):
        self_test(placement, "bfloat16")


@pytest.mark.parametrize(
    "backend, widths, num_rows, chip, expected, has_note",
    [
        ("auto", (256, 128), 4096, "v5e", "pallas_tpu", False),
        ("auto", (256, 128), 4096, "cpu", "blocked", False),
        ("auto", (256, 10), 4096, "v5e", "pallas_tpu", True),  # padded
        ("auto", (100, 10), 4096, "v5e", "blocked", True),  # too much padding
        ("auto", (25600, 128), 2**24, "v5e", "blocked", True),  # too many tasks
        ("reference", (256, 128), 4096, "v5e", "reference", False),
    ],
)
def test_auto_selects_the_kernels_on_tpus(backend, widths, num_rows, chip, expected, has_note):
    placement = place_on_one_shard(widths)
    selected, note = select.select_backend(backend, placement, (num_rows, 256), chip, "bfloat16")
    assert selected == expected
    assert bool(note) == has_note
