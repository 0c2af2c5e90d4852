"""Training gives the same numbers on every mesh, with the expected collectives and shards."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.config import device_mesh
from modse_jax.errors import UserError
from modse_jax.model import block, kernel_selection
from modse_jax.moe import expert_placement
from modse_jax.moe.experts import select
from modse_jax.planning.hlo_collectives import list_collectives
from modse_jax.runtime import sharding
from modse_jax.training import state_arrays, train_step
from modse_jax.training.checkpointing import Checkpoints
from tests.helpers.meshes import MESHES, WIDTHS, compiled, config_on
from tests.helpers.steps import assert_close, batch

# Compiling a step takes most of the time of a test. Together, these meshes have every axis.
FAST_MESHES = ("2 x 2 x 2", "8 expert, split", "2 data x 4 expert, rows sent")
MESH_NAMES = [
    name if name in FAST_MESHES else pytest.param(name, marks=pytest.mark.slow) for name in MESHES
]


def trained(config, count):
    mesh, step, first = compiled(config)
    state, losses = jax.device_put(first, sharding.parameter_shardings(mesh, first)), []
    for i in range(count):
        state, metrics = step(
            state, jax.device_put(batch(config, i), sharding.batch_sharding(mesh))
        )
        losses.append(float(metrics.loss))
    return state, metrics, losses


def canonical(config, state):
    """Returns the state in the order that one device stores."""
    order = expert_placement.hidden_unit_order(
        config.widths, device_mesh.place_experts_on_mesh(config, compiled(config)[0])
    )
    return jax.device_get(state_arrays.to_canonical_order(state, order))


@pytest.mark.parametrize("name", MESH_NAMES)
def test_every_mesh_trains_like_one_device(name):
    """Compares losses, statistics, parameters and Adam's moments after ten steps."""
    one_state, one, one_losses = trained(config_on(), 10)
    config = config_on(*MESHES[name])
    state, metrics, losses = trained(config, 10)
    np.testing.assert_allclose(losses, one_losses, atol=1e-5)
    np.testing.assert_array_equal(metrics.statistics.counts_KE, one.statistics.counts_KE)
    assert_close(jax.device_get(metrics), jax.device_get(one), 2e-4)
    assert_close(canonical(config, state).opt_state, jax.device_get(one_state.opt_state), 2e-4)
    assert trained(config, 3)[2] == losses[:3]  # bit for bit, on the same mesh


@pytest.mark.parametrize("name", MESH_NAMES)
def test_rows_of_a_device_equal_those_checked_before_the_run(name, monkeypatch):
    config, seen = config_on(*MESHES[name]), []
    mesh, real = device_mesh.build_mesh(config), select.expert_ffn
    monkeypatch.setattr(
        select, "expert_ffn", lambda x, *rest: seen.append(x.shape[0]) or real(x, *rest)
    )
    variables = train_step.state_shapes(config, mesh).variables
    totals = train_step.BatchTotals(targets=1.0, routed=1.0)
    jax.eval_shape(
        train_step.make_loss(config, mesh),
        *variables,
        jax.eval_shape(lambda: batch(config)),
        totals,
    )
    assert seen and set(seen) == {kernel_selection.max_rows_per_device(config, mesh)}


@pytest.mark.parametrize("name", MESH_NAMES)
def test_first_gradients_equal_those_of_one_device(name):
    """Adam's first moment after one step is a tenth of the clipped gradient, array by array."""
    want = jax.device_get(trained(config_on(), 1)[0].opt_state)
    config = config_on(*MESHES[name])
    got = canonical(config, trained(config, 1)[0]).opt_state
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1e-2, float(np.abs(b).max())), rtol=1e-4)


@pytest.mark.parametrize("name", MESH_NAMES)
def test_weights_are_sharded_evenly(name):
    """Every device has the same bytes, and large arrays are sharded over fsdp and expert."""
    sizes = MESHES[name][0]
    config = config_on(*MESHES[name])
    state = trained(config, 1)[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        shards = {shard.data.size for shard in leaf.addressable_shards}
        small = leaf.size <= 16 * 8 * config.model.num_layers  # norms and routers
        assert shards == {leaf.size if small else leaf.size // (sizes[1] * sizes[2])}, path


def sent(config):
    """Returns {kind of collective: shapes of its results} in the compiled step."""
    out = {}
    for c in list_collectives(compiled(config)[1].as_text()):
        out.setdefault(c.kind, []).append(c.shape)
    return out


def test_expert_weights_are_never_gathered_over_the_expert_axis():
    config = config_on(*MESHES["2 data x 4 expert"])
    H, D = sum(WIDTHS), config.model.dim
    made = " ".join(s for shapes in sent(config).values() for s in shapes)
    assert (
        f"[{D},{H // 4}]" in made or f"[2,{D},{H // 4}]" in made
    )  # the gradient's sum over `data`: a quarter
    for shape in (f"[{D},{H}]", f"[{H},{D}]", f"[2,{D},{H}]", f"[2,{H},{D}]"):
        assert shape not in made
    assert "reduce-scatter" in sent(config)


def test_a_layer_needs_two_all_gathers_and_two_reduce_scatters_of_tokens():
    """One all-gather and one reduce-scatter over 4 shards, and the transpose of each."""
    config = config_on(*MESHES["2 data x 4 expert"])
    D, mine = config.model.dim, 16 * 32 // 8  # tokens of a device
    tokens = [
        (c.kind, c.times, shape)
        for c in list_collectives(compiled(config)[1].as_text())
        for shape in re.findall(rf"f32\[\d+,{D}\]", c.shape)
        if int(shape[4:].split(",")[0]) >= mine
    ]
    assert sorted(tokens) == 2 * [("all-gather", 2, f"f32[{4 * mine},{D}]")] + 2 * [
        ("reduce-scatter", 2, f"f32[{mine},{D}]")
    ]


def test_the_grouped_matmul_is_never_dense():
    """There is no array of all rows by all hidden units, with either exchange."""
    for name in ("2 data x 4 expert", "2 data x 4 expert, rows sent"):
        config = config_on(*MESHES[name])
        rows = 2 * 4 * 16 * 32 // 8  # K choices of the tokens of four shards
        wide = {int(n) for n in re.findall(rf"f32\[{rows},(\d+)\]", compiled(config)[1].as_text())}
        assert config.model.dim in wide and max(wide) <= config.model.dim


def test_gathered_weights_are_not_saved_for_the_backward_pass():
    """With fsdp, the backward pass all-gathers them again."""
    text, H, D = compiled(config_on(*MESHES["8 fsdp"]))[1].as_text(), sum(WIDTHS), 16
    assert f"[{D},{H}]" in text and f"[2,{D},{H}]" not in text


def test_data_parallel_step_uses_only_all_reduce():
    assert set(sent(config_on(*MESHES["8 data"]))) == {"all-reduce"}


@pytest.mark.parametrize("placement", ["whole", "split"])
def test_capacity_drops_are_counted_once(placement):
    """The capacity applies to the tokens of all shards together."""
    config = config_on((1, 1, 4), placement, capacity_factor=0.5, backend="reference")
    x, valid = jax.random.normal(jax.random.key(0), (8, 6, 16)), jnp.ones((8, 6), bool)

    def layer(mesh):
        def f(x, valid):
            return block.build_moe_layer(config, mesh, nnx.Rngs(0))(x, valid)

        y, *_, statistics = jax.jit(f)(x, valid)
        return y, statistics.dropped_P.sum()

    (y, dropped), (whole_y, whole_dropped) = layer(device_mesh.build_mesh(config)), layer(None)
    assert int(dropped) == int(whole_dropped) > 0
    np.testing.assert_allclose(y, whole_y, atol=1e-5)


@pytest.mark.parametrize("scope", ["batch", "device"])
def test_balance_loss_scope_is_the_batch_or_the_mean_over_devices(scope):
    """Devices have unequal numbers of tokens. Gradients are compared too."""
    config = config_on((4, 1, 1), backend="reference", balance_loss_scope=scope)
    x, valid = (
        jax.random.normal(jax.random.key(0), (8, 6, 16)),
        jnp.arange(48).reshape(8, 6) % 7 < 5,
    )
    valid = valid.at[0].set(False)

    def loss(x, valid, mesh):
        return block.build_moe_layer(config, mesh, nnx.Rngs(0))(x, valid)[1]

    def expected(x):
        parts = (
            [(x, valid)]
            if scope == "batch"
            else [(x[i : i + 2], valid[i : i + 2]) for i in range(0, 8, 2)]
        )
        return sum(loss(*part, None) * part[1].sum() for part in parts) / valid.sum()

    got, want = (
        jax.jit(jax.value_and_grad(f))(x)
        for f in (
            functools.partial(loss, valid=valid, mesh=device_mesh.build_mesh(config)),
            expected,
        )
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    assert scope == "batch" or abs(float(got[0] - loss(x, valid, None))) > 1e-3


def test_a_run_resumes_on_any_mesh(tmp_path):
    """Saved with sliced experts on 8 devices, resumed on 4 shards of pairs and on one device."""
    source = config_on(*MESHES["8 expert, split"])
    mesh = compiled(source)[0]
    state = trained(source, 2)[0]
    saved = Checkpoints(
        tmp_path / "c",
        3,
        order=expert_placement.hidden_unit_order(
            WIDTHS, device_mesh.place_experts_on_mesh(source, mesh)
        ),
    )
    saved.save(state, {"validation_loss": None})
    saved.close()
    want = canonical(source, state)
    for config in (config_on(*MESHES["2 data x 4 expert"]), config_on()):
        mesh, step, _ = compiled(config)
        order = expert_placement.hidden_unit_order(
            WIDTHS, device_mesh.place_experts_on_mesh(config, mesh)
        )
        restored = Checkpoints(tmp_path / "c", read_only=True, order=order)
        got, reason = restored.restore(2, train_step.state_shapes(config, mesh))
        assert not reason  # its fingerprints, taken on another mesh
        restored.close()
        for a, b in zip(jax.tree.leaves(canonical(config, got)), jax.tree.leaves(want)):
            np.testing.assert_array_equal(a, b)
        after = step(got, jax.device_put(batch(config, 2), sharding.batch_sharding(mesh)))[1]
        assert float(after.loss) == pytest.approx(trained(source, 3)[2][-1], abs=1e-5)


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        (
            (3, 1, 1),
            {},
            "training.batch_size / training.gradient_accumulation=16 "
            "is not divisible by mesh.data=3",
        ),
        ((-1, 3, 1), {}, "3 does not divide the 8 cpu"),
        ((2, 4, 2), {}, "make 16, but this process sees 8 cpu"),
        ((1, 1, 8), {}, "mesh.expert=8: no way was found .* on 8 shards .* can be: 1, 2, 4; or"),
        (
            (1, 1, 3),
            dict(training=dict(batch_size=12), evaluation=dict(batch_size=12)),
            "model.dim=16 is not divisible by",
        ),
    ],
)
def test_meshes_that_do_not_fit_are_explained(sizes, changes, message):
    config = config_on(sizes)
    for section, values in changes.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **values)}
        )
    with pytest.raises(UserError, match=message):
        device_mesh.build_mesh(config)


def test_a_mesh_axis_shards_only_one_axis_of_an_array():
    assert sharding.partition_spec(("vocab", "embed")) == jax.sharding.PartitionSpec(
        (), ("fsdp", "expert")
    )
    with pytest.raises(ValueError, match="a mesh axis can shard only one"):
        sharding.partition_spec(("embed", "expert_embed"))
    for name, meanings in sharding.PARAMETER_AXES.items():
        assert sharding.parameter_partition_spec(name, len(meanings) + 1)[0] is None


def test_minus_one_takes_the_remaining_devices():
    assert dict(device_mesh.build_mesh(config_on((2, -1, 2))).shape) == {
        "data": 2,
        "fsdp": 2,
        "expert": 2,
    }
    assert dict(device_mesh.build_mesh(config_on((-1, 1, 1))).shape) == {
        "data": 8,
        "fsdp": 1,
        "expert": 1,
    }
