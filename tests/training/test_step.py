"""The training step: accumulation, non-finite gradients, and one step's numbers pinned."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.errors import UserError
from modse_jax.model import accounting
from modse_jax.runtime import sharding
from modse_jax.training import metrics, optimizer, train_step
from tests.helpers.configs import tiny_config
from tests.helpers.steps import assert_close, batch, initial_state


@functools.cache
def jitted_step(config):
    return jax.jit(train_step.make_train_step(config))


def run(config):
    return jax.device_get(jitted_step(config)(initial_state(config), batch(config)))


def test_one_steps_numbers_are_pinned():
    """If you meant to change the mathematics, put the new numbers here and say why in LOG.md; a refactor moves none."""
    state, m = run(tiny_config(moe=dict(backend="blocked")))
    norm = float(
        np.sqrt(sum(np.sum(np.square(p, dtype=np.float64)) for p in jax.tree.leaves(state.params)))
    )
    got = [float(m.loss), float(m.balance_loss), float(m.z_loss), float(m.grad_norm), norm]
    np.testing.assert_allclose(got, PINNED, rtol=2e-5)


PINNED = [5.815792, 4.014061, 6.151933, 0.405583, 41.444678]


@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_realised_flops_are_of_rows_that_were_multiplied(capacity):
    """7 of 256 tokens are padding; half of an even share is dropped or more."""
    config = tiny_config(moe=dict(widths=(), pairs=False, capacity_factor=capacity))
    m = run(config)[1]
    row = metrics.train_row(config, 1, m, 2.0, 1.0, 1e9)
    dropped = int(m.statistics.dropped.sum())
    assert (dropped > 0) == (capacity > 0) and row["mfu_realised"] < row["mfu_nominal"]
    width = 12 * (249 * 4 - dropped) / (256 * 4)  # two layers, two choices
    flops = 256 * accounting.train_flops_per_token(config, 32, width)
    assert row["mfu_realised"] == pytest.approx(flops / 2e9, rel=1e-6)


@pytest.mark.parametrize(
    "text, error, message",
    [
        (
            "INTERNAL: Ragged all-to-all is currently not supported in limited ICI routing settings",
            UserError,
            "moe.exchange=gather",
        ),
        ("INTERNAL: something else", jax.errors.JaxRuntimeError, "something else"),
    ],
)
def test_a_slice_that_cannot_send_rows_says_what_would_do(text, error, message, monkeypatch):
    def fail(compiler_options):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(train_step, "_lowered", lambda *_: types.SimpleNamespace(compile=fail))
    with pytest.raises(error, match=message):
        train_step.compile_train_step(tiny_config(), None)


@pytest.mark.parametrize("chunk", [32, 256])
def test_a_compiled_step_donates_stays_on_the_device_and_holds_no_logits(chunk):
    """Of 256 tokens and 300 pieces, in chunks; all at once, the logits are found."""
    config = tiny_config(mesh=MeshConfig(1, 1, 1), training=dict(loss_chunk=chunk))
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    compiled, state = (
        train_step.compile_train_step(config, mesh),
        train_step.state_shapes(config, mesh),
    )
    text = compiled.as_text()
    assert bool(re.search(r"f32\[(256|8,32),300\]", text)) == (chunk == 256)
    assert not re.search("infeed|outfeed|send|recv|callback", text)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("clip,good", [(1.0, True), (0.01, True), (0.01, False)])
def test_an_update_is_optaxs_or_none(in_place, clip, good):
    config = tiny_config()
    state, keys = initial_state(config), iter(jax.random.split(jax.random.key(0), 99))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), state.params)
    rule = optimizer.build_optimizer(config)
    state = state._replace(
        opt_state=rule.update(grads, state.opt_state, state.params)[1]
    )  # moments that are not 0
    limit = clip * optax.global_norm(grads)
    got = jax.jit(
        lambda: train_step.apply_update(rule, grads, clip, state, jnp.asarray(good), in_place)
    )()
    clipped = optax.clip_by_global_norm(limit).update(grads, optax.EmptyState())[0]
    updates, opt_state = rule.update(clipped, state.opt_state, state.params)
    want = (
        (optax.apply_updates(state.params, updates), opt_state)
        if good
        else (state.params, state.opt_state)
    )
    for a, b, before in zip(
        *(jax.tree.leaves(t) for t in (got, want, (state.params, state.opt_state)))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert np.array_equal(a, before) == (not good)


def test_a_steps_gradients_are_clipped():
    """By Adam's first moment after one step: (1 - beta1) times the clipped gradients."""
    loose, tight = (tiny_config(optimizer=dict(grad_clip=c)) for c in (100.0, 0.05))
    (free, metrics), (clipped, same) = run(loose), run(tight)
    assert metrics.grad_norm == same.grad_norm > 0.1
    factor = 0.05 / metrics.grad_norm
    moments = [
        next(
            s.mu
            for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
            if hasattr(s, "mu")
        )
        for state in (free, clipped)
    ]
    for a, b in zip(*map(jax.tree.leaves, moments)):
        np.testing.assert_allclose(b, factor * a, rtol=1e-5, atol=1e-9)


def test_accumulation_equals_one_large_batch():
    """But for the balance loss, which is nonlinear in the batch, and so is off here."""
    config = tiny_config(moe=dict(balance_loss_weight=0.0, z_loss_weight=0.0))
    many = dataclasses.replace(
        config, training=dataclasses.replace(config.training, gradient_accumulation=4)
    )
    (one_state, one), (split_state, split) = run(config), run(many)
    assert_close((split.loss, split.grad_norm), (one.loss, one.grad_norm), 1e-5)
    np.testing.assert_array_equal(split.statistics.counts_KE, one.statistics.counts_KE)
    assert_close(split_state.params, one_state.params, 1e-5)


def test_a_non_finite_step_changes_nothing_but_its_counters():
    config = tiny_config()
    state, step = initial_state(config), jitted_step(config)
    bad = state._replace(
        params={**state.params, "head": state.params["head"].at[0, 0].set(jnp.inf)}
    )
    after, metrics = jax.device_get(step(bad, batch(config)))
    assert int(metrics.skipped) == int(metrics.nonfinite_in_a_row) == 1 and int(after.step) == 1
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((bad.params, bad.opt_state)),
    ):
        np.testing.assert_array_equal(a, b)
    good, metrics = jax.device_get(step(after._replace(params=state.params), batch(config)))
    assert int(metrics.skipped) == 1 and int(metrics.nonfinite_in_a_row) == 0
    assert not np.array_equal(good.params["head"], state.params["head"])


def test_scores_equal_the_training_loss_and_ignore_capacity():
    config = tiny_config()
    state = initial_state(config)
    b = batch(config)
    nll, weights, _ = jax.jit(
        train_step.make_score_step(tiny_config(moe=dict(capacity_factor=0.25)))
    )(state.params, b)
    _, metrics = run(config)
    assert float((nll * weights).sum() / weights.sum()) == pytest.approx(
        float(metrics.loss), rel=1e-5
    )
    _, capped = run(tiny_config(moe=dict(capacity_factor=0.5)))
    assert int(capped.statistics.dropped.sum()) > 0 == int(metrics.statistics.dropped.sum())


def test_targets_stay_inside_their_document():
    tokens, segments = jnp.arange(8)[None], jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    inputs, _, targets, weights = train_step.inputs_and_targets(tokens, segments)
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0, 0]]
    assert targets.tolist() == [[1, 2, 3, 4, 5, 6, 7]] and inputs.shape == (1, 7)


def test_the_schedule_is_the_papers():
    config = tiny_config(
        training=dict(steps=100),
        optimizer=dict(
            learning_rate=3e-4,
            initial_learning_rate=2e-7,
            final_learning_rate=3e-5,
            warmup_steps=20,
        ),
    )
    rate = optimizer.learning_rate(config)
    assert float(rate(0)) == pytest.approx(2e-7, rel=1e-4)
    assert float(rate(10)) == pytest.approx((3e-4 + 2e-7) / 2, rel=1e-3)
    assert float(rate(20)) == pytest.approx(3e-4)
    assert float(rate(60)) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-3)
    assert float(rate(100)) == pytest.approx(3e-5)


def test_only_matrices_decay():
    config = tiny_config(moe=dict(gate_term="learned"))
    decays = optimizer.weight_decay_mask(
        jax.eval_shape(lambda: train_step.init_state(config)).params
    )
    assert not decays["final_norm"]["scale"] and not decays["blocks"]["moe_norm"]["scale"]
    assert not decays["blocks"]["moe"]["router_noise_scale"]
    assert (
        decays["embedding"]
        and decays["blocks"]["moe"]["w_down"]
        and decays["blocks"]["moe"]["router_gate"]
    )


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError,
        match="mesh.data=9, mesh.fsdp=1, mesh.expert=1 make 9, but this process sees 8 cpu",
    ):
        device_mesh.build_mesh(tiny_config(mesh=MeshConfig(data=9)))
    with pytest.raises(UserError, match="=12 is not divisible by mesh.data=8 "):
        device_mesh.build_mesh(tiny_config(training=dict(batch_size=12)))
    assert sharding.build_batch_mesh(12).size == 6
