"""Pools, gates, zero and copy experts, biases, capacities equal a loop over tokens in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.moe import dispatch
from modse_jax.moe.layer import MoELayer
from modse_jax.moe.layer_options import GATES, ExpertOptions, Pool, RouterOptions
from modse_jax.runtime import sharding
from tests.helpers import numpy_layer, numpy_reference

DIM = 6
# Unequal widths, a zero expert (3), a copy expert (5), and for three pools an odd one out.
LAYERS = {
    "one pool": ((4, 1, 7, 0, 3, 0), ((6, 2),)),
    "two pools": ((4, 1, 7, 0, 3, 0), ((4, 1), (2, 2))),
    "three pools": ((4, 1, 7, 0, 3, 0, 5, 2), ((3, 1), (3, 2), (2, 1))),
}
COPY = (5,)


def build_layer(widths, pools, gate="softmax_top_k", mesh=None, experts=None, **router):
    options = RouterOptions(pools=tuple(Pool(*pool) for pool in pools), gate=gate, **router)
    experts = ExpertOptions(backend="reference", copy_experts=COPY, **(experts or {}))
    return MoELayer(DIM, widths, options, experts, mesh=mesh, rngs=nnx.Rngs(params=3))


def make_inputs(rows=2, length=5, padding=2):
    """Returns (x_BLD, valid_BL, bias of 8 experts); the padding at the end of rows is NaN."""
    rng = np.random.default_rng(7)
    x_BLD = rng.standard_normal((rows, length, DIM)).astype(np.float32)
    valid_BL = np.ones((rows, length), bool)
    if padding:
        valid_BL[-1, -padding:] = False
    x_BLD[~valid_BL] = np.nan
    return x_BLD, valid_BL, rng.normal(0, 0.3, 8).astype(np.float32)


def make_weights(layer):
    """Returns the weights in float64, with large router logits: no choice is a near tie."""
    names = ("w_gate", "w_up", "w_down", "router_gate")
    layer.router_gate[...] *= 3
    return {name: np.float64(getattr(layer, name)[...]) for name in names}


@functools.partial(jax.jit, static_argnums=0)
def layer_and_gradients(graph, state, x_BLD, valid_BL, bias_E, target_BLD):
    """Returns ((scalar, LayerOutput), gradients) by weights and input."""

    def scalar(state, x_BLD):
        output = nnx.merge(graph, state)(x_BLD, valid_BL, bias_E)
        y_BLD = jnp.where(valid_BL[:, :, None], output.y_BLD, 0)
        losses = 0.7 * output.balance_loss + 0.3 * output.z_loss + 0.2 * output.width_penalty
        return jnp.sum(y_BLD * target_BLD) + losses, output

    return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(state, x_BLD)


def oracle(arrays, widths, pools, valid_BL, gate, bias=None, groups=None, **options):
    """Returns the LayerResult of the oracle for arrays with a key "x"."""
    tokens = valid_BL.size
    defaults = dict(factor=0.0, order="choice", scale=1.0, over_choices="sum")
    return numpy_layer.layer(
        arrays["x"].reshape(-1, DIM),
        arrays,
        widths,
        pools,
        valid_BL.reshape(-1),
        dict(
            defaults | options,
            gate=gate,
            bias=bias,
            copies=COPY,
            groups=groups or [range(tokens)],
        ),
    )


def assert_layer_matches(layer, widths, pools, gate, bias_E=None, **options):
    """Compares output, losses, drops, and gradients along two random directions."""
    arrays = make_weights(layer)
    x_BLD, valid_BL, _ = make_inputs()
    rng = np.random.default_rng(1)
    target_BLD = rng.standard_normal(x_BLD.shape)
    graph, state = nnx.split(layer)
    (_, output), (d_state, dx_BLD) = layer_and_gradients(
        graph, state, x_BLD, valid_BL, bias_E, jnp.float32(target_BLD)
    )
    arrays["x"] = np.float64(np.where(valid_BL[:, :, None], x_BLD, 0))
    bias = None if bias_E is None else np.float64(bias_E)

    def run_oracle(arrays):
        return oracle(arrays, widths, pools, valid_BL, gate, bias, **options)

    expected = run_oracle(arrays)
    y_TD = np.where(valid_BL[:, :, None], output.y_BLD, 0).reshape(-1, DIM)
    np.testing.assert_allclose(y_TD, expected.y_TD, atol=2e-5)
    for name in ("balance_loss", "z_loss", "width_penalty"):
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert int(output.statistics.dropped_P.sum()) == expected.dropped

    def total(arrays):
        found = run_oracle(arrays)
        y_sum = (found.y_TD * target_BLD.reshape(-1, DIM)).sum()
        losses = 0.7 * found.balance_loss + 0.3 * found.z_loss + 0.2 * found.width_penalty
        return y_sum + losses

    computed = {name: np.float64(d_state[name][...]) for name in arrays if name != "x"}
    computed["x"] = np.float64(dx_BLD)
    assert np.all(computed["x"][~valid_BL] == 0)
    for _ in range(2):
        direction = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}
        direction["x"] = np.where(valid_BL[:, :, None], direction["x"], 0)
        slope = numpy_reference.directional_derivative(total, arrays, direction, 1e-6)
        found = sum((computed[name] * direction[name]).sum() for name in arrays)
        assert found == pytest.approx(slope, rel=2e-4, abs=2e-4)
    return output


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", LAYERS)
def test_pools_and_gates_match_the_oracle(form, gate):
    widths, pools = LAYERS[form]
    layer = build_layer(widths, pools, gate)
    output = assert_layer_matches(layer, widths, pools, gate)
    rows_E = np.asarray(output.statistics.counts_KE).sum(axis=0)
    assert rows_E.sum() == 8 * sum(top_k for _, top_k in pools)


@pytest.mark.parametrize("gate", ["softmax_top_k", "sigmoid_renormalized"])
def test_a_bias_changes_choices_but_not_gates(gate):
    """The bias leaves expert 0 without tokens, which also has hidden units."""
    widths, pools = LAYERS["three pools"]
    layer = build_layer(widths, pools, gate, gate_scale=2.5)
    _, _, bias_E = make_inputs()
    bias_E[0] = -50
    output = assert_layer_matches(layer, widths, pools, gate, bias_E, scale=2.5)
    assert np.asarray(output.statistics.counts_KE)[:, 0].sum() == 0


def test_top_one_and_all_experts_match_the_oracle():
    widths = (4, 1, 7, 0, 3, 0)
    for pools in (((6, 1),), ((6, 6),)):
        assert_layer_matches(build_layer(widths, pools), widths, pools, "softmax_top_k")


def test_losses_of_each_sequence_and_means_over_choices_match_the_oracle():
    widths, pools = LAYERS["two pools"]
    layer = build_layer(
        widths, pools, balance_loss_scope="sequence", balance_loss_over_choices="mean"
    )
    groups = [range(5), range(5, 10)]
    assert_layer_matches(layer, widths, pools, "softmax_top_k", groups=groups, over_choices="mean")


@pytest.mark.parametrize("order", ["choice", "token"])
@pytest.mark.parametrize("form", ["one pool", "two pools"])
def test_drops_over_capacity_match_the_oracle(form, order):
    widths, pools = LAYERS[form]
    experts = dict(capacity_factor=0.6, capacity_order=order)
    layer = build_layer(widths, pools, experts=experts)
    output = assert_layer_matches(layer, widths, pools, "softmax_top_k", factor=0.6, order=order)
    assert int(output.statistics.dropped_P.sum()) > 0


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


def test_a_factor_of_experts_per_choice_equals_dropless_bit_for_bit():
    widths, pools = LAYERS["two pools"]
    x_BLD, valid_BL, _ = make_inputs()
    results = []
    for factor in (0.0, 4.0):  # 4 is the larger n / k
        layer = build_layer(widths, pools, experts=dict(capacity_factor=factor))
        graph, state = nnx.split(layer)
        (_, output), gradients = layer_and_gradients(
            graph, state, x_BLD, valid_BL, None, jnp.ones_like(x_BLD)
        )
        results.append((output, gradients))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2), (1, 1, 4)])
@pytest.mark.parametrize("placement", ["whole", "split"])
def test_every_mesh_equals_one_device(sizes, placement):
    """Two pools with zero and copy experts; both exchanges for whole experts."""
    widths, pools = (8, 4, 4, 0, 8, 0, 8), ((4, 1), (3, 2))
    exchanges = ("gather", "all_to_all") if placement == "whole" else ("gather",)
    x_BLD, valid_BL, bias_E = make_inputs(rows=8, length=4)
    results = []
    for mesh_sizes, exchange in [(None, "gather"), *((sizes, name) for name in exchanges)]:
        mesh = None
        if mesh_sizes:
            mesh = sharding.make_mesh(jax.devices()[: math.prod(mesh_sizes)], mesh_sizes)
        experts = dict(placement=placement, exchange=exchange)
        layer = build_layer(widths, pools, mesh=mesh, experts=experts)
        output = nnx.jit(lambda layer, *inputs: layer(*inputs))(layer, x_BLD, valid_BL, bias_E[:7])
        results.append(jax.device_get(output))
    for other in results[1:]:
        y_BLD = np.where(valid_BL[:, :, None], other.y_BLD - results[0].y_BLD, 0)
        assert np.abs(y_BLD).max() < 2e-6
        np.testing.assert_array_equal(other.statistics.counts_KE, results[0].statistics.counts_KE)
        np.testing.assert_allclose(other.balance_loss, results[0].balance_loss, rtol=1e-5)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'tanh' is unknown; choose one of"):
        RouterOptions(gate="tanh")
    with pytest.raises(ValueError, match="5 experts, the layer has 6"):
        build_layer((4, 1, 7, 0, 3, 0), ((3, 1), (2, 1)))
    with pytest.raises(ValueError, match="top_k=3 must be between 1 and the number of experts, 2"):
        build_layer((4, 1, 7, 0, 3, 0), ((4, 1), (2, 3)))
    with pytest.raises(ValueError, match="copy"):
        MoELayer(DIM, (4, 3), experts=ExpertOptions(copy_experts=(1,)), rngs=nnx.Rngs(params=0))


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


def test_no_array_has_a_place_for_every_token_choice_and_expert():
    tokens, experts, top_k = 512, 1024, 16
    layer = nnx.eval_shape(
        lambda: MoELayer(8, (1,) * experts, RouterOptions(top_k=top_k), rngs=nnx.Rngs(params=0))
    )
    graph, state = nnx.split(layer)

    def loss(state, x_BLD):
        output = nnx.merge(graph, state)(x_BLD)
        return jnp.sum(output.y_BLD) + output.balance_loss + output.z_loss

    x_BLD = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(state, x_BLD)
    assert tokens * experts <= largest_array(jaxpr.jaxpr) < tokens * top_k * experts / 4
