"""The Pallas Mosaic GPU kernels in interpret mode against the reference, and lowered for CUDA.

Interpret mode fills whatever no kernel has written with NaN, and the tests fill padding rows with
NaN, so a finite result shows that nothing was read that does not belong to the expert. It checks
what is read, masked and stored; it does not model what runs at the same time on a GPU. Every
copy, wait and matmul is a Python callback of about 4 ms, so the cases here are small. Those marked
`slow` are larger.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import chunks, expert_weights, pallas_gpu, reference_ffn, select
from tests.helpers.expert_kernels import (
    ExpertInputs,
    compute_output_and_gradients,
    make_inputs,
    place_on_one_shard,
    run_reference,
)

INTERPRET = InterpretGPUParams(uninitialized_memory="nan")
DIM = 128
TILES = pallas_gpu.Tiles(rows=64, wide=64, stages=2, blocks=2)


def make_half_precision_inputs(widths, rows, num_rows, dim=DIM, dtype=jnp.bfloat16):
    return make_inputs(widths, rows, num_rows, dim, dtype, weight_scale=0.08)


def run_expert_ffn(x, rows, weights, shard, placement, tiles, interpret=False):
    shard = jnp.int32(shard)
    return chunks.run_in_chunks(x, rows, *weights, shard, pallas_gpu, placement, tiles, interpret)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def run_kernels(inputs, shard, placement, tiles, interpret=False):
    """Returns the output and gradients. All routings of one shape run one compiled program."""

    def kernels(x, weights):
        return run_expert_ffn(x, inputs.rows_E, weights, shard, placement, tiles, interpret)

    return compute_output_and_gradients(kernels, inputs)


def make_random_case(seed, num_experts=4, num_rows=150):
    """Returns random (rows, num_rows, dim, widths) with 5 padding rows."""
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(num_rows - 5, rng.dirichlet(np.full(num_experts, 0.4)))
    widths = 64 * rng.integers(1, 5, num_experts)
    return tuple(map(int, rows)), num_rows, DIM, tuple(map(int, widths))


def assert_all_close(computed, expected, tolerance=0.01):
    """Asserts that the relative error of each array is at most the tolerance."""
    for array, want in zip(computed, expected, strict=True):
        array = np.asarray(array, np.float64)
        want = np.asarray(want, np.float64)
        assert np.isfinite(array).all()
        assert np.linalg.norm(array - want) <= tolerance * np.linalg.norm(want) + 1e-30


def check_kernels(rows, num_rows, dim, widths):
    inputs = make_half_precision_inputs(widths, rows, num_rows, dim)
    computed = run_kernels(inputs, 0, place_on_one_shard(widths), TILES, INTERPRET)
    assert_all_close(computed, run_reference(inputs.astype(jnp.float32), widths))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((7, 60, 0), id="shared_tile_and_empty_expert"),
        pytest.param((0, 0, 65), id="one_expert_has_all"),
        pytest.param((0, 0, 0), id="no_rows"),
    ],
)
def test_kernels_match_reference(rows):
    """Every axis has several tiles, one of them has more tiles than pipeline stages.

    There are partial row tiles and padding rows.
    """
    check_kernels(rows, num_rows=70, dim=256, widths=(64, 128, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, num_rows, dim, widths",
    [
        pytest.param((70, 0, 50, 9), 140, 128, (192, 64, 64, 128), id="empty_expert"),
        pytest.param((0, 0, 130, 0), 140, 128, (192, 64, 64, 128), id="one_expert_has_all"),
        pytest.param((5, 40, 0, 20), 70, 256, (192, 64, 64, 128), id="padding_rows"),
        pytest.param((30, 33), 63, 128, (64, 64), id="equal_widths"),
        pytest.param((7, 90, 1), 100, 128, (64, 128, 64), id="shared_tiles"),
        pytest.param(*make_random_case(0), id="random_0"),
        pytest.param(*make_random_case(1), id="random_1"),
    ],
)
def test_kernels_match_reference_for_larger_cases(rows, num_rows, dim, widths):
    check_kernels(rows, num_rows, dim, widths)


def test_kernels_match_reference_for_shards_wide_tiles_and_float16():
    placement = expert_placement.place_experts((256, 128, 128, 256), 2, "whole")
    tiles = TILES._replace(wide=128, blocks=3)
    widths = placement.widths[1]
    inputs = make_half_precision_inputs(widths, (10, 20), 40, dtype=jnp.float16)
    computed = run_kernels(inputs, 1, placement, tiles, INTERPRET)
    assert_all_close(computed, run_reference(inputs, widths))


def test_widths_that_are_not_multiples_of_the_unit_are_padded():
    """One odd width, and shards whose padded sums differ."""
    placement = expert_placement.place_experts((70, 30, 36, 64), 2, "whole")
    job = select.KernelJob(TILES, hidden_unit=64)

    @jax.jit
    def run_padded(inputs, shard):
        def kernels(x, weights):
            return select.run_kernels(
                "pallas_gpu", x, inputs.rows_E, weights, shard, placement, job, INTERPRET
            )

        return compute_output_and_gradients(kernels, inputs)

    for shard, widths in enumerate(placement.widths):
        inputs = make_half_precision_inputs(widths, (12, 15), 32)
        computed = run_padded(inputs, jnp.int32(shard))
        assert_all_close(computed, run_reference(inputs.astype(jnp.float32), widths))


def test_forward_pass_alone_saves_nothing(monkeypatch):
    """Kernel A then has one output, the hidden activations. In training it also saves its sums."""
    widths = (64, 128)
    inputs = make_half_precision_inputs(widths, (30, 20), 64)
    placement = place_on_one_shard(widths)
    run_to_hidden = pallas_gpu.run_to_hidden
    num_outputs = []

    def record(*arguments, **options):
        outputs = run_to_hidden(*arguments, **options)
        num_outputs.append(len(outputs))
        return outputs

    monkeypatch.setattr(pallas_gpu, "run_to_hidden", record)
    arguments = (inputs.x_ND, inputs.rows_E, inputs.weights, 0, placement, TILES)
    jax.eval_shape(lambda: run_expert_ffn(*arguments))
    assert num_outputs == [1]
    num_outputs.clear()
    jax.eval_shape(lambda: run_kernels(inputs, 0, placement, TILES))
    assert num_outputs == [3, 3]  # forward pass; gradients of its three outputs


def test_forward_pass_alone_matches_reference():
    widths = (64, 128)
    inputs = make_half_precision_inputs(widths, (5, 2), 8)
    rows_E, weights = inputs.rows_E, inputs.weights
    placement = place_on_one_shard(widths)
    tiles = TILES._replace(blocks=1)
    y_ND = run_expert_ffn(inputs.x_ND, rows_E, weights, 0, placement, tiles, INTERPRET)
    expected = reference_ffn.reference(inputs.x_ND, rows_E, weights, widths)
    assert_all_close([y_ND], [expected])


@pytest.mark.parametrize(
    "dim, kind, num_shards",
    [  # 300Mx8 and 700Mx8
        pytest.param(1536, "whole", 1, marks=pytest.mark.slow),
        pytest.param(1536, "whole", 4, marks=pytest.mark.slow),
        pytest.param(1536, "split", 2, marks=pytest.mark.slow),
        pytest.param(2048, "whole", 1, marks=pytest.mark.slow),
        (2048, "split", 2),
    ],
)
def test_kernels_lower_for_hopper(dim, kind, num_shards):
    """Lowering needs no GPU. Mosaic checks layouts, transforms and shared memory in it."""
    num_rows = 131_072
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim)
    placement = expert_placement.place_experts(widths, num_shards, kind)
    num_hidden = sum(placement.widths[0])
    all_widths = [w for shard_widths in placement.widths for w in shard_widths]
    tiles = pallas_gpu.tiles_for(all_widths, dim, "h200", "bfloat16")

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    inputs = ExpertInputs(
        x_ND=array(num_rows, dim),
        rows_E=array(placement.slots, dtype=jnp.int32),
        weights=expert_weights.ExpertWeights(
            array(dim, num_hidden), array(dim, num_hidden), array(num_hidden, dim)
        ),
        dy_ND=array(num_rows, dim),
    )
    run = jax.jit(lambda inputs: run_kernels(inputs, 0, placement, tiles))
    text = run.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    # Forward: kernels A and B. Backward: A, B, and C three times. One of four shards has three
    # kinds of chunks: the first one, those in a loop, and the last one. The backward pass runs
    # kernel A of the forward pass again for the later two.
    if num_shards == 4:
        num_kinds_of_chunks, num_recomputed = 3, 2
    else:
        num_kinds_of_chunks, num_recomputed = 1, 0
    num_kernels = len(re.findall(r"custom_call @mosaic_gpu", text))
    assert num_kernels == 7 * num_kinds_of_chunks + num_recomputed


def test_errors_name_an_alternative():
    with pytest.raises(
        ValueError, match="needs one of h100, h200, this is cpu; backends that run anywhere"
    ):
        pallas_gpu.tiles_for((128,), 128, "cpu", "bfloat16")
    with pytest.raises(
        ValueError, match="model.dim=192 is not divisible by 128; backends that take any: blocked"
    ):
        pallas_gpu.tiles_for((128,), 192, "h100", "bfloat16")
    with pytest.raises(ValueError, match="not float32; set model.dtype=bfloat16"):
        placement = place_on_one_shard((128,))
        select.check_backend("pallas_gpu", placement, (64, 128), "h100", "float32")
    with pytest.raises(ValueError, match="tasks of tiles 128 x 64, more than"):
        placement = place_on_one_shard((65536,))
        select.check_backend("pallas_gpu", placement, (2**22, 128), "h100", "bfloat16")


@pytest.mark.slow
def test_self_test_runs_the_kernels_and_finds_wrong_ones(monkeypatch):
    placement = place_on_one_shard((64, 128))
    monkeypatch.setattr(pallas_gpu, "tiles_for", lambda *_: TILES._replace(blocks=1))
    job = "pallas_gpu", placement, 128, "h100", "bfloat16"
    select.self_test_kernels(*job, interpret=INTERPRET)
    correct = pallas_gpu.run_from_hidden

    def clear_some_rows(*arguments):
        return correct(*arguments).at[64:128].set(0)

    monkeypatch.setattr(pallas_gpu, "run_from_hidden", clear_some_rows)
    with pytest.raises(
        RuntimeError, match="the kernels of pallas_gpu are wrong on this device: y differs"
    ):
        select.self_test_kernels(*job, interpret=INTERPRET)


def test_self_test_finds_wrong_results(monkeypatch):
    """The reference takes the place of the kernels, which take long to interpret."""
    placement = place_on_one_shard((64, 128))
    job = "pallas_gpu", placement, 128, "h100", "bfloat16"

    def run(wrong_rows):
        def run_kernels(backend, x, rows_E, weights, *_):
            assert backend == "pallas_gpu"
            y_ND = reference_ffn.reference(x, rows_E, weights, placement.widths[0])
            return y_ND.at[wrong_rows].set(0)

        monkeypatch.setattr(select, "run_kernels", run_kernels)
        select.self_test_kernels(*job)

    run(wrong_rows=slice(0, 0))
    with pytest.raises(
        RuntimeError, match="the kernels of pallas_gpu are wrong on this device: y differs"
    ):
        run(wrong_rows=slice(64, 128))
