"""The three forms of reading, placing and counting chosen experts give the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.moe import chosen_experts

T, K, E, GROUPS = 24, 3, 9, 4


def make_case():
    """Returns (values_TE, ids_TK, values_TK) with different experts for every token."""
    rng = np.random.default_rng(0)
    ids_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    return rng.normal(size=(T, E)).astype(np.float32), ids_TK, rng.normal(size=(T, K))


def run_form(form):
    """Returns what a form reads and places, with gradients, and what it counts."""
    values_TE, ids_TK, values_TK = make_case()
    counted_TK = np.where(np.arange(T)[:, None] % 5 == 0, E, ids_TK)  # E is not counted

    def read(values_TE):
        return jnp.sum(jnp.sin(chosen_experts.select(values_TE, ids_TK, form)))

    def place(values_TK):
        return jnp.sum(jnp.sin(chosen_experts.place(values_TK, ids_TK, E, form)))

    @jax.jit
    def run(values_TE, values_TK):
        return (
            chosen_experts.select(values_TE, ids_TK, form),
            chosen_experts.place(values_TK, ids_TK, E, form),
            jax.grad(read)(values_TE),
            jax.grad(place)(values_TK),
            chosen_experts.count(counted_TK, E, form),
            chosen_experts.count(counted_TK, E, form, GROUPS),
        )

    return run(values_TE, jnp.asarray(values_TK, jnp.float32))


@pytest.mark.parametrize("form", chosen_experts.FORMS)
def test_every_form_equals_a_loop(form):
    values_TE, ids_TK, values_TK = make_case()
    read, placed, d_read, d_placed, counts, group_counts = map(np.asarray, run_form(form))
    for t in range(T):
        np.testing.assert_array_equal(read[t], values_TE[t, ids_TK[t]])
        others = np.setdiff1d(np.arange(E), ids_TK[t])
        np.testing.assert_array_equal(placed[t, ids_TK[t]], np.float32(values_TK[t]))
        assert not placed[t, others].any() and not d_read[t, others].any()
        np.testing.assert_allclose(d_read[t, ids_TK[t]], np.cos(read[t]), rtol=1e-6)
    np.testing.assert_allclose(d_placed, np.cos(values_TK), rtol=1e-5)
    expected = np.zeros((GROUPS, K, E), int)
    for t in range(T):
        for k in range(K):
            expected[t * GROUPS // T, k, ids_TK[t, k]] += t % 5 > 0
    np.testing.assert_array_equal(group_counts, expected)
    np.testing.assert_array_equal(counts[0], expected.sum(axis=0))


def test_all_forms_give_the_same_bits():
    results = [run_form(form) for form in chosen_experts.FORMS]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.parametrize(
    "num_experts, top_k, chip, form",
    [
        (64, 2, "cpu", "masks"),
        (64, 8, "cpu", "gather"),
        (64, 8, "h100", "masks"),
        (1024, 16, "h100", "gather"),
        (64, 8, "v5e", "masks"),
        (1024, 16, "v5e", "per_choice"),
    ],
)
def test_the_form_depends_on_the_comparisons_per_token(num_experts, top_k, chip, form):
    assert chosen_experts.choose_form(num_experts, top_k, chip) == form
