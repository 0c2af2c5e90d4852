"""Choices, losses and statistics of the router; padding changes none of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.model import block
from modse_jax.moe import balancing, router
from modse_jax.moe.layer_options import RouterOptions
from tests.helpers.configs import tiny_config

WIDTHS = (20, 4, 12, 12)


def make_layer(rng, **moe):
    """Returns (config, float64 weights, jitted function of (weights, x, valid))."""
    config = tiny_config(moe=moe)
    graph, state = nnx.split(block.build_moe_layer(config, None, nnx.Rngs(0)))
    weights = nnx.to_pure_dict(state)
    weights = {k: rng.normal(size=v.shape) / 2 for k, v in weights.items()}

    @jax.jit
    def apply(weights, x_TD, valid_T):
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)
        out = nnx.merge(graph, weights)(x_TD[None], valid_T[None])
        return out.y_BLD[0], out.balance_loss, out.z_loss, out.statistics

    return config, weights, apply


def test_renormalized_softmax_is_the_papers_gate():
    logits = jax.random.normal(jax.random.key(0), (50, 8))
    a, b = (
        router.compute_gates(logits, 3, g, "cpu")[0]
        for g in ("top_k_softmax", "softmax_top_k_renormalized")
    )
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert (
        float(jnp.max(jnp.abs(router.compute_gates(logits, 3, "softmax_top_k", "cpu")[0] - a)))
        > 0.01
    )


def test_balance_loss_is_k_at_balance_and_larger_elsewhere():
    even = jnp.full((2, 4), 25)
    assert float(
        balancing.balance_loss(even, jnp.full(4, 25.0), jnp.int32(100), "top_k")
    ) == pytest.approx(2)
    assert float(
        balancing.balance_loss(even, jnp.full(4, 25.0), jnp.int32(100), "argmax")
    ) == pytest.approx(1)
    skewed = jnp.array([[100, 0, 0, 0], [0, 100, 0, 0]])
    assert float(
        balancing.balance_loss(skewed, jnp.array([70.0, 30, 0, 0]), jnp.int32(100), "top_k")
    ) == pytest.approx(4)


def test_padding_tokens_change_no_output_loss_or_gradient():
    """Padding tokens may be NaN."""
    rng = np.random.default_rng(0)
    _, weights, apply = make_layer(rng)
    valid = jnp.arange(20) < 13
    x = jnp.asarray(rng.normal(size=(20, 16)), jnp.float32)
    junk = x.at[13:].set(jnp.nan)

    def loss(w, x):
        y, balance, z, _ = apply(w, x, valid)
        return jnp.sum(y[:13] ** 2) + balance + z

    w = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)
    for a, b in zip(jax.tree.leaves(apply(w, x, valid)), jax.tree.leaves(apply(w, junk, valid))):
        np.testing.assert_array_equal(
            a[:13] if a.ndim == 2 and a.shape[0] == 20 else a,
            b[:13] if b.ndim == 2 and b.shape[0] == 20 else b,
        )
    for a, b in zip(
        jax.tree.leaves(jax.grad(loss)(w, x)), jax.tree.leaves(jax.grad(loss)(w, junk))
    ):
        np.testing.assert_array_equal(a, b)
    statistics = apply(w, x, valid)[3]
    assert int(statistics.tokens) == 13 and int(statistics.counts_KE.sum()) == 26


def test_losses_of_a_sharded_batch_equal_those_of_the_global_batch():
    """`reduce` sums over devices: two halves reduced together give the losses of all tokens."""
    weights = router.RouterWeights(jax.random.normal(jax.random.key(1), (16, 4)))
    x_TD, valid_T = jax.random.normal(jax.random.key(0), (24, 16)), jnp.arange(24) % 5 > 0
    whole = jax.jit(lambda x, v: router.route(x, v, weights, RouterOptions(), WIDTHS, "cpu"))(
        x_TD, valid_T
    )
    reduce = functools.partial(jax.lax.psum, axis_name="i")
    halves = jax.jit(
        jax.vmap(
            lambda x, v: router.route(x, v, weights, RouterOptions(), WIDTHS, "cpu", reduce),
            axis_name="i",
        )
    )(x_TD.reshape(2, 12, 16), valid_T.reshape(2, 12))
    np.testing.assert_allclose(halves.balance_loss, np.full(2, whole.balance_loss), rtol=1e-6)
    np.testing.assert_allclose(halves.z_loss, np.full(2, whole.z_loss), rtol=1e-6)
    np.testing.assert_array_equal(halves.statistics.counts_KE[0], whole.statistics.counts_KE)


def test_gradient_descent_on_the_balance_loss_balances_the_load():
    """The router sends almost all tokens to expert 0 at first."""
    x_TD = jax.random.normal(jax.random.key(0), (200, 8)).at[:, 0].set(1)
    start = (0.3 * jax.random.normal(jax.random.key(1), (8, 4))).at[0, 0].set(3)
    valid_T = jnp.ones((200,), bool)

    def routed(w):
        return router.route(x_TD, valid_T, router.RouterWeights(w), RouterOptions(), WIDTHS, "cpu")

    @jax.jit
    def descend(w):
        return jax.lax.fori_loop(
            0, 300, lambda i, w: w - 0.5 * jax.grad(lambda w: routed(w).balance_loss)(w), w
        )

    def load(w):
        counts = jax.jit(routed)(w).statistics.counts_KE.sum(axis=0)
        return float(counts.max() / counts.mean())

    assert load(start) > 1.8 and load(descend(start)) < 1.25


@pytest.mark.parametrize("experts", [1, 4, 7])
def test_top_k_in_rounds_equals_jax_lax(experts):
    """Ties, signed zeros, infinities and NaN of either sign, for every k."""
    rng = np.random.default_rng(experts)
    special = np.array(
        [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, np.copysign(np.nan, -1), 1e-40], np.float32
    )
    rows = [np.full(experts, value, np.float32) for value in special]
    rows += [rng.choice(special, experts) for _ in range(200)] + [
        *rng.normal(size=(20, experts)).astype(np.float32)
    ]
    logits_TE = jnp.asarray(np.stack(rows))
    for k in range(1, experts + 1):
        ids_TK = jax.jit(lambda x, k=k: router.top_k_ids_in_rounds(x, k))(logits_TE)
        np.testing.assert_array_equal(ids_TK, jax.lax.top_k(logits_TE, k)[1])


@pytest.mark.parametrize(
    "chip, experts, top_k, rounds",
    [
        ("cpu", 8, 2, True),
        ("cpu", 64, 2, True),
        ("cpu", 64, 8, False),
        ("h100", 64, 8, True),
        ("gpu", 64, 8, True),
        ("h100", 64, 9, False),
        ("v5e", 8, 2, False),
    ],
)
def test_top_k_in_rounds_is_used_where_it_is_fast(chip, experts, top_k, rounds):
    program = jax.make_jaxpr(lambda x: router.top_k_ids(x, top_k, chip))(jnp.zeros((3, experts)))
    assert ("top_k" not in str(program)) == rounds
