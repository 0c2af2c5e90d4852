"""The layer equals a loop over tokens in float64: outputs, losses and gradients of every option."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.moe import chosen_experts, dispatch, expert_placement
from modse_jax.moe.layer import MoELayer
from modse_jax.moe.layer_options import GATES, ExpertOptions, Pool, RouterOptions
from modse_jax.runtime import sharding
from tests.helpers import numpy_reference

DIM, SEQUENCES, LENGTH = 8, 3, 9
TOKENS = SEQUENCES * LENGTH

# Unequal widths, among them experts without hidden units, of which some copy the input. In every
# list of pools, one pool routes to all its experts or to a single one.
ONE_POOL = dict(widths=(5, 3, 0, 4, 2, 0), pools=((6, 2),), copy_experts=(2,))
TWO_POOLS = dict(widths=(6, 2, 4, 3, 0, 1), pools=((2, 1), (4, 3)), copy_experts=())
THREE_POOLS = dict(
    widths=(3, 0, 2, 2, 5, 1, 1, 4, 0), pools=((4, 2), (2, 2), (3, 1)), copy_experts=(8,)
)
STRUCTURES = {"1": ONE_POOL, "2": TWO_POOLS, "3": THREE_POOLS}

# Every other option takes each of its values beside several gates and structures.
VARIANTS = (
    dict(),
    dict(router_noise="learned", balance_loss_count="argmax", biased=True),
    dict(balance_loss_scope="sequence", width_penalty_scale="max", gate_scale=2.5),
    dict(balance_loss_over_choices="mean", capacity_factor="1.0", backend="blocked"),
    dict(capacity_factor="0.7", capacity_order="token", balance_loss_scope="sequence"),
    dict(biased=True, capacity_factor="0.8", balance_loss_over_choices="mean"),
    dict(balance_loss_scope="device", balance_loss_count="argmax", gate_scale=0.5),
)
CASES = [
    (structure, gate, VARIANTS[(2 * i + j) % len(VARIANTS)])
    for i, structure in enumerate(STRUCTURES)
    for j, gate in enumerate(GATES)
]


def build_layer(
    widths=(5, 3, 4),
    pools=((3, 2),),
    copy_experts=(),
    mesh=None,
    capacity_factor="0",
    capacity_order="choice",
    backend="reference",
    placement="whole",
    exchange="auto",
    **router,
):
    """Returns a layer. A capacity factor is a decimal number, as in numpy_reference."""
    experts = ExpertOptions(
        backend=backend,
        placement=placement,
        exchange=exchange,
        copy_experts=copy_experts,
        capacity_factor=float(capacity_factor),
        capacity_order=capacity_order,
    )
    options = RouterOptions(pools=tuple(Pool(*pool) for pool in pools), **router)
    return MoELayer(DIM, widths, options, experts, mesh=mesh, rngs=nnx.Rngs(0))


def reference_options(gate, widths, pools, copy_experts, **options):
    """Returns the options of numpy_reference for the same layer."""
    renamed = dict(balance_loss_count="count", balance_loss_over_choices="over_choices")
    scope = options.pop("balance_loss_scope", "batch")
    return numpy_reference.Options(
        widths=widths,
        pools=tuple(numpy_reference.Pool(*pool) for pool in pools),
        gate=gate,
        copy_experts=copy_experts,
        sequences=SEQUENCES if scope == "sequence" else 1,
        **{
            renamed.get(name, name): value
            for name, value in options.items()
            if name not in ("router_noise", "backend")
        },
    )


def make_arrays(layer, rng):
    """Returns float64 weights and an input. Expert 0 is never chosen."""
    state = nnx.to_pure_dict(nnx.split(layer)[1])
    arrays = {name: rng.normal(size=leaf.shape) / 2 for name, leaf in state.items()}
    x = rng.normal(size=(TOKENS, DIM))
    x[:, 0] = 1
    arrays["router_gate"][0, 0] -= 12
    return {**arrays, "x": x}


@pytest.mark.parametrize("structure, gate, variant", CASES)
def test_layer_equals_the_numpy_loop(structure, gate, variant):
    rng = np.random.default_rng(3)
    variant = dict(variant)
    biased = variant.pop("biased", False)
    layer = build_layer(gate=gate, **STRUCTURES[structure], **variant)
    options = reference_options(gate, **STRUCTURES[structure], **variant)
    arrays = make_arrays(layer, rng)
    valid_T = rng.random(TOKENS) < 0.8
    bias_E = 0.3 * np.abs(rng.normal(size=len(layer.widths))) if biased else None
    if biased:
        bias_E[0] = -1
    dy_TD = rng.normal(size=(TOKENS, DIM))

    want = numpy_reference.layer(arrays["x"], arrays, options, valid_T, bias_E)
    (_, got), grads = outputs_and_gradients(layer, arrays, valid_T, bias_E, dy_TD)
    np.testing.assert_allclose(got.y_BLD.reshape(TOKENS, DIM), want.y_TD.real, atol=2e-5)
    for name in ("balance_loss", "z_loss", "width_penalty"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name).real, rtol=2e-5)
    np.testing.assert_array_equal(got.statistics.dropped_P, want.dropped_P)
    assert got.statistics.counts_KE.sum(axis=0)[0] == 0  # the expert that is never chosen

    def total(arrays):
        out = numpy_reference.layer(arrays["x"], arrays, options, valid_T, bias_E)
        return weigh(out.y_TD, out, dy_TD)

    for name in arrays:  # one array at a time, so that a wrong gradient is named
        direction = {k: rng.normal(size=v.shape) * (k == name) for k, v in arrays.items()}
        expected = numpy_reference.complex_step_derivative(total, arrays, direction)
        computed = float(np.sum(np.asarray(grads[name], np.float64) * direction[name]))
        norm = np.linalg.norm(grads[name]) * np.linalg.norm(direction[name])
        assert abs(computed - expected) <= 2e-5 * max(norm, 1), name


def outputs_and_gradients(layer, arrays, valid_T, bias_E, dy_TD):
    """Returns ((scalar, LayerOutput), gradients of the scalar). Padding of the input is NaN."""
    graph, _ = nnx.split(layer)

    def scalar(arrays):
        arrays = dict(arrays)
        x_TD = jnp.where(valid_T[:, None], arrays.pop("x"), jnp.nan)
        shape = (SEQUENCES, LENGTH, DIM)
        bias = None if bias_E is None else jnp.asarray(bias_E, jnp.float32)
        out = nnx.merge(graph, arrays)(x_TD.reshape(shape), valid_T.reshape(shape[:2]), bias)
        return weigh(out.y_BLD.reshape(TOKENS, DIM), out, jnp.asarray(dy_TD, jnp.float32)), out

    valid_T = jnp.asarray(valid_T)
    inputs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    return jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)


def weigh(y_TD, out, dy_TD):
    """Returns a scalar of all outputs, so that one derivative checks every path."""
    return (y_TD * dy_TD).sum() + 3 * out.balance_loss + 2 * out.z_loss + out.width_penalty


def test_every_variant_is_checked_with_several_gates():
    used = [tuple(variant.items()) for _, _, variant in CASES]
    assert len(CASES) == 3 * len(GATES)
    assert min(used.count(tuple(variant.items())) for variant in VARIANTS) >= 2


@pytest.mark.parametrize("order", ["choice", "token"])
def test_a_capacity_that_drops_nothing_equals_dropless_bit_for_bit(order):
    """Every pool has n / k = 2, so a factor of 2 gives every expert room for all tokens."""
    rng = np.random.default_rng(0)
    structure = dict(widths=(3, 0, 2, 2, 5, 1), pools=((4, 2), (2, 1)), copy_experts=(1,))
    dropless = build_layer(backend="blocked", **structure)
    full = build_layer(backend="blocked", capacity_factor="2", capacity_order=order, **structure)
    tight = build_layer(backend="blocked", capacity_factor="1", capacity_order=order, **structure)
    arrays = make_arrays(dropless, rng)
    valid_T = rng.random(TOKENS) < 0.8
    dy_TD = rng.normal(size=(TOKENS, DIM))
    results = [
        outputs_and_gradients(layer, arrays, valid_T, None, dy_TD)
        for layer in (dropless, full, tight)
    ]
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1])):
        np.testing.assert_array_equal(a, b)
    assert results[2][0][1].statistics.dropped_P.sum() > 0
    assert results[2][0][0] != results[0][0][0]


def test_uniform_gates_are_the_same_for_all_chosen_experts():
    """Pool i gives each of its k_i experts 1 / k_i, and the mean over pools gives 1 / sum(k)."""
    layer = build_layer(gate="uniform", **THREE_POOLS)
    gates_BLK, ids_BLK = layer.choose_experts(jax.random.normal(jax.random.key(0), (2, 5, DIM)))
    np.testing.assert_array_equal(gates_BLK, np.full((2, 5, 5), np.float32(1 / 5)))
    assert ids_BLK[..., :2].max() < 4 <= ids_BLK[..., 2:4].min() and ids_BLK[..., 4].min() >= 6


def test_copy_experts_alone_return_the_input():
    """Both choices of every token are the copy experts, whose gates sum to 1."""
    layer = build_layer(widths=(4, 0, 0), pools=((3, 2),), copy_experts=(1, 2))
    layer.router_gate[...] = (
        jnp.zeros_like(layer.router_gate[...]).at[0].set(jnp.array([-99.0, 0, 0]))
    )
    x_BLD = jax.random.normal(jax.random.key(0), (1, 6, DIM)).at[..., 0].set(1)
    np.testing.assert_allclose(layer(x_BLD).y_BLD, x_BLD, rtol=1e-6)


@pytest.mark.parametrize(
    "order, kept",
    [
        ("choice", [[1, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]),
        ("token", [[1, 1], [1, 1], [1, 1], [0, 1], [0, 1], [0, 1]]),
    ],
)
def test_drops_equal_a_count_by_hand(order, kept):
    """Expert 0 has room for 3 of its 6 tokens, with and without padding in between."""
    ids_TK = np.array([(1, 0), (1, 0), (2, 0), (0, 1), (0, 3), (0, 2)], np.int32)
    kept = np.array(kept, bool)
    for repeats in (1, 2):  # with 2, every second token is padding
        valid_T = np.tile([True, False][:repeats], 6)
        ids = np.repeat(ids_TK, repeats, axis=0)
        limit_K = dispatch.expert_capacities(jnp.asarray(valid_T), [Pool(4, 2)], 1.0)
        capacity = dispatch.Capacity(limit_K, order)
        plan = dispatch.plan_dispatch(jnp.asarray(ids), jnp.asarray(valid_T), 4, "cpu", capacity)
        position_TK = np.asarray(plan.inverse_N).reshape(-1, 2)[valid_T]
        np.testing.assert_array_equal(position_TK < int(plan.rows_E.sum()), kept)
        assert int(plan.dropped_K.sum()) == 3


def test_capacity_is_the_exact_ceiling():
    """1.1 * 100 / 5 is 22, but a product of floats exceeds it."""
    assert dispatch.expert_capacity(100, Pool(5, 1), 1.1) == 22
    assert math.ceil(1.1 * 100 * 1 / 5) == 23
    table = dispatch.expert_capacities(jnp.ones((100,), bool), [Pool(5, 1)], 1.1)
    assert table.tolist() == [22]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: build_layer(pools=((2, 1),)), "have 2 experts, the layer has 3"),
        (lambda: build_layer(pools=((3, 4),)), "top_k=4 must be between 1 and .* experts, 3"),
        (lambda: build_layer(copy_experts=(1,)), "copy expert 1 has width 3"),
        (lambda: build_layer(gate="softmax"), "gate='softmax' is unknown; choose one of"),
        (lambda: build_layer(capacity_order="random"), "capacity_order='random' is unknown"),
        (
            lambda: dataclasses.replace(
                ExpertOptions(), exchange="all_to_all", capacity_factor=1.0
            ),
            "needs whole experts and no capacity",
        ),
        *(
            (
                functools.partial(ExpertOptions, capacity_factor=factor),
                rf"capacity_factor={re.escape(str(factor))} must be 0, .* or from 0.00001 to 10000",
            )
            for factor in (-1.0, 1e-9, 1e30, float("nan"))
        ),
    ],
)
def test_impossible_layers_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def largest_array(jaxpr) -> int:
    """Returns the number of elements of the largest array in a jaxpr and those inside it."""
    largest = 0
    for equation in jaxpr.eqns:
        sizes = [math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")]
        largest = max(largest, *sizes, 0)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)  # a closed jaxpr holds an open one
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize(
    "form, is_sparse", [("gather", True), ("per_choice", True), ("masks", False)]
)
def test_no_array_has_an_element_for_every_token_choice_and_expert(form, is_sparse, monkeypatch):
    """With 1,024 experts, forward and backward; the masks of few experts show that it can fail."""
    tokens, experts, top_k = 64, 1024, 16
    monkeypatch.setattr(chosen_experts, "choose_form", lambda *_: form)
    layer = nnx.eval_shape(
        lambda: MoELayer(8, (1,) * experts, RouterOptions(top_k=top_k), rngs=nnx.Rngs(params=0))
    )
    graph, state = nnx.split(layer)

    def loss(state, x_BLD):
        output = nnx.merge(graph, state)(x_BLD)
        return jnp.sum(output.y_BLD) + output.balance_loss + output.z_loss

    x_BLD = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(state, x_BLD)
    assert tokens * experts <= largest_array(jaxpr.jaxpr)
    assert (largest_array(jaxpr.jaxpr) < tokens * top_k * experts / 4) == is_sparse


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 1, 4), dict(exchange="gather", balance_loss_scope="sequence")),
        ((2, 1, 4), dict(exchange="all_to_all", balance_loss_scope="sequence")),
        ((2, 2, 2), dict(placement="split", balance_loss_scope="sequence")),
        ((1, 1, 4), dict(capacity_factor="0.9", capacity_order="token")),
    ],
)
def test_every_mesh_equals_one_device(sizes, options):
    """Two pools with zero and copy experts, a bias, and padding of NaN. Gradients too."""
    structure = dict(widths=(8, 4, 4, 0, 8, 0, 8), pools=((4, 1), (3, 2)), copy_experts=(5,))
    mesh = sharding.make_mesh(jax.devices()[: math.prod(sizes)], sizes)
    options = dict(options, gate="sigmoid_renormalized", width_penalty_scale="max")
    layer = build_layer(mesh=mesh, **structure, **options)
    single = build_layer(**structure, **options)
    (total, output), grads = run_on_mesh(layer)
    (expected_total, expected_output), expected_grads = run_on_mesh(single)
    assert float(total) == pytest.approx(float(expected_total), rel=1e-5)
    for name in ("counts_KE", "dropped_P", "tokens"):
        got = getattr(output.statistics, name)
        np.testing.assert_array_equal(got, getattr(expected_output.statistics, name))
    assert (output.statistics.dropped_P.sum() > 0) == ("capacity_factor" in options)
    np.testing.assert_allclose(output.y_BLD, expected_output.y_BLD, atol=5e-6)
    order = np.array(expert_placement.hidden_unit_order(layer.widths, layer.placement))
    hidden_axes = dict(w_gate=1, w_up=1, w_down=0)
    for name, expected in expected_grads.items():
        if name in hidden_axes:
            expected = np.take(np.asarray(expected), order, axis=hidden_axes[name])
        np.testing.assert_allclose(grads[name], expected, atol=2e-5, err_msg=name)


def run_on_mesh(layer):
    """Returns ((scalar, LayerOutput), gradients) of 8 sequences of 6 tokens."""
    rng = np.random.default_rng(2)
    x_BLD, dy_BLD = jnp.asarray(rng.normal(size=(2, 8, 6, DIM)), jnp.float32)
    valid_BL = jnp.asarray(rng.random((8, 6)) < 0.8)
    bias_E = jnp.asarray(0.2 * rng.normal(size=len(layer.widths)), jnp.float32)
    graph, state = nnx.split(layer)

    def scalar(arrays):
        arrays = dict(arrays)
        x = jnp.where(valid_BL[:, :, None], arrays.pop("x"), jnp.nan)
        out = nnx.merge(graph, arrays)(x, valid_BL, bias_E)
        return weigh(out.y_BLD, out, dy_BLD), out

    # Router logits are enlarged, so that no choice is a near tie.
    weights = {name: 2 * leaf for name, leaf in nnx.to_pure_dict(state).items()}
    return jax.jit(jax.value_and_grad(scalar, has_aux=True))({**weights, "x": x_BLD})
