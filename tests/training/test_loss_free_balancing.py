"""Loss-free balancing: the update of the router bias, and where the bias is used.

Legend: L layers, K choices, E experts, T tokens, A arms of an experiment, in place of layers.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.config import device_mesh
from modse_jax.config.options import CheckpointConfig, MeshConfig
from modse_jax.errors import ExitCode, UserError
from modse_jax.evaluation import model_loading, scoring
from modse_jax.evaluation.benchmarks import model_programs
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.model.variables import Variables, nest_router_bias
from modse_jax.moe import expert_placement, router
from modse_jax.moe.layer_options import Pool
from modse_jax.runtime import sharding
from modse_jax.training import (
    auxiliary_losses,
    loop,
    loss_free_balancing,
    run_logs,
    train_step,
)
from modse_jax.training.checkpointing import Checkpoints
from tests.helpers.configs import tiny_config
from tests.helpers.runs import config_for, state_of
from tests.helpers.steps import batch

CONFIG = dict(bias_rule="proportional", bias_rate=0.05, bias_schedule="cosine", bias_recenter=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def loads_of_stream(
    num_experts: int, top_k: int, rule: str, steps: int, rate_A1: jax.Array
) -> jax.Array:
    """Returns the load imbalance (max/mean) of each rate, summed over the last 50 steps.

    Every step routes 2,048 tokens with the logits N(0, 1) + linspace(2.5, 0, num_experts), as the
    router does, and then updates the bias, as the training step does.
    """
    mean_E = jnp.linspace(2.5, 0, num_experts)
    num_arms = rate_A1.shape[0]

    def count_choices(logits_TE: jax.Array, bias_E: jax.Array) -> jax.Array:
        _, ids_TK = router.compute_gates(logits_TE, top_k, "softmax_top_k", "cpu", bias_E)
        return jnp.zeros(num_experts, jnp.int32).at[ids_TK.reshape(-1)].add(1)

    def run_step(bias_AE: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_TE = jax.random.normal(key, (2048, num_experts)) + mean_E[None, :]
        counts_AE = jnp.stack([count_choices(logits_TE, bias_E) for bias_E in bias_AE])
        pools = (Pool(num_experts, top_k),)
        bias_AE = loss_free_balancing.update_bias(
            bias_AE, counts_AE, pools, rule, rate_A1, recenter=False
        )
        return bias_AE, counts_AE

    keys = jax.random.split(jax.random.key(0, impl="rbg"), steps)
    _, counts = jax.lax.scan(run_step, jnp.zeros((num_arms, num_experts)), keys)
    total_AE = jnp.sum(counts[-50:], axis=0)
    return jnp.max(total_AE, axis=1) / jnp.mean(total_AE, axis=1)


def test_both_rules_balance_a_skewed_stream(compiled_with_care):
    """With a rate of 0, the bias stays 0."""
    rates = jnp.array([[1e-3], [0.0]])
    for rule in ("sign", "proportional"):
        balanced, unbalanced = loads_of_stream(32, 4, rule, 400, rates)
        assert balanced <= 1.10
        assert unbalanced >= 3.2


@pytest.mark.slow
def test_the_rate_of_the_sign_rule_must_fall_with_the_number_of_experts(compiled_with_care):
    """The scores are about 1 / E, so a rate of 1e-3 overshoots with 1,024 experts."""
    rates = jnp.array([[1e-3], [1e-3 * 32 / 1024]])
    too_fast, scaled = loads_of_stream(1024, 8, "sign", 300, rates)
    assert too_fast >= 1.5
    assert scaled <= 1.4


def expected_update(
    bias_E: np.ndarray, counts_E: np.ndarray, rule: str, rate: float, recenter: bool
) -> np.ndarray:
    """Returns the bias of one pool after an update, in float64."""
    mean = counts_E.sum() / len(counts_E)
    if rule == "sign":
        bias_E = bias_E + rate * np.sign(mean - counts_E)
    elif mean:
        bias_E = bias_E + rate * (mean - counts_E) / mean
    return bias_E - bias_E.mean() if recenter else bias_E


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("recenter", [False, True])
def test_each_pool_is_updated_on_its_own(rule, recenter):
    """The second layer has no tokens, and in the first one expert has exactly the mean."""
    rng = np.random.default_rng(0)
    bias_LE = rng.normal(size=(2, 7))
    counts_LE = np.array([[5, 0, 7, 8, 1, 2, 3], [0] * 7])
    pools = (Pool(4, 2), Pool(3, 1))
    found = loss_free_balancing.update_bias(
        jnp.asarray(bias_LE, jnp.float32), jnp.asarray(counts_LE), pools, rule, 0.1, recenter
    )
    for layer in range(2):
        for experts in (slice(0, 4), slice(4, 7)):
            expected = expected_update(
                bias_LE[layer, experts], counts_LE[layer, experts], rule, 0.1, recenter
            )
            np.testing.assert_allclose(found[layer, experts], expected, atol=1e-6)


def test_the_rate_decays_to_zero_at_the_last_step():
    for schedule, half in (("constant", 1e-3), ("linear", 5e-4), ("cosine", 5e-4)):
        config = tiny_config(moe=dict(bias_schedule=schedule), training=dict(steps=100))
        rate = loss_free_balancing.rate_schedule(config)
        assert float(rate(0)) == pytest.approx(1e-3)
        assert float(rate(50)) == pytest.approx(half)
        assert float(rate(100)) == pytest.approx(1e-3 if schedule == "constant" else 0, abs=1e-9)
    (line,) = [
        line
        for line in auxiliary_losses.description_lines(tiny_config(moe=CONFIG))
        if line.startswith("router bias")
    ]
    assert line == (
        "router bias: proportional rule, rate 0.05, cosine decay to 0 at step 6, recentered to "
        "mean 0"
    )


def train_three_steps(devices: int, **sections) -> train_step.State:
    """Returns the state after three steps of 32 rows each.

    The bias of the first layer is compared with that of the logged counts.
    """
    config = tiny_config(
        moe=CONFIG,
        training=dict(batch_size=32, **sections.pop("training", {})),
        mesh=MeshConfig(-1, 2 if devices > 1 else 1, 2 if devices > 1 else 1),
        **sections,
    )
    mesh = device_mesh.build_mesh(config, jax.devices()[:devices])
    step = train_step.compile_train_step(config, mesh)
    state = train_step.init_sharded_state(config, mesh)
    expected_E = np.zeros(4)
    for number in range(3):
        rows = {name: np.asarray(array) for name, array in batch(config, number).items()}
        state, results = step(state, sharding.shard_batch(mesh, rows, 32))
        counts_E = np.asarray(results.statistics.counts_KE[0]).sum(axis=0)
        assert counts_E.sum() == 2 * (rows["segments"][:, :-1] > 0).sum()
        rate = CONFIG["bias_rate"] * (1 + np.cos(np.pi * number / config.training.steps)) / 2
        expected_E = expected_update(expected_E, counts_E, "proportional", rate, recenter=True)
        found_E = state.variables.router_bias_LE[0]
        np.testing.assert_allclose(found_E, expected_E, atol=1e-6)
    bias_LE = np.asarray(state.variables.router_bias_LE)
    extremes = np.stack([bias_LE.min(axis=1), bias_LE.max(axis=1)], axis=1)
    np.testing.assert_array_equal(results.bias_range, extremes)
    return jax.device_get(state)


def test_the_bias_has_the_same_bits_with_accumulation_rematerialization_and_devices():
    expected = train_three_steps(1).variables.router_bias_LE
    assert expected.dtype == np.float32
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(expected.mean(axis=1), 0, atol=1e-7)
    accumulated = train_three_steps(
        1, training=dict(gradient_accumulation=4), model=dict(remat="full")
    )
    np.testing.assert_array_equal(accumulated.variables.router_bias_LE, expected)
    on_mesh = train_three_steps(8)
    np.testing.assert_array_equal(on_mesh.variables.router_bias_LE, expected)


def test_scores_traces_samples_and_tasks_use_the_bias():
    """A large bias sends every token to experts 1 and 3 in layer 0, and to 0 and 2 in layer 1.

    There are two pools with one choice each, so the largest bias need not be the first choice.
    """
    pools = dict(pools=((2, 0, 1), (2, 0, 1)), pairs=False, gate="sigmoid")
    config = tiny_config(moe={**CONFIG, **pools})
    state = jax.jit(lambda: train_step.init_state(config))()
    bias_LE = jnp.array([[0.0, 8, 0, 9], [7, 0, 6, 0]])
    biased = Variables(state.params, nest_router_bias(bias_LE))
    rows = batch(config)

    score = jax.jit(train_step.make_score_step(config, trace=True))
    nll_BL, weights_BL, statistics, *_, ids_LBLK = score(biased, rows)
    num_tokens = int(statistics.tokens[0])
    for layer, order in enumerate(([1, 3], [0, 2])):
        assert (np.asarray(ids_LBLK[layer]) == np.array(order)).all()
        for choice, expert in enumerate(order):
            assert statistics.counts_KE[layer, choice, expert] == num_tokens
    totals = train_step.BatchTotals(targets=jnp.float32(1), routed=jnp.float32(1))
    _, terms = jax.jit(train_step.make_loss(config))(*biased, rows, totals)
    np.testing.assert_array_equal(terms.statistics.counts_KE, statistics.counts_KE)
    plain_nll_BL, *_ = score(state.variables, rows)
    assert np.abs(plain_nll_BL - nll_BL).max() > 1e-3

    graph, _ = transformer.build_abstract_model(kernel_selection.for_generation(config))
    tokens_BL = rows["tokens"][:1, :-1]
    model = nnx.merge(graph, biased.params)
    logits_BLV, _ = model(tokens_BL, jnp.ones_like(tokens_BL), bias_LE)
    prompt = tokens_BL[:, :-1]
    decoding = sampling.prefill(graph, biased, prompt, jnp.array([prompt.shape[1]]), 2)
    np.testing.assert_allclose(decoding.logits_BV, logits_BLV[:, -2], atol=1e-5)
    # Decoding a token that is chosen with certainty continues with the logits after it.
    certain_BV = jnp.where(jnp.arange(logits_BLV.shape[2]) == tokens_BL[0, -1], 0.0, -jnp.inf)
    decoding = decoding._replace(logits_BV=certain_BV[None])
    keys = jax.random.split(jax.random.key(0), 1)
    decoding, _ = sampling.decode(graph, biased, decoding, keys, sampling.Settings(0.0), 0, -1)
    np.testing.assert_allclose(decoding.logits_BV, logits_BLV[:, -1], atol=1e-5)

    scores = model_programs.score_rows(
        graph,
        biased,
        64,
        None,
        tokens_BL,
        lengths=jnp.array([tokens_BL.shape[1]]),
        starts=jnp.array([1]),
        last=jnp.zeros((1, 1), jnp.int32),
    )
    log_p_BLV = jax.nn.log_softmax(logits_BLV)
    expected = jnp.take_along_axis(log_p_BLV[:, :-1], tokens_BL[:, 1:, None], axis=-1).sum()
    assert float(scores.log_p_B[0]) == pytest.approx(float(expected), rel=1e-5)


def test_validation_leaves_the_bias_alone_and_checkpoints_keep_it(corpus, tmp_path):
    """A run that resumes at step 4 and validates eleven times ends with the same bits."""
    config = config_for(
        corpus,
        moe=dict(bias_rule="sign", bias_rate=0.01),
        training=dict(steps=14, checkpoint_every=4),
        checkpoint=CheckpointConfig(keep=9),
        mesh=MeshConfig(1, 1, 1),
    )
    workdir, resumed = tmp_path / "run", tmp_path / "resumed"
    assert loop.train(config, str(workdir)) == ExitCode.FINISHED
    shutil.copytree(workdir, resumed)
    for step in (8, 12, 14):
        shutil.rmtree(resumed / "checkpoints" / f"{step:08}")
    often_validated = dataclasses.replace(
        config, training=dataclasses.replace(config.training, eval_every=1)
    )
    assert loop.train(often_validated, str(resumed)) == ExitCode.FINISHED
    rows = run_logs.read_log(resumed / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "validation"] == list(range(4, 15))
    expected = state_of(workdir, config)
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(state_of(resumed, config)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    bias_LE = expected.variables.router_bias_LE
    assert np.abs(bias_LE).max() > 0.05
    last = [row for row in rows if row["split"] == "train"][-1]
    assert last["router_bias_min"] == bias_LE.min(axis=1).tolist()
    assert last["router_bias_max"] == bias_LE.max(axis=1).tolist()

    meta = Checkpoints(workdir / "checkpoints", read_only=True).meta(14)
    assert meta["leaves"]["router_bias/blocks/moe/router_bias"] == [[2, 4], "float32"]
    assert "router_bias/blocks/moe/router_bias" in meta["fingerprints"]
    mesh = sharding.make_mesh(jax.devices(), (2, 2, 2))
    order = expert_placement.hidden_unit_order(
        config.widths, device_mesh.place_experts_on_mesh(config, mesh)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True, order=order)
    restored, reason = checkpoints.restore(14, train_step.state_shapes(config, mesh))
    assert not reason
    np.testing.assert_array_equal(restored.variables.router_bias_LE, bias_LE)

    model = model_loading.load_model(workdir, 0, 8)
    np.testing.assert_array_equal(model.variables.router_bias_LE, bias_LE)
    losses = [
        scoring.validate(model._replace(variables=Variables(expected.params, bias)), 0, 8).loss
        for bias in (expected.router_bias, {})
    ]
    assert losses[0]["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert losses[1]["loss"] != pytest.approx(losses[0]["loss"], rel=1e-5)
    assert "dropped" not in losses[0]


def test_a_bias_rule_does_not_fit_uniform_gates():
    with pytest.raises(UserError, match="moe.bias_rule=sign does not fit moe.gate=uniform: its"):
        tiny_config(moe=dict(bias_rule="sign", gate="uniform"))


def test_a_bias_rule_is_not_added_to_an_old_run(corpus, tmp_path):
    config = config_for(corpus)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match="holds another config .moe.bias_rule: 'none' -> 'sign'"):
        loop.train(config_for(corpus, moe=dict(bias_rule="sign")), str(tmp_path))
