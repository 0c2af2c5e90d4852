"""The training step: its numbers, accumulation, clipping, bad steps, and how it is compiled."""

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
from modse_jax.config.options import Config, MeshConfig
from modse_jax.errors import UserError
from modse_jax.model import accounting
from modse_jax.moe import layer_options
from modse_jax.runtime import sharding
from modse_jax.training import (
    auxiliary_losses,
    metrics,
    optimizer,
    train_step,
    train_step_cpu,
)
from tests.helpers.configs import tiny_config
from tests.helpers.steps import assert_close, batch, initial_state

# Loss, load-balancing loss, z-loss, gradient norm and parameter norm after one step.
PINNED = [5.815792, 4.014061, 6.151933, 0.405583, 41.444678]

UPDATES = {
    "plain": train_step.apply_update,
    "in place": train_step_cpu.apply_update_in_place,
}


@functools.cache
def jitted_step(config: Config) -> train_step.TrainStep:
    return jax.jit(train_step.make_train_step(config))


def run_one_step(config: Config) -> tuple[train_step.State, train_step.Metrics]:
    """Returns state and metrics, on the host, after one step from the initial state."""
    return jax.device_get(jitted_step(config)(initial_state(config), batch(config)))


def first_moments(state: train_step.State) -> list[np.ndarray]:
    """Returns Adam's first moments."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
    (adam,) = [node for node in nodes if is_adam(node)]
    return jax.tree.leaves(adam.mu)


def test_numbers_of_one_step_are_pinned():
    """Refactoring does not change them.

    If the mathematics is changed on purpose, put the new numbers here and explain them in LOG.md.
    """
    state, results = run_one_step(tiny_config(moe=dict(backend="blocked")))
    squares = [
        np.sum(np.square(array, dtype=np.float64)) for array in jax.tree.leaves(state.params)
    ]
    actual = [
        float(results.loss),
        float(results.balance_loss),
        float(results.z_loss),
        float(results.grad_norm),
        float(np.sqrt(sum(squares))),
    ]
    np.testing.assert_allclose(actual, PINNED, rtol=2e-5)


@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_realized_flops_count_only_routed_tokens(capacity):
    """7 of 256 tokens are padding. With capacity 0.5, further tokens are dropped."""
    config = tiny_config(moe=dict(widths=(), pairs=False, capacity_factor=capacity))
    _, results = run_one_step(config)
    row = metrics.train_row(config, 1, results, 2.0, 1.0, 1e9)
    dropped = int(results.statistics.dropped_P.sum())
    assert (dropped > 0) == (capacity > 0)
    assert row.get("dropped", 0) == dropped
    assert ("dropped" in row) == (capacity > 0)
    assert row["mfu_realised"] < row["mfu_nominal"]
    layers_times_k = 4
    routed = 249 * layers_times_k - dropped
    saved_rows = 256 * layers_times_k - routed
    flops = 256 * accounting.nominal_flops_per_token(config, 32)
    flops -= 6 * 3 * config.model.dim * 12 * saved_rows
    assert row["mfu_realised"] == pytest.approx(flops / 2e9, rel=1e-6)


@pytest.mark.parametrize(
    "text, error, message",
    [
        (
            "INTERNAL: Ragged all-to-all is currently not supported in limited ICI routing",
            UserError,
            "moe.exchange=gather",
        ),
        ("INTERNAL: something else", jax.errors.JaxRuntimeError, "something else"),
    ],
)
def test_slice_without_ragged_all_to_all_is_refused(text, error, message, monkeypatch):
    def fail(compiler_options):
        raise jax.errors.JaxRuntimeError(text)

    lowered = types.SimpleNamespace(compile=fail)
    monkeypatch.setattr(train_step, "lower_train_step", lambda config, mesh: lowered)
    with pytest.raises(error, match=message):
        train_step.compile_train_step(tiny_config(), None)


@pytest.mark.parametrize("chunk", [32, 256])
def test_compiled_step_donates_its_state_and_never_holds_all_logits(chunk):
    """A chunk of all 256 tokens does hold them, which proves that the pattern finds them."""
    config = tiny_config(mesh=MeshConfig(1, 1, 1), advanced=dict(loss_chunk=chunk))
    mesh = device_mesh.build_mesh(config, jax.devices()[:1])
    compiled = train_step.compile_train_step(config, mesh)
    text = compiled.as_text()
    holds_all_logits = re.search(r"f32\[(256|8,32),300\]", text) is not None
    assert holds_all_logits == (chunk == 256)
    assert not re.search("infeed|outfeed|send|recv|callback", text)
    arrays = jax.tree.leaves(train_step.state_shapes(config, mesh))
    state_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("clip_factor, is_good", [(1.0, True), (0.01, True), (0.01, False)])
def test_good_update_is_that_of_optax_and_bad_update_changes_nothing(name, clip_factor, is_good):
    state = initial_state(tiny_config())
    keys = iter(jax.random.split(jax.random.key(0), 99))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), state.params)
    rule = optimizer.build_optimizer(tiny_config())
    # One update makes the moments nonzero.
    _, opt_state = rule.update(grads, state.opt_state, state.params)
    before = (state.params, opt_state)
    update = UPDATES[name]
    actual = jax.jit(lambda: update(rule, grads, clip_factor, *before, jnp.asarray(is_good)))()

    expected = before
    if is_good:
        clip = optax.clip_by_global_norm(clip_factor * optax.global_norm(grads))
        clipped, _ = clip.update(grads, optax.EmptyState())
        updates, new_opt_state = rule.update(clipped, opt_state, state.params)
        expected = (optax.apply_updates(state.params, updates), new_opt_state)
    leaves = [jax.tree.leaves(tuple(tree)) for tree in (actual, expected, before)]
    for actual_leaf, expected_leaf, old_leaf in zip(*leaves, strict=True):
        np.testing.assert_allclose(actual_leaf, expected_leaf, rtol=1e-5, atol=1e-7)
        assert np.array_equal(actual_leaf, old_leaf) == (not is_good)


def test_update_in_place_is_selected_on_cpu_only(monkeypatch):
    assert train_step.select_update(None) is train_step_cpu.apply_update_in_place
    monkeypatch.setattr(sharding, "chip_name", lambda mesh: "h100")
    assert train_step.select_update(None) is train_step.apply_update


def test_gradients_are_clipped():
    """Adam's first moment after one step is (1 - beta1) times the clipped gradients."""
    state, results = run_one_step(tiny_config(optimizer=dict(grad_clip=100.0)))
    clipped_state, clipped_results = run_one_step(tiny_config(optimizer=dict(grad_clip=0.05)))
    assert results.grad_norm == clipped_results.grad_norm > 0.1
    factor = 0.05 / results.grad_norm
    moments = zip(first_moments(state), first_moments(clipped_state), strict=True)
    for moment, clipped_moment in moments:
        np.testing.assert_allclose(clipped_moment, factor * moment, rtol=1e-5, atol=1e-9)


def test_accumulation_equals_one_large_batch():
    """Except for the load-balancing loss, which is nonlinear in the batch and so is off here.

    Rows 3 and 7, which are the last of four micro-batches, are padding.
    """
    config = tiny_config(
        moe=dict(balance_loss_weight=0.0, z_loss_weight=1.0),
        training=dict(vocab_z_loss_weight=0.1),
    )
    rows = batch(config)
    rows["segments"] = rows["segments"].at[jnp.array([3, 7])].set(0).at[1, 9:].set(0)
    training = dataclasses.replace(config.training, gradient_accumulation=4)
    split_config = dataclasses.replace(config, training=training)
    state, results = jax.device_get(jitted_step(config)(initial_state(config), rows))
    split_state, split_results = jax.device_get(
        jitted_step(split_config)(initial_state(config), rows)
    )
    for name in ("loss", "z_loss", "vocab_z_loss", "grad_norm"):
        assert float(getattr(split_results, name)) == pytest.approx(
            float(getattr(results, name)), rel=1e-5
        )
    np.testing.assert_array_equal(split_results.statistics.counts_KE, results.statistics.counts_KE)
    assert_close(split_state.params, state.params, 1e-5)


def test_nonfinite_step_changes_only_counters():
    config = tiny_config(moe=dict(bias_rule="sign"))
    state = initial_state(config)
    step = jitted_step(config)
    bad_head = state.params["head"].at[0, 0].set(jnp.inf)
    bad = state._replace(params={**state.params, "head": bad_head})
    after, results = jax.device_get(step(bad, batch(config)))
    assert int(results.skipped) == int(results.nonfinite_in_a_row) == 1
    assert int(after.step) == 1
    expected = jax.tree.leaves((bad.params, bad.opt_state, bad.router_bias))
    actual = jax.tree.leaves((after.params, after.opt_state, after.router_bias))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)

    repaired = after._replace(params=state.params)
    good, results = jax.device_get(step(repaired, batch(config)))
    assert int(results.skipped) == 1
    assert int(results.nonfinite_in_a_row) == 0
    assert not np.array_equal(good.params["head"], state.params["head"])
    assert results.bias_range.tolist() == [[-np.float32(1e-3), np.float32(1e-3)]] * 2


ONE_POOL = dict(auxiliary_over_layers="sum", balance_loss_weight=0.2, z_loss_weight=0.1)
# All experts of a pool are chosen, so that the router of zeros loads them equally.
TWO_POOLS = dict(
    auxiliary_over_layers="mean",
    pools=((2, 0, 2), (2, 0, 2)),
    pairs=False,
    balance_loss_weight=0.2,
    z_loss_weight=0.1,
    width_penalty_weight=0.4,
    width_penalty_scale="max",
)


@pytest.mark.parametrize(
    "moe, values, lines",
    [
        (
            ONE_POOL,
            dict(balance_loss=4, z_loss=3.84362),
            [
                "load-balancing loss: weight 0.2, all choices, summed over 2 layers; 4 at perfect "
                "balance, which adds 0.8 to the loss",
                "router z-loss: weight 0.1, mean over tokens, summed over 2 layers; 3.84362 if all "
                "router logits are 0, which adds 0.384 to the loss",
            ],
        ),
        (
            TWO_POOLS,
            dict(balance_loss=4, width_penalty=2 * 12 / 20 + 2, z_loss=0.960906),
            [
                "load-balancing loss: weight 0.2, all choices, averaged over 2 layers; 4 at "
                "perfect balance, which adds 0.8 to the loss",
                "width penalty: weight 0.4, widths over their maximum, averaged over 2 layers; 3.2 "
                "at perfect balance, which adds 1.28 to the loss",
                "router z-loss: weight 0.1, mean over tokens, averaged over 2 layers; 0.960906 if "
                "all router logits are 0, which adds 0.0961 to the loss",
            ],
        ),
    ],
)
def test_auxiliary_losses_have_the_printed_values(moe, values, lines):
    """They hold for a router and a head of zeros, which give equal probabilities."""
    config = tiny_config(moe=moe, training=dict(vocab_z_loss_weight=0.3))
    vocabulary = (
        "vocabulary z-loss: weight 0.3, mean over targets; 32.5331 if all logits are 0, which "
        "adds 9.76 to the loss"
    )
    assert auxiliary_losses.description_lines(config) == [*lines, vocabulary]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key not in ("head", "router_gate")),
        initial_state(config).params,
    )
    rows = batch(config)
    split = train_step.inputs_and_targets(rows["tokens"], rows["segments"])
    totals = train_step.BatchTotals(jnp.sum(split.weights_BL), jnp.float32(1))
    total, terms = jax.jit(train_step.make_loss(config))(params, {}, rows, totals)
    expected_total = float(terms.cross_entropy)
    for name, value in {**values, "vocab_z_loss": np.log(300) ** 2}.items():
        assert float(getattr(terms, name)) == pytest.approx(value, rel=1e-5)
        weight = getattr(config.moe, f"{name}_weight", 0.3)
        expected_total += weight * value
    assert float(total) == pytest.approx(expected_total, rel=1e-5)


@pytest.mark.parametrize(
    "moe, message",
    [
        (dict(gate="softmax_top_k", top_k=1), None),
        (
            dict(gate="softmax_top_k", pools=((1, 0, 1), (3, 0, 1)), pairs=False),
            "is always 1 with a single expert in pool 0 of moe.pools, so",
        ),
        (dict(gate="uniform"), "moe.gate=uniform ignores the router's logits"),
        (
            dict(gate="sigmoid_renormalized", pools=((2, 0, 2), (2, 0, 1)), pairs=False),
            "is always 1 with one expert per token in pool 1 of moe.pools, so",
        ),
    ],
)
def test_a_router_without_gradient_is_reported(moe, message):
    """The gradient of the cross-entropy with respect to a router is 0 just where it is reported."""
    config = tiny_config(moe=moe)
    warnings = auxiliary_losses.router_warnings(config)
    assert len(warnings) == (message is not None)
    assert all(message in warning for warning in warnings)

    def cross_entropy(params: dict) -> jax.Array:
        totals = train_step.BatchTotals(jnp.float32(1), jnp.float32(1))
        _, terms = train_step.make_loss(config)(params, {}, batch(config), totals)
        return terms.cross_entropy

    grads = jax.jit(jax.grad(cross_entropy))(initial_state(config).params)
    has_gradient_E = np.abs(grads["blocks"]["moe"]["router_gate"]).max(axis=(0, 1)) > 1e-4
    first = 0
    for index, pool in enumerate(config.pools):
        is_named = f"in pool {index}" in "".join(warnings) or len(config.pools) == 1
        is_reported = bool(warnings) and is_named
        assert (has_gradient_E[first : first + pool.num_experts] == (not is_reported)).all()
        first += pool.num_experts


def test_a_single_renormalized_gate_is_reported():
    for gate in layer_options.RENORMALIZED_GATES:
        assert not auxiliary_losses.router_warnings(tiny_config(moe=dict(gate=gate)))
        (warning,) = auxiliary_losses.router_warnings(tiny_config(moe=dict(gate=gate, top_k=1)))
        assert f"moe.gate={gate} is always 1 with one expert per token, so" in warning


def test_scores_equal_the_training_loss_and_ignore_the_capacity_of_training():
    config = tiny_config()
    limited = tiny_config(moe=dict(capacity_factor=0.25))
    score = jax.jit(train_step.make_score_step(limited))
    nll_BL, weights_BL, _ = score(initial_state(config).variables, batch(config))
    mean = float((nll_BL * weights_BL).sum() / weights_BL.sum())
    _, results = run_one_step(config)
    assert mean == pytest.approx(float(results.loss), rel=1e-5)
    # Training with a capacity does drop tokens.
    limited = tiny_config(moe=dict(capacity_factor=0.5))
    _, limited_results = run_one_step(limited)
    # So does evaluation, with the capacity of evaluation.
    config = tiny_config(evaluation=dict(capacity_factor=0.5))
    *_, statistics = jax.jit(train_step.make_score_step(config))(
        initial_state(config).variables, batch(config)
    )
    np.testing.assert_array_equal(statistics.dropped_P, limited_results.statistics.dropped_P)
    assert int(results.statistics.dropped_P.sum()) == 0
    assert int(limited_results.statistics.dropped_P.sum()) > 0


def test_targets_belong_to_the_document_of_their_input():
    tokens = jnp.arange(8)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    split = train_step.inputs_and_targets(tokens, segments)
    assert split.weights_BL.tolist() == [[1, 1, 0, 1, 0, 0, 0]]
    assert split.targets_BL.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert split.inputs_BL.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_learning_rate_schedule_is_that_of_the_paper():
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
    # The last update is number 99; its rate is above the floor.
    assert float(rate(99)) == pytest.approx(3.0104e-5, rel=1e-5)


def test_the_first_update_uses_the_first_step_of_the_schedule():
    schedule = dict(learning_rate=0.4, initial_learning_rate=0.0, warmup_steps=4)
    configs = [
        tiny_config(optimizer=dict(**schedule, weight_decay=0.5, **first))
        for first in ({}, {"first_step": 0}, {"first_step": 1})
    ]
    rates = [optimizer.learning_rate(config) for config in configs]
    for updates in range(configs[0].training.steps):
        assert rates[0](updates) == rates[1](updates)
        assert rates[2](updates) == rates[0](updates + 1)
    params = {"w": jnp.ones(3)}
    for config, rate in zip(configs, (0.0, 0.0, 0.1)):
        rule = optimizer.build_optimizer(config)
        # Without gradients, a parameter shrinks by the learning rate times the weight decay.
        updates, _ = rule.update({"w": jnp.zeros(3)}, rule.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.5 * rate, rtol=1e-6)


def test_weight_decay_is_on_matrices_or_on_all_parameters():
    config = tiny_config(moe=dict(router_noise="learned"))
    params = jax.eval_shape(lambda: train_step.init_state(config)).params
    decays = optimizer.weight_decay_mask(params, "matrices")
    blocks = decays["blocks"]
    assert not decays["final_norm"]["scale"]
    assert not blocks["moe_norm"]["scale"]
    assert not blocks["moe"]["router_noise_scale"]
    assert decays["embedding"]
    assert blocks["moe"]["w_down"]
    assert blocks["moe"]["router_gate"]
    assert all(jax.tree.leaves(optimizer.weight_decay_mask(params, "all")))

    # Without gradients, a parameter shrinks by the learning rate times the weight decay.
    config = tiny_config(
        optimizer=dict(weight_decay_on="all", weight_decay=0.5, initial_learning_rate=0.01)
    )
    state = initial_state(config)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    rule = optimizer.build_optimizer(config)
    updates, _ = rule.update(zeros, state.opt_state, state.params)
    assert_close(updates, jax.tree.map(lambda p: -0.005 * p, state.params), 1e-7)


def test_meshes_that_do_not_fit_are_refused():
    message = "mesh.data=9, mesh.fsdp=1, mesh.expert=1 make 9, but this process sees 8 cpu"
    with pytest.raises(UserError, match=message):
        device_mesh.build_mesh(tiny_config(mesh=MeshConfig(data=9)))
    with pytest.raises(UserError, match="=12 is not divisible by mesh.data=8 "):
        device_mesh.build_mesh(tiny_config(training=dict(batch_size=12)))


def test_batch_mesh_uses_as_many_devices_as_divide_the_batch():
    assert sharding.build_batch_mesh(12).size == 6
