"""The Pallas Triton kernels in interpret mode against the reference.

Interpret mode fills whatever no kernel has written with NaN, and the tests fill padding rows with
NaN, so a finite result shows that nothing was read that does not belong to the expert.

Legend: N routed tokens, D model dimension, E experts, M hidden units of the widest expert.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading
from modse_jax.model import kernel_selection
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import pallas_triton, select
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config
from tests.helpers.expert_kernels import (
    compute_output_and_gradients,
    make_inputs,
    place_on_one_shard,
    run_reference,
)

DIM = 32
WIDTHS = (48, 16, 32, 16)
PLACEMENT = place_on_one_shard(WIDTHS)
TILES = pallas_triton.Tiles(
    rows=16, hidden=16, gate_up=16, dhidden=16, model=32, gate_up_model=16, step=16, group=2
)

ROUTINGS = {  # tokens of each expert, all tokens
    "row tiles that experts share": ((13, 1, 19, 7), 64),
    "one expert has all tokens": ((0, 0, 64, 0), 64),
    "empty experts": ((0, 30, 0, 9), 64),
    "whole row tiles": ((16, 16, 0, 32), 64),
    "no tokens": ((0, 0, 0, 0), 64),
    "one token": ((0, 1, 0, 0), 1),
}


@functools.partial(jax.jit, static_argnums=(2, 3))
def run_kernels(inputs, shard, placement, tiles):
    """Runs the kernels as expert_ffn does, with padded widths and a padded model dimension."""
    job = select.KernelJob(tiles, tiles.hidden, model_unit=DIM)

    def kernels(x, weights):
        return select.run_kernels(
            "pallas_triton", x, inputs.rows_E, weights, shard, placement, job, interpret=True
        )

    return compute_output_and_gradients(kernels, inputs)


def run_on_one_shard(inputs, widths, tiles=TILES):
    return run_kernels(inputs, jnp.int32(0), place_on_one_shard(widths), tiles)


def assert_all_close(computed, expected, tolerance=3e-7):
    """Asserts that the relative error of each array is at most the tolerance."""
    for array, want in zip(computed, expected, strict=True):
        array = np.asarray(array, np.float64)
        want = np.asarray(want, np.float64)
        assert array.shape == want.shape
        assert np.isfinite(array).all()
        assert np.linalg.norm(array - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("name", ROUTINGS)
def test_kernels_match_reference(name):
    rows, num_rows = ROUTINGS[name]
    inputs = make_inputs(WIDTHS, rows, num_rows, DIM)
    assert_all_close(run_on_one_shard(inputs, WIDTHS), run_reference(inputs, WIDTHS))


def test_kernels_match_reference_for_other_tiles_and_a_partial_row_tile():
    """Every tile size differs from the others, and the model dimension has several tiles."""
    widths = (64, 32, 96)
    tiles = pallas_triton.Tiles(
        rows=24, hidden=32, gate_up=8, dhidden=16, model=16, gate_up_model=32, step=8, group=3
    )
    inputs = make_inputs(widths, (37, 0, 30), 70, DIM)
    computed = run_on_one_shard(inputs, widths, tiles)
    assert_all_close(computed, run_reference(inputs, widths))


def test_kernels_match_reference_for_random_routings_over_odd_widths():
    widths = (1, 7, 65, 19)
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = rng.multinomial(59, rng.dirichlet(np.full(4, 0.5)))
        inputs = make_inputs(widths, tuple(map(int, rows)), 64, DIM)
        assert_all_close(run_on_one_shard(inputs, widths), run_reference(inputs, widths))


def test_kernels_match_reference_for_a_padded_model_dimension():
    inputs = make_inputs(WIDTHS, (0, 30, 0, 9), 64, DIM - 5)
    assert_all_close(run_on_one_shard(inputs, WIDTHS), run_reference(inputs, WIDTHS))


def test_shards_run_one_program():
    """The shard is data. Shards of (40, 7) and (18, 15, 14) differ in experts and padded sums."""
    placement = expert_placement.place_experts((40, 7, 18, 15, 14), 2, "whole")
    for shard, widths in enumerate(placement.widths):
        rows = [13, 0, 20][: len(widths)]
        rows += [0] * (placement.slots - len(rows))
        inputs = make_inputs(widths, rows, 40, DIM)
        computed = run_kernels(inputs, jnp.int32(shard), placement, TILES)
        assert_all_close(computed, run_reference(inputs, widths))


def test_half_precision_is_accumulated_in_float32():
    inputs = make_inputs(WIDTHS, (13, 1, 19, 7), 45, DIM).astype(jnp.bfloat16)
    computed = run_on_one_shard(inputs, WIDTHS)
    assert all(array.dtype == jnp.bfloat16 for array in computed)
    expected = run_reference(inputs.astype(jnp.float32), WIDTHS)
    assert_all_close(computed, expected, tolerance=0.01)


def test_forward_pass_writes_only_own_hidden_units_and_saves_them_on_request():
    """Unwritten elements stay NaN, so the other tests show that nothing reads them."""
    rows = (13, 1, 19, 7)
    inputs = make_inputs(WIDTHS, rows, 48, DIM)

    @functools.partial(jax.jit, static_argnums=0)
    def run(save):
        arguments = (inputs.x_ND, inputs.rows_E, inputs.weights, jnp.int32(0))
        return pallas_triton.forward(*arguments, PLACEMENT, TILES, interpret=True, save=save)

    y_ND, saved = run(True)
    expert_of_row = np.repeat(np.arange(4), rows)
    for saved_NM in (saved.hidden_NM, saved.by_gate_NM, saved.by_up_NM):
        saved_NM = np.asarray(saved_NM)
        for row, expert in enumerate(expert_of_row):
            assert np.isfinite(saved_NM[row, : WIDTHS[expert]]).all()
            assert np.isnan(saved_NM[row, WIDTHS[expert] :]).all()
        assert np.isnan(saved_NM[40:]).all()
    y_without_saving_ND, nothing = run(False)
    assert nothing is None
    assert_all_close([y_without_saving_ND], [y_ND])


@pytest.mark.parametrize("rows", [(13, 1, 19, 7), (0, 0, 64, 0), (0, 0, 0, 0), (16, 16, 16, 16)])
def test_visits_cover_every_row_once(rows):
    """Every token's row by its own expert, every padding row by the expert of width 0."""
    num_rows = 64
    rows_E = jnp.asarray(rows, jnp.int32)
    visits = pallas_triton.route(rows_E, jnp.int32(0), PLACEMENT, TILES, num_rows).visits
    unvisited, padding = -1, -2
    visitors = np.full(num_rows, unvisited)
    for first_row, start, end, width, offset in zip(*map(np.asarray, visits)):
        for row in range(max(first_row, start), min(first_row + TILES.rows, end)):
            assert visitors[row] == unvisited
            visitors[row] = offset if width else padding
    offsets = np.repeat(expert_widths.offsets(WIDTHS), rows)
    num_padding = num_rows - sum(rows)
    assert visitors.tolist() == [*offsets, *[padding] * num_padding]


# ---- supported jobs ----


def test_errors_name_an_alternative():
    with pytest.raises(ValueError, match="needs one of a100, h100, h200, b200, but this device is"):
        pallas_triton.tiles_for((128,), 128, "cpu", "bfloat16")
    with pytest.raises(ValueError, match="not float32; set model.dtype=bfloat16, or use a backend"):
        pallas_triton.tiles_for((128,), 128, "h100", "float32")
    with pytest.raises(ValueError, match="model.dim=192 is not divisible by 128; choose another"):
        pallas_triton.tiles_for((128,), 192, "h100", "bfloat16")
    placement = place_on_one_shard((2**20,))
    with pytest.raises(ValueError, match="programs, more than 2147483647; lower training.batch_"):
        select.check_backend("pallas_triton", placement, (2**26, 128), "h100", "bfloat16")


@pytest.mark.parametrize("widths, unit", [((768, 6912), 128), ((1000, 3096), 128), ((64,), 64)])
def test_narrow_experts_use_narrow_tiles(widths, unit):
    tiles = pallas_triton.tiles_for(widths, 256, "h100", "bfloat16")
    assert pallas_triton.unit_for(widths, "h100", "bfloat16") == tiles.hidden == unit
    assert tiles.hidden % tiles.gate_up == tiles.hidden % tiles.dhidden == 0


@pytest.mark.parametrize(
    "widths, dim, chip, dtype, backend, note",
    [
        ((256, 128), 256, "h100", "bfloat16", "pallas_triton", ""),
        ((256, 128), 256, "a100", "float16", "pallas_triton", ""),
        ((256, 100), 256, "b200", "bfloat16", "pallas_triton", "7.9% more FLOPs"),
        ((256, 128), 256, "h200", "float32", "blocked", "not float32"),
        (
            (256, 128),
            192,
            "h100",
            "bfloat16",
            "pallas_triton",
            "model.dim=192 padded to 256: 33.3%",
        ),
        ((256, 128), 64, "h100", "bfloat16", "blocked", "would need 2.0 times the FLOPs"),
        ((3, 5), 256, "h100", "bfloat16", "blocked", "would need 16.0 times the FLOPs"),
        ((256, 128), 256, "gpu", "bfloat16", "blocked", ""),
    ],
)
def test_auto_selects_the_kernels_on_gpus(widths, dim, chip, dtype, backend, note):
    placement = place_on_one_shard(widths)
    selected, reason = select.select_backend("auto", placement, (4096, dim), chip, dtype)
    assert selected == backend
    assert note in reason
    assert bool(reason) == bool(note)


# ---- the self-test on a device ----


@pytest.fixture
def config_on_interpreted_h100(monkeypatch):
    """A config of the kernels; this CPU is reported as an H100, on which they are interpreted."""
    monkeypatch.setattr(sharding, "chip_name", lambda _: "h100")
    monkeypatch.setattr(pallas_triton, "tiles_for", lambda *_: TILES)
    monkeypatch.setattr(pallas_triton, "unit_for", lambda *_: TILES.hidden)
    monkeypatch.setattr(select, "MODEL_UNIT", DIM)
    interpreted = functools.partial(select.self_test_kernels, interpret=True)
    monkeypatch.setattr(select, "self_test_kernels", interpreted)
    return tiny_config(
        model=dict(dim=DIM),
        moe=dict(backend="pallas_triton", width=32, widths=(33, 31), num_experts=2),
    )


def test_self_test_finds_wrong_kernels(config_on_interpreted_h100, monkeypatch, capsys):
    """An evaluation then uses the `blocked` backend. Without the kernels there is no self-test."""
    config = config_on_interpreted_h100
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    assert model_loading.replace_wrong_kernels(config, mesh) is config
    assert not capsys.readouterr().err
    correct = pallas_triton.forward

    def double_some_rows(*arguments):
        y_ND, saved = correct(*arguments)
        return y_ND.at[8:16].multiply(2), saved

    monkeypatch.setattr(pallas_triton, "forward", double_some_rows)
    assert model_loading.replace_wrong_kernels(config, mesh).moe.backend == "blocked"
    message = (
        "kernels of pallas_triton are wrong on this device: y differs .* set moe.backend=blo"
        ".* this evaluation uses moe.backend=blocked"
    )
    assert re.search(message, capsys.readouterr().err)
    blocked = dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend="blocked"))
    assert kernel_selection.check_kernels(blocked, mesh).experts == "blocked"


def test_self_test_finds_kernels_that_do_not_run(config_on_interpreted_h100, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no such instruction")

    config = config_on_interpreted_h100
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    monkeypatch.setattr(pallas_triton, "forward", fail)
    with pytest.raises(UserError, match="do not run on this device .NotImplementedError: no such"):
        kernel_selection.check_kernels(config, mesh)
