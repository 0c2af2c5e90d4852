"""Attention: every implementation against the plain reference, and their selection."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.errors import UserError
from modse_jax.model import cpu_matmul
from modse_jax.model.attention import (
    blocked,
    cudnn_attention,
    masks,
    reference,
    rotary,
    selection,
    splash_attention,
)
from tests.helpers.configs import tiny_config


def test_grouped_query_heads_equal_repeated_key_heads():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 9, 6, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(2))
    mask = masks.packed_mask(jnp.array([[1] * 4 + [2] * 5, [1] * 8 + [0]]))
    whole = reference.attend(q, jnp.repeat(k, 3, 2), jnp.repeat(v, 3, 2), mask)
    np.testing.assert_allclose(reference.attend(q, k, v, mask), whole, atol=1e-5)


@pytest.mark.parametrize("save_weights", [False, True])
@pytest.mark.parametrize("heads,min_block", [(2, 128), (2, 4), (6, 3)])
def test_blocked_attention_equals_the_reference_with_gradients(heads, min_block, save_weights):
    """With shared key heads, packed documents, padding, and a last block that is not full."""
    rng = np.random.default_rng(0)
    q, dy = (jnp.asarray(rng.normal(size=(2, 11, heads, 4)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 11, 2, 4)), jnp.float32) for _ in range(2))
    segments = jnp.array([[1] * 4 + [2] * 7, [1] * 8 + [0] * 3])

    def values(f):
        return jax.jit(lambda *qkv: (f(*qkv), *jax.vjp(f, *qkv)[1](dy)))(q, k, v)

    fast = values(lambda q, k, v: blocked.attend_packed(q, k, v, segments, save_weights, min_block))
    slow = values(lambda q, k, v: reference.attend(q, k, v, masks.packed_mask(segments)))
    for a, b in zip(fast, slow):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("save_weights", [False, True])
def test_blocked_attention_in_bfloat16_is_within_its_rounding_error(save_weights):
    """Against float32; 1 / sqrt(12), the scale of heads of 12, is not representable in bfloat16."""
    q, k, v, dy = (
        jax.random.normal(jax.random.key(i), (2, 24, 2, 12), jnp.bfloat16) for i in range(4)
    )
    q, segments = 8 * q, jnp.ones((2, 24), jnp.int32)

    def values(f, *arrays):
        *qkv, dy = arrays
        return jax.jit(lambda: (f(*qkv), *jax.vjp(f, *qkv)[1](dy)))()

    got = values(
        lambda q, k, v: blocked.attend_packed(q, k, v, segments, save_weights, 8), q, k, v, dy
    )
    want = values(
        lambda q, k, v: reference.attend(q, k, v, masks.packed_mask(segments)),
        *(a.astype(jnp.float32) for a in (q, k, v, dy)),
    )
    for a, b in zip(got, want):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 1e-2 * np.linalg.norm(b)
    np.testing.assert_array_equal(
        blocked.scale_queries(q), (q.astype(jnp.float32) * 12**-0.5).astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("save_weights", [False, True])
@pytest.mark.parametrize("common", [0, 1, 5])
def test_bfloat16_gradients_do_not_depend_on_a_common_part_of_keys_and_values(common, save_weights):
    """Trained keys and values of a head have one, and the softmax does not depend on that of keys.

    With an `inner` from the rounded output, the error of dq is 1% for 1 and 29% for 5.
    """
    shape = (2, 128, 2, 64)
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v, dy = (jax.random.normal(key, shape) for key in keys[:4])
    k, v = (
        array + common * jax.random.normal(key, (1, 1, 2, 64))
        for array, key in zip((k, v), keys[4:])
    )
    arrays = [array.astype(jnp.bfloat16) for array in (q, k, v, dy)]
    segments = jnp.ones((2, 128), jnp.int32)

    def dq(attend, q, k, v, dy):
        return np.asarray(jax.jit(jax.vjp(lambda q: attend(q, k, v), q)[1])(dy)[0], np.float32)

    got = dq(lambda *qkv: blocked.attend_packed(*qkv, segments, save_weights, 32), *arrays)
    want = dq(
        lambda *qkv: reference.attend(*qkv, masks.packed_mask(segments)),
        *(array.astype(jnp.float32) for array in arrays),
    )
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < {0: 0.004, 1: 0.005, 5: 0.015}[common]


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_projections_equal_einsum_with_gradients_on_every_chip(dtype, tolerance):
    shapes = (2, 24, 8), (8, 12), (2, 24, 12)
    x, w, dy = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes))

    def output_and_gradients(product):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    want = output_and_gradients(lambda x, w: jnp.einsum("blx,xy->bly", x, w))
    for chip in ("cpu", "v5e"):
        got = jax.jit(
            lambda chip=chip: output_and_gradients(lambda x, w: cpu_matmul.matmul(x, w, chip))
        )()
        for a, b in zip(got, want):
            a, b = (np.asarray(c, np.float32) for c in (a, b))
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_reference_attention_equals_jax_nn():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(3))
    mask = masks.packed_mask(jnp.array([[1] * 4 + [2] * 5, [1] * 8 + [0]]))
    np.testing.assert_allclose(
        reference.attend(q, k, v, mask),
        jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]),
        atol=1e-5,
    )


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    config = tiny_config(model=dict(dim=8, num_heads=1)).model

    def rotate(x, position):
        return rotary.rotate(
            x, *(a[None, position : position + 1, None] for a in rotary.rotary_tables(41, config))
        )

    def score(i, j):
        return float(jnp.sum(rotate(q, i) * rotate(k, j)))

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


@pytest.mark.parametrize(
    "function, size",
    [
        (functools.partial(splash_attention.attend_splash, interpret=True), 64),
        (functools.partial(splash_attention.attend_splash, interpret=True), 128),
        (functools.partial(cudnn_attention.attend_cudnn, implementation="xla"), 128),
    ],
)
def test_attention_kernels_equal_blocked_attention_with_gradients(function, size):
    """Splash runs in interpret mode, and the call for cuDNN through XLA."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 256, 4, size), (2, 256, 2, size), (2, 256, 2, size))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes)]
    segments = jnp.asarray(
        np.array([[1] * 100 + [2] * 156, [1] * 30 + [2] * 150 + [0] * 76]), jnp.int32
    )
    weight = jax.random.normal(keys[3], shapes[0])

    def values(function):
        return jax.jit(
            jax.value_and_grad(lambda *a: jnp.sum(weight * function(*a)), argnums=(0, 1, 2))
        )(*arrays)

    got = values(lambda q, k, v: function(q, k, v, segments))
    want = values(lambda q, k, v: blocked.attend_packed(q, k, v, segments))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))


def test_auto_selects_splash_if_it_runs():
    for size in (64, 128):  # the heads of 700Mx8 and of 300Mx8
        assert selection.select_attention("auto", (1, 256, 2, size), "v5e", "bfloat16") == "splash"
    for shape, chip in (
        ((1, 250, 2, 128), "v5e"),
        ((1, 256, 2, 32), "v5e"),
        ((1, 256, 2, 128), "cpu"),
    ):
        assert selection.select_attention("auto", shape, chip, "float32") == "blocks"
        assert selection.select_attention("blocks", shape, "v5e", "float32") == "blocks"
        with pytest.raises(UserError, match="model.attention=splash needs a TPU"):
            selection.select_attention("splash", shape, chip, "float32")


def test_auto_selects_cudnn_if_it_runs(monkeypatch):
    shape = 1, 256, 2, 64
    monkeypatch.setattr(cudnn_attention, "cudnn_version", lambda: 0)
    assert selection.select_attention("auto", shape, "h100", "bfloat16") == "blocks"
    with pytest.raises(
        UserError, match=r"needs cuDNN, which jax does not find\. .* set model.attention=blocks"
    ):
        selection.select_attention("cudnn", shape, "h100", "bfloat16")
    monkeypatch.setattr(cudnn_attention, "cudnn_version", lambda: 92801)
    for kind in ("auto", "cudnn"):
        assert selection.select_attention(kind, shape, "h100", "bfloat16") == "cudnn"
    assert selection.select_attention("blocks", shape, "h100", "bfloat16") == "blocks"
    for length, size, chip, dtype in (
        (256, 64, "cpu", "bfloat16"),
        (256, 64, "h100", "float32"),
        (256, 60, "h100", "bfloat16"),
        (256, 256, "h100", "bfloat16"),
        (255, 64, "h100", "bfloat16"),
    ):
        with pytest.raises(UserError, match="model.attention=cudnn needs one of h100, h200"):
            selection.select_attention("cudnn", (1, length, 2, size), chip, dtype)
        assert selection.select_attention("auto", (1, length, 2, size), chip, dtype) == "blocks"


def test_missing_cudnn_has_version_0(monkeypatch):
    """Without a CUDA plugin, without the library, and without the private function of jax."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def missing():
        raise RuntimeError("cuDNN not found.")

    assert cudnn_attention.cudnn_version() == 0  # the test environment has none
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92801)
    assert cudnn_attention.cudnn_version() == 92801
    monkeypatch.setattr(cudnn, "check_cudnn_version", missing)
    assert cudnn_attention.cudnn_version() == 0
    monkeypatch.delattr(cudnn, "check_cudnn_version")
    assert cudnn_attention.cudnn_version() == 0


def test_cudnn_writes_no_gradient_of_the_mask(monkeypatch):
    """The backward call returns the gradients of queries, keys and values, and its workspace."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92801)
    asks = getattr(cudnn, "should_export_dbias", None)
    array = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    @jax.jit
    def gradients(q, k, v, segments):
        return jax.grad(
            lambda *a: jnp.sum(cudnn_attention.attend_cudnn(*a, segments).astype(jnp.float32)),
            (0, 1, 2),
        )(q, k, v)

    text = (
        gradients.trace(array, array, array, segments).lower(lowering_platforms=("cuda",)).as_text()
    )
    (results,) = re.findall(
        r"%\w+:(\d+) = stablehlo.custom_call @__cudnn\$fmhaScaleBiasSoftmaxBackward", text
    )
    assert int(results) == 4
    assert getattr(cudnn, "should_export_dbias", None) is asks


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_self_test_of_cudnn_finds_wrong_results_and_errors(heads):
    """XLA's attention passes. Mixed documents, a scaled gradient and an error do not."""
    by_xla = functools.partial(cudnn_attention.attend_cudnn, implementation="xla")
    shape = (*heads, 64)
    cudnn_attention.check_cudnn(shape, 96, by_xla)
    wrong = (
        "cuDNN's attention is wrong on this device: its output differs .* "
        "set --config.model.attention=blocks"
    )
    with pytest.raises(UserError, match=wrong):
        cudnn_attention.check_cudnn(shape, 96, lambda q, k, v, s: by_xla(q, k, v, jnp.ones_like(s)))

    @jax.custom_vjp
    def bad_gradient(q, k, v, s):
        return by_xla(q, k, v, s)

    def backward(saved, dout):
        dq, dk, dv = jax.vjp(lambda q, k, v: by_xla(q, k, v, saved[3]), *saved[:3])[1](dout)
        return dq, 1.1 * dk, dv, None

    bad_gradient.defvjp(lambda *a: (by_xla(*a), a), backward)
    with pytest.raises(UserError, match="gradient of keys differs"):
        cudnn_attention.check_cudnn(shape, 96, bad_gradient)
    with pytest.raises(
        UserError, match="does not run on this device .* set --config.model.attention=blocks"
    ):
        cudnn_attention.check_cudnn(shape, 96)  # cuDNN itself, on a CPU
