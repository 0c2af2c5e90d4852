"""The Pallas Triton kernels in interpret mode against the reference, and the padding of any width.

Interpret mode fills whatever no kernel has written with NaN, and the tests fill padding rows with
NaN, so a finite result shows that nothing was read that does not belong to the expert.

Legend: N routed tokens, D model dimension, E experts, H hidden units of all experts of a shard.
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
from modse_jax.moe.experts import (
    expert_weights,
    hidden_unit_padding,
    pallas_triton,
    reference_ffn,
    select,
)
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config

D = 32


TILES = pallas_triton.Tiles(
    rows=16, hidden=16, gate_up=16, dhidden=16, model=32, gate_up_model=16, step=16, group=2
)


WIDTHS = (48, 16, 32, 16)


ROUTINGS = {  # tokens of each expert, all tokens
    "row tiles that experts share": ((13, 1, 19, 7), 64),
    "one expert has all tokens": ((0, 0, 64, 0), 64),
    "empty experts": ((0, 30, 0, 9), 64),
    "whole row tiles": ((16, 16, 0, 32), 64),
    "no tokens": ((0, 0, 0, 0), 64),
    "one token": ((0, 1, 0, 0), 1),
}


def make_inputs(widths, rows, num_rows, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    num_hidden = sum(widths)
    shapes = (D, num_hidden), (D, num_hidden), (num_hidden, D)
    weights = expert_weights.ExpertWeights(
        *(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    )
    x_ND, dy_ND = (
        jnp.asarray(rng.normal(size=(num_rows, D)), dtype).at[sum(rows) :].set(jnp.nan)
        for _ in range(2)
    )
    return x_ND, jnp.asarray(rows, jnp.int32), weights, dy_ND


def compute_all(function, x_ND, weights, dy_ND):
    """Returns [y, dx, dw_gate, dw_up, dw_down]."""
    y_ND, pull = jax.vjp(function, x_ND, weights)
    return jax.tree.leaves((y_ND, pull(dy_ND)))


@functools.partial(jax.jit, static_argnums=(5, 6))
def run_kernels(x_ND, rows_E, weights, dy_ND, shard, placement, tiles):
    """Runs the kernels as expert_ffn does: with padded widths."""

    def function(x, w):
        job = tiles, tiles.hidden
        return select.run_kernels(
            "pallas_triton", x, rows_E, w, shard, placement, job, interpret=True
        )

    return compute_all(function, x_ND, weights, dy_ND)


@functools.partial(jax.jit, static_argnums=(4,))
def run_reference(x_ND, rows_E, weights, dy_ND, widths):
    def function(x, w):
        return reference_ffn.reference(x, rows_E, w, widths)

    return compute_all(function, x_ND, weights, dy_ND)


def assert_equal(got, want, tolerance=3e-7):
    """Asserts that the relative error of each array is at most the tolerance."""
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", ROUTINGS)
def test_kernels_equal_the_reference(name):
    inputs = make_inputs(WIDTHS, *ROUTINGS[name])
    got = run_kernels(
        *inputs, jnp.int32(0), expert_placement.place_experts(WIDTHS, 1, "pairs"), TILES
    )
    assert_equal(got, run_reference(*inputs, WIDTHS))


def test_tiles_of_other_sizes_and_a_partial_row_tile():
    """Every tile size differs from the others, and D has several tiles."""
    widths = (64, 32, 96)
    tiles = pallas_triton.Tiles(
        rows=24, hidden=32, gate_up=8, dhidden=16, model=16, gate_up_model=32, step=8, group=3
    )
    inputs = make_inputs(widths, (37, 0, 30), 70)
    got = run_kernels(
        *inputs, jnp.int32(0), expert_placement.place_experts(widths, 1, "pairs"), tiles
    )
    assert_equal(got, run_reference(*inputs, widths))


def test_random_routings_over_odd_widths():
    widths = (1, 7, 65, 19)
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = tuple(map(int, rng.multinomial(59, rng.dirichlet(np.full(4, 0.5)))))
        inputs = make_inputs(widths, rows, 64)
        got = run_kernels(
            *inputs, jnp.int32(0), expert_placement.place_experts(widths, 1, "pairs"), TILES
        )
        assert_equal(got, run_reference(*inputs, widths))


def test_shards_run_one_program():
    """The shard is data. Shards of (40, 7) and (18, 15, 14) differ in experts and padded sums."""
    placement = expert_placement.place_experts((40, 7, 18, 15, 14), 2, "pairs")
    for shard, shard_widths in enumerate(placement.widths):
        rows = [13, 0, 20][: len(shard_widths)]
        rows += [0] * (placement.slots - len(rows))
        inputs = make_inputs(shard_widths, rows, 40)
        got = run_kernels(*inputs, jnp.int32(shard), placement, TILES)
        assert_equal(got, run_reference(*inputs, shard_widths))


def test_half_precision_is_accumulated_in_float32():
    exact = make_inputs(WIDTHS, (13, 1, 19, 7), 45)
    x_ND, rows_E, weights, dy_ND = exact
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x_ND, weights, dy_ND))
    got = run_kernels(
        low[0],
        rows_E,
        *low[1:],
        jnp.int32(0),
        expert_placement.place_experts(WIDTHS, 1, "pairs"),
        TILES,
    )
    assert all(a.dtype == jnp.bfloat16 for a in got)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), low)
    assert_equal(got, run_reference(rounded[0], rows_E, *rounded[1:], WIDTHS), 0.01)


def test_the_forward_pass_writes_own_hidden_units_alone_and_saves_them_if_asked_to():
    """What is not written stays NaN, so the other tests show that nothing reads it."""
    rows = (13, 1, 19, 7)
    x_ND, rows_E, weights, _ = make_inputs(WIDTHS, rows, 48)
    placement = expert_placement.place_experts(WIDTHS, 1, "pairs")

    @functools.partial(jax.jit, static_argnums=0)
    def run(keep):
        shard = jnp.int32(0)
        return pallas_triton.forward(x_ND, rows_E, weights, shard, placement, TILES, True, keep)

    y_ND, kept = run(True)
    owner = np.repeat(np.arange(4), rows)
    for hidden_NM in map(np.asarray, kept[1:]):
        for row, expert in enumerate(owner):
            assert np.isfinite(hidden_NM[row, : WIDTHS[expert]]).all()
            assert np.isnan(hidden_NM[row, WIDTHS[expert] :]).all()
        assert np.isnan(hidden_NM[40:]).all()
    alone_ND, nothing = run(False)
    assert nothing is None
    assert_equal([alone_ND], [y_ND])


@pytest.mark.parametrize("rows", [(13, 1, 19, 7), (0, 0, 64, 0), (0, 0, 0, 0), (16, 16, 16, 16)])
def test_visits_cover_every_row_once(rows):
    """Every token's row by its own expert, every padding row by the expert of width 0."""
    num_rows, placement = 64, expert_placement.place_experts(WIDTHS, 1, "pairs")
    routing = pallas_triton.route(
        jnp.asarray(rows, jnp.int32), jnp.int32(0), placement, TILES, num_rows
    )
    end = np.cumsum(rows)
    owners = np.full(num_rows, -1)
    for row, start, stop, width, offset in zip(*map(np.asarray, routing.visits)):
        for r in range(max(row, start), min(row + TILES.rows, stop)):
            assert owners[r] == -1
            owners[r] = offset if width else -2
    offsets = np.array(expert_widths.offsets(WIDTHS))
    want = [*offsets[np.repeat(np.arange(4), rows)], *[-2] * (num_rows - end[-1])]
    assert owners.tolist() == want


# ---- padding ----


def test_padding_fills_up_shards_with_an_expert_without_tokens():
    placement = expert_placement.place_experts((40, 9, 24, 25), 2, "pairs")
    assert placement.widths == ((40, 9), (24, 25))
    padded = hidden_unit_padding.pad_placement(placement, 16)
    assert padded.widths == ((48, 16), (32, 32)) and padded.slots == 2
    padded = hidden_unit_padding.pad_placement(placement, 10)
    assert padded.widths == ((40, 10, 10), (30, 30)) and padded.slots == 3
    assert hidden_unit_padding.pad_placement(padded, 10) is padded


def test_padding_reports_its_waste():
    assert hidden_unit_padding.flops_ratio((64, 128), 64) == 1
    assert hidden_unit_padding.flops_ratio((1, 63, 65), 64) == pytest.approx(256 / 129)
    placement = expert_placement.place_experts((1000, 3096), 1, "pairs")
    job = placement, (4096, 128), "h100", "bfloat16"
    assert select.padding("pallas_gpu", *job) == (
        4160 / 4096,
        "hidden units padded to multiples of 64: 1.6% more FLOPs",
    )
    assert select.padding("pallas_triton", *job)[1].startswith("hidden units padded to mult")
    exact = expert_placement.place_experts((1024, 512), 1, "pairs"), *job[1:]
    assert select.padding("pallas_triton", *exact) == (1, "")


def test_gradients_of_padded_weights_need_no_scatter():
    placement = expert_placement.place_experts((5, 3), 1, "pairs")
    weights = jnp.ones((D, 8)), jnp.ones((D, 8)), jnp.ones((8, D))

    def total(weights):
        _, padded, _ = hidden_unit_padding.pad_experts(
            jnp.array([1, 1]), weights, jnp.int32(0), placement, 4
        )
        return sum(jnp.sum(w * (1 + jnp.arange(w.size).reshape(w.shape))) for w in padded)

    gradient = jax.grad(total)
    assert "scatter" not in jax.jit(gradient).lower(weights).as_text()
    columns = np.array([0, 1, 2, 3, 4, 8, 9, 10])
    want = 1 + np.arange(D)[:, None] * 12 + columns[None, :]
    np.testing.assert_array_equal(gradient(weights)[0], want)


# ---- which jobs are taken ----


def test_unsupported_jobs_name_alternatives():
    with pytest.raises(ValueError, match="needs one of a100, h100, h200, b200, but this device is"):
        pallas_triton.tiles_for((128,), 128, "cpu", "bfloat16")
    with pytest.raises(ValueError, match="not float32; set model.dtype=bfloat16, or use a backend"):
        pallas_triton.tiles_for((128,), 128, "h100", "float32")
    with pytest.raises(ValueError, match="model.dim=192 is not divisible by 128; choose another"):
        pallas_triton.tiles_for((128,), 192, "h100", "bfloat16")
    placement = expert_placement.place_experts((2**20,), 1, "pairs")
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
        ((256, 128), 192, "h100", "bfloat16", "blocked", "model.dim=192"),
        ((3, 5), 256, "h100", "bfloat16", "blocked", "would need 16.0 times the FLOPs"),
        ((256, 128), 256, "gpu", "bfloat16", "blocked", ""),
    ],
)
def test_auto_on_gpus(widths, dim, chip, dtype, backend, note):
    placement = expert_placement.place_experts(widths, 1, "pairs")
    got, why = select.select_backend("auto", placement, (4096, dim), chip, dtype)
    assert got == backend and note in why and bool(why) == bool(note)


# ---- the check of kernels on a device ----


@pytest.fixture
def a_device_of_small_tiles(monkeypatch):
    """Lets this CPU pass for an H100 whose kernels run in interpret mode."""
    monkeypatch.setattr(sharding, "chip_name", lambda _: "h100")
    monkeypatch.setattr(pallas_triton, "tiles_for", lambda *_: TILES)
    monkeypatch.setattr(pallas_triton, "unit_for", lambda *_: TILES.hidden)
    interpreted = functools.partial(select.self_test_kernels, interpret=True)
    monkeypatch.setattr(select, "self_test_kernels", interpreted)
    return tiny_config(
        model=dict(dim=D),
        moe=dict(backend="pallas_triton", width=32, widths=(33, 31), num_experts=2),
    )


def test_wrong_kernels_are_found(a_device_of_small_tiles, monkeypatch, capsys):
    config = a_device_of_small_tiles
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    assert (
        model_loading.replace_wrong_kernels(config, mesh) is config and not capsys.readouterr().err
    )
    right = pallas_triton.forward

    def double_a_few_rows(*arguments):
        y_ND, kept = right(*arguments)
        return y_ND.at[8:16].multiply(2), kept

    monkeypatch.setattr(pallas_triton, "forward", double_a_few_rows)
    assert model_loading.replace_wrong_kernels(config, mesh).moe.backend == "blocked"
    message = "kernels of pallas_triton are wrong on this device: y differs .* set moe.backend=blo"
    assert re.search(
        message + ".* this evaluation uses moe.backend=blocked", capsys.readouterr().err
    )
    plain = dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend="blocked"))
    assert kernel_selection.check_kernels(plain, mesh).experts == "blocked"


def test_kernels_that_do_not_run_are_found(a_device_of_small_tiles, monkeypatch):
    def fail(*_):
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(pallas_triton, "forward", fail)
    with pytest.raises(UserError, match="do not run on this device .NotImplementedError: no such"):
        kernel_selection.check_kernels(
            a_device_of_small_tiles,
            device_mesh.build_mesh(a_device_of_small_tiles, jax.devices()[:1]),
        )
