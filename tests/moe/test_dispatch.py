"""Sorting routed tokens by expert and back: order, drops, gradients without scatters."""

import jax
import jax.numpy as jnp
import numpy as np

from modse_jax.moe import dispatch
from modse_jax.moe.layer_options import Pool


def routing(T=37, K=3, E=5, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    return (
        jnp.asarray(ids),
        jnp.asarray(rng.random(T) < 0.8),
        jnp.asarray(rng.random((T, K)), jnp.float32),
    )


def test_rows_are_sorted_stably_by_expert_with_padding_rows_last():
    ids_TK, valid_T, _ = routing()
    plan = dispatch.plan_dispatch(ids_TK, valid_T, 5, "cpu")
    ids = np.where(np.asarray(valid_T)[:, None], ids_TK, 5).reshape(-1)
    np.testing.assert_array_equal(plan.order_N, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(plan.order_N[plan.inverse_N], np.arange(ids.size))
    np.testing.assert_array_equal(plan.rows_E, np.bincount(ids, minlength=6)[:5])
    assert int(plan.dropped_K.sum()) == 0


def test_stable_argsort_falls_back_if_its_key_would_overflow():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 7, 1000), jnp.int32)
    np.testing.assert_array_equal(
        dispatch.stable_argsort(ids, 7), dispatch.stable_argsort(ids, 2**30)
    )


def test_capacity_keeps_first_choices_of_early_tokens_and_counts_the_rest():
    ids_TK, valid_T, _ = routing()
    capacity = dispatch.Capacity(jnp.full((3,), 9), "choice")
    plan = dispatch.plan_dispatch(ids_TK, valid_T, 5, "cpu", capacity)
    kept, seen = np.zeros(ids_TK.shape, bool), np.zeros(5, int)
    for k in range(3):
        for t in np.flatnonzero(valid_T):
            kept[t, k] = seen[ids_TK[t, k]] < 9
            seen[ids_TK[t, k]] += 1
    assert int(plan.dropped_K.sum()) == int(valid_T.sum()) * 3 - kept.sum() > 0
    np.testing.assert_array_equal(plan.rows_E, np.bincount(np.asarray(ids_TK)[kept], minlength=5))
    owned = np.asarray(plan.order_N)[: int(plan.rows_E.sum())]
    np.testing.assert_array_equal(np.sort(owned), np.flatnonzero(kept.reshape(-1)))


def test_capacity_rounds_up():
    assert dispatch.expert_capacity(100, Pool(8, 2), 1.25) == 32
    assert dispatch.expert_capacity(96, Pool(8, 2), 1.25) == 30


def test_dispatch_and_combine_equal_a_loop_with_gradients():
    ids_TK, valid_T, gates_TK = routing()
    plan = dispatch.plan_dispatch(ids_TK, valid_T, 5, "cpu")
    x_TD = jax.random.normal(jax.random.key(0), (37, 4))
    scale_N1 = jax.random.normal(jax.random.key(1), (37 * 3, 1)).at[int(plan.rows_E.sum()) :].set(0)

    def fast(x_TD, gates_TK):
        return dispatch.combine(dispatch.dispatch(x_TD, plan) * scale_N1, gates_TK, plan)

    def slow(x_TD, gates_TK):
        rows = x_TD[plan.order_N // 3] * scale_N1 * gates_TK.reshape(-1)[plan.order_N][:, None]
        return jnp.zeros_like(x_TD).at[plan.order_N // 3].add(rows)

    def both(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1)))(
            x_TD, gates_TK
        )

    for a, b in zip(jax.tree.leaves(both(fast)), jax.tree.leaves(both(slow))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_scatter_of_rows_forward_or_backward():
    """Only the int32 inverse permutation is a scatter. Rows are gathered, deterministically."""
    ids_TK, valid_T, gates_TK = routing()

    def loss(x_TD, gates_TK):
        plan = dispatch.plan_dispatch(ids_TK, valid_T, 5, "cpu")
        return jnp.sum(dispatch.combine(dispatch.dispatch(x_TD, plan), gates_TK, plan) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.ones((37, 4)), gates_TK).as_text()
    assert text.count('"stablehlo.scatter"(') == 1
