"""The decoder: causality, packing, padding, depth, sampling through the cache."""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax import mesh as meshes
from modse_jax.config import Mesh, UserError
from modse_jax.model import attention, sampling, transformer
from tests.conftest import tiny_config

CONFIG = tiny_config()


@functools.cache
def build(config=CONFIG):
    """(parameters, jitted forward pass)"""
    def parameters():
        params = nnx.to_pure_dict(nnx.split(transformer.build(config))[1])
        return jax.tree.map(lambda a: a * 3 if a.ndim > 2 else a, params)    # far from the residual

    graph, _ = transformer.build_abstract(config)
    return jax.jit(parameters)(), jax.jit(lambda p, t, s: nnx.merge(graph, p)(t, s))


def tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 259, shape), jnp.int32)


def test_no_token_sees_a_later_one():
    """The gradient of position 7's logits with respect to later inputs is exactly zero, to earlier ones it is not."""
    params, _ = build()
    graph, _ = transformer.build_abstract(CONFIG)

    def logit(noise_BLD):
        place = attention.packed_place(jnp.ones((1, 12), jnp.int32), CONFIG.model)
        x_BLD, _ = nnx.merge(graph, params)._run(noise_BLD, place, jnp.ones((1, 12), bool), None)
        return jnp.sum(x_BLD[0, 7] ** 3)

    grad_LD = jax.jit(jax.grad(logit))(jax.random.normal(jax.random.key(0), (1, 12, 16)))[0]
    assert float(jnp.abs(grad_LD[8:]).max()) == 0
    assert bool((jnp.abs(grad_LD[:8]).sum(axis=1) > 0).all())


def test_packed_documents_are_isolated():
    """Two documents in a row give the logits that each gives alone."""
    params, forward = build()
    a, b = tokens((1, 7), 1), tokens((1, 9), 2)
    packed = forward(params, jnp.concatenate((a, b), 1), jnp.array([[1] * 7 + [2] * 9]))[0]
    np.testing.assert_allclose(packed[:, :7], forward(params, a, jnp.ones((1, 7), jnp.int32))[0], atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:], forward(params, b, jnp.ones((1, 9), jnp.int32))[0], atol=2e-5)


def test_padding_changes_nothing_and_is_not_counted():
    params, forward = build()
    row = tokens((2, 10))
    padded = jnp.pad(row, ((0, 1), (0, 6)), constant_values=5)
    segments = jnp.pad(jnp.ones((2, 10), jnp.int32), ((0, 1), (0, 6)))
    logits, out = forward(params, row, jnp.ones((2, 10), jnp.int32))
    logits_padded, out_padded = forward(params, padded, segments)
    np.testing.assert_allclose(logits_padded[:2, :10], logits, atol=2e-5)
    np.testing.assert_allclose(out_padded.balance_loss, out.balance_loss, rtol=1e-5)
    np.testing.assert_array_equal(out_padded.statistics.counts_KE, out.statistics.counts_KE)
    assert bool(jnp.isfinite(logits_padded).all())


@pytest.mark.parametrize("remat,recomputed", [("full", 11), ("save_routing_and_dots", 2)])
def test_what_is_recomputed(remat, recomputed):
    """Products beyond those of "none": attention's 4, the router's, and 3 of each of 2 experts; with products saved,
    those with a batch dimension (scores, and their sum over values). Experts are never chosen twice."""
    config = tiny_config(model=dict(remat=remat), moe=dict(num_experts=2, widths=(), pairs=False))
    t = jnp.ones((2, 8), jnp.int32)

    def program(config):
        graph, params = transformer.build_abstract(config)
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(t, t)[0])))(params))

    plain = program(tiny_config(moe=dict(num_experts=2, widths=(), pairs=False)))
    text = program(config)
    assert text.count("bitcast_convert_type[") == 1
    assert text.count("dot_general[") - plain.count("dot_general[") == recomputed


def test_blocks_side_by_side_are_kept_apart_from_their_recomputation():
    """By a barrier; in a loop there is no forward pass beside it, and it would cost fusions."""
    def barriers(remat, unroll):
        graph, params = transformer.build_abstract(tiny_config(model=dict(remat=remat, unroll=unroll, num_layers=3)))
        t = jnp.ones((2, 8), jnp.int32)
        grad = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(t, t)[0]))
        return jax.jit(grad).lower(params).as_text().count("optimization_barrier")

    assert barriers("full", 3) > barriers("none", 3) and barriers("full", 1) == barriers("none", 1)


def test_what_is_recomputed_is_not_kept():
    """XLA for CPU would begin to recompute all blocks at once, were they not in a loop."""
    def memory(remat, length=64, unroll=0):
        config = tiny_config(model=dict(remat=remat, num_layers=4, unroll=unroll, vocab_size=32, context_length=2048))
        graph, params = transformer.build_abstract(config)
        t = jax.ShapeDtypeStruct((2048 // length, length), jnp.int32)

        def loss(params, t):
            return jnp.sum(nnx.merge(graph, params)(t, jnp.ones_like(t))[0])
        return jax.jit(jax.grad(loss)).lower(params, t).compile().memory_analysis().temp_size_in_bytes

    assert memory("full") < 0.6 * memory("none")
    assert memory("none", length=2048) < 0.75 * memory("none", length=2048, unroll=4)    # scores, block by block


@pytest.mark.parametrize("remat", ["none", "full", "save_routing_and_dots"])
def test_scanned_layers_equal_unrolled_ones_with_gradients(remat):
    config = tiny_config(model=dict(remat=remat, num_layers=3))
    params, _ = build(config)
    graph, _ = transformer.build_abstract(config)
    t, s = tokens((2, 11)), jnp.ones((2, 11), jnp.int32)

    def scanned(params):
        logits, out = nnx.merge(graph, params)(t, s)
        return jnp.sum(jnp.sin(logits)) + out.balance_loss

    def unrolled(params):
        model = nnx.merge(graph, params)
        block_graph, stacked = nnx.split(model.blocks)
        x, balance = model._embed(t), 0.0
        place = attention.packed_place(s, config.model)
        for i in range(3):
            block = nnx.merge(block_graph, jax.tree.map(lambda a, i=i: a[i], stacked))
            x, _, layer_balance, *_ = block(x, place, s > 0)
            balance += layer_balance
        return jnp.sum(jnp.sin(model.logits(model.final_norm(x)))) + balance

    a, b = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, unrolled))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=2e-4 * max(1, float(jnp.abs(y).max())))


def test_depth_does_not_lengthen_the_program():
    def lines(layers):
        config = tiny_config(model=dict(num_layers=layers))
        graph, params = transformer.build_abstract(config)
        t = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        return len(jax.jit(lambda p, t: nnx.merge(graph, p)(t, t)[0]).lower(params, t).as_text().splitlines())
    assert lines(12) == lines(2)


def test_grouped_query_heads_equal_repeated_ones():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 9, 6, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(2))
    mask = attention.packed_mask(jnp.array([[1] * 4 + [2] * 5, [1] * 8 + [0]]))
    whole = attention.attend(q, jnp.repeat(k, 3, 2), jnp.repeat(v, 3, 2), mask)
    np.testing.assert_allclose(attention.attend(q, k, v, mask), whole, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("heads,min_block", [(2, 128), (2, 4), (6, 3)])
def test_blocks_of_queries_equal_all_scores_at_once(heads, min_block, keep):
    """Outputs and gradients, with shared keys, packed documents, padding, and a last block that is not full."""
    rng = np.random.default_rng(0)
    q, dy = (jnp.asarray(rng.normal(size=(2, 11, heads, 4)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 11, 2, 4)), jnp.float32) for _ in range(2))
    segments = jnp.array([[1] * 4 + [2] * 7, [1] * 8 + [0] * 3])

    def values(f):
        return jax.jit(lambda *qkv: (f(*qkv), *jax.vjp(f, *qkv)[1](dy)))(q, k, v)

    fast = values(lambda q, k, v: attention.attend_packed(q, k, v, segments, keep, min_block))
    slow = values(lambda q, k, v: attention.attend(q, k, v, attention.packed_mask(segments)))
    for a, b in zip(fast, slow):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_attention_in_bfloat16_is_as_near_as_its_rounding(keep):
    """Outputs and gradients against float32, with heads of 12, whose scale is no number of bfloat16."""
    q, k, v, dy = (jax.random.normal(jax.random.key(i), (2, 24, 2, 12), jnp.bfloat16) for i in range(4))
    q, segments = 8 * q, jnp.ones((2, 24), jnp.int32)

    def values(f, *arrays):
        *qkv, dy = arrays
        return jax.jit(lambda: (f(*qkv), *jax.vjp(f, *qkv)[1](dy)))()

    got = values(lambda q, k, v: attention.attend_packed(q, k, v, segments, keep, 8), q, k, v, dy)
    want = values(lambda q, k, v: attention.attend(q, k, v, attention.packed_mask(segments)),
                  *(a.astype(jnp.float32) for a in (q, k, v, dy)))
    for a, b in zip(got, want):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 1e-2 * np.linalg.norm(b)
    np.testing.assert_array_equal(attention._scaled(q), (q.astype(jnp.float32) * 12**-0.5).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_projections_are_products_with_gradients_on_every_chip(dtype, tolerance):
    shapes = (2, 24, 8), (8, 12), (2, 24, 12)
    x, w, dy = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes))

    def both(product):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    want = both(lambda x, w: jnp.einsum("blx,xy->bly", x, w))
    for chip in ("cpu", "v5e"):
        got = jax.jit(lambda chip=chip: both(lambda x, w: attention._product(x, w, chip)))()
        for a, b in zip(got, want):
            a, b = (np.asarray(c, np.float32) for c in (a, b))
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_attention_equals_jax_nn():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(3))
    mask = attention.packed_mask(jnp.array([[1] * 4 + [2] * 5, [1] * 8 + [0]]))
    np.testing.assert_allclose(attention.attend(q, k, v, mask),
                               jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    config = tiny_config(model=dict(dim=8, num_heads=1)).model

    def rotate(x, position):
        return attention.rotate(x, *(a[None, position:position + 1, None] for a in attention.rotary(41, config)))

    def score(i, j):
        return float(jnp.sum(rotate(q, i) * rotate(k, j)))
    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def generate(graph, params, prompts, room, *rest, chunk=4):
    """All new tokens of each prompt."""
    rows = [[] for _ in prompts]
    for pieces in sampling.stream(graph, params, prompts, room, *rest, chunk):
        rows = [row + piece for row, piece in zip(rows, pieces)]
    return rows


@pytest.mark.parametrize("extra", [dict(moe=dict(backend="blocked")),
                                   dict(model=dict(num_kv_heads=1, tie_embeddings=True)),
                                   dict(moe=dict(gate_term="learned", gate="softmax_top_k"))])
def test_decoding_through_the_cache_equals_the_full_forward(extra):
    """Greedy text of prompts of different lengths, against recomputing every prefix alone."""
    config = tiny_config(**extra)
    params, forward = build(config)
    graph, _ = transformer.build_abstract(config)
    prompts = [tokens((n,), n).tolist() for n in (1, 5, 8)]
    got = generate(graph, params, prompts, 6, sampling.Settings(0.0), jax.random.key(0), 0, 2)
    for prompt, out in zip(prompts, got):
        text = list(prompt)
        for _ in range(6):
            row = jnp.asarray([text + [0] * (14 - len(text))])
            segments = (jnp.arange(14) < len(text)).astype(jnp.int32)[None]
            text.append(int(jnp.argmax(forward(params, row, segments)[0][0, len(text) - 1])))
            if text[-1] == 2:
                text.pop()
                break
        assert out == text[len(prompt):]


def test_pick_keeps_what_it_should():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def seen(**settings):
        keys = jax.random.split(jax.random.key(0), 300)
        return set(np.unique(jax.vmap(lambda k: sampling.pick(logits, sampling.Settings(**settings), k)[0])(keys)))
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.6) == {0, 1}
    assert seen(top_p=0.5) == {0}
    assert seen(temperature=0) == {0}
    assert seen(temperature=0.05) == {0}


def test_generation_stops_at_the_end_token_and_refuses_empty_prompts():
    params, _ = build()
    graph, _ = transformer.build_abstract(CONFIG)
    params = {**params, "head": jnp.zeros_like(params["head"])}    # all logits 0: the first id is the likeliest
    out = generate(graph, params, [[5, 6]], 4, sampling.Settings(0.0), jax.random.key(0), 9, 0)
    assert out == [[]]
    with pytest.raises(ValueError, match="at least one token"):
        generate(graph, params, [[]], 4, sampling.Settings(), jax.random.key(0), 0, 2)


def test_scoring_is_dropless_whatever_the_capacity():
    capped = tiny_config(moe=dict(capacity_factor=0.5))
    assert transformer.for_evaluation(capped) == dataclasses.replace(capped, moe=CONFIG.moe)


def test_bfloat16_compute_keeps_float32_parameters():
    config = tiny_config(model=dict(dtype="bfloat16"))
    params, forward = build(config)
    exact, exact_forward = build()
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    t, s = tokens((2, 9)), jnp.ones((2, 9), jnp.int32)
    low, full = forward(params, t, s)[0], exact_forward(exact, t, s)[0]
    assert low.dtype == jnp.float32
    assert float(jnp.abs(low - full).mean()) < 0.1 * float(jnp.abs(full).mean())


@pytest.mark.parametrize("function, size", [
    (functools.partial(attention.attend_splash, interpret=True), 64),
    (functools.partial(attention.attend_splash, interpret=True), 128),
    (functools.partial(attention.attend_cudnn, implementation="xla"), 128)])
def test_kernels_for_attention_equal_ours_with_gradients(function, size):
    """Splash in interpret mode, the call for cuDNN through XLA: packed documents, padding, grouped heads."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 256, 4, size), (2, 256, 2, size), (2, 256, 2, size))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes)]
    segments = jnp.asarray(np.array([[1] * 100 + [2] * 156, [1] * 30 + [2] * 150 + [0] * 76]), jnp.int32)
    weight = jax.random.normal(keys[3], shapes[0])

    def values(function):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(weight * function(*a)), argnums=(0, 1, 2)))(*arrays)

    got = values(lambda q, k, v: function(q, k, v, segments))
    want = values(lambda q, k, v: attention.attend_packed(q, k, v, segments))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))


def test_splash_attention_is_taken_where_it_runs():
    for size in (64, 128):    # the heads of 700Mx8 and of 300Mx8
        assert attention.chosen("auto", (1, 256, 2, size), "v5e", "bfloat16") == "splash"
    for shape, chip in (((1, 250, 2, 128), "v5e"), ((1, 256, 2, 32), "v5e"), ((1, 256, 2, 128), "cpu")):
        assert attention.chosen("auto", shape, chip, "float32") == "blocks"
        assert attention.chosen("blocks", shape, "v5e", "float32") == "blocks"
        with pytest.raises(UserError, match="model.attention=splash needs a TPU"):
            attention.chosen("splash", shape, chip, "float32")


def test_cudnn_attention_is_taken_where_it_runs(monkeypatch):
    shape = 1, 256, 2, 64
    monkeypatch.setattr(attention, "cudnn_version", lambda: 0)
    assert attention.chosen("auto", shape, "h100", "bfloat16") == "blocks"
    with pytest.raises(UserError, match="needs cuDNN, which jax does not find; .* take model.attention=blocks"):
        attention.chosen("cudnn", shape, "h100", "bfloat16")
    monkeypatch.setattr(attention, "cudnn_version", lambda: 92801)
    for kind in ("auto", "cudnn"):
        assert attention.chosen(kind, shape, "h100", "bfloat16") == "cudnn"
    assert attention.chosen("blocks", shape, "h100", "bfloat16") == "blocks"
    for length, size, chip, dtype in ((256, 64, "cpu", "bfloat16"), (256, 64, "h100", "float32"),
                                      (256, 60, "h100", "bfloat16"), (256, 256, "h100", "bfloat16"),
                                      (255, 64, "h100", "bfloat16")):
        with pytest.raises(UserError, match="model.attention=cudnn needs one of h100, h200"):
            attention.chosen("cudnn", (1, length, 2, size), chip, dtype)
        assert attention.chosen("auto", (1, length, 2, size), chip, dtype) == "blocks"


def test_a_missing_cudnn_is_no_error(monkeypatch):
    """Where jax has no CUDA plugin, where the library is missing, and where jax has the private function no longer."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def missing():
        raise RuntimeError("cuDNN not found.")

    assert attention.cudnn_version() == 0    # the test environment has none
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92801)
    assert attention.cudnn_version() == 92801
    monkeypatch.setattr(cudnn, "check_cudnn_version", missing)
    assert attention.cudnn_version() == 0
    monkeypatch.delattr(cudnn, "check_cudnn_version")
    assert attention.cudnn_version() == 0


def test_cudnn_writes_no_gradient_of_the_mask(monkeypatch):
    """Lowered for CUDA: the backward call returns the gradients of queries, keys and values, and its workspace."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92801)
    asks = getattr(cudnn, "should_export_dbias", None)
    array = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    @jax.jit
    def gradients(q, k, v, segments):
        return jax.grad(lambda *a: jnp.sum(attention.attend_cudnn(*a, segments).astype(jnp.float32)), (0, 1, 2))(
            q, k, v)

    text = gradients.trace(array, array, array, segments).lower(lowering_platforms=("cuda",)).as_text()
    (results,) = re.findall(r"%\w+:(\d+) = stablehlo.custom_call @__cudnn\$fmhaScaleBiasSoftmaxBackward", text)
    assert int(results) == 4
    assert getattr(cudnn, "should_export_dbias", None) is asks


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_cudnn_attention_is_checked_on_its_device(heads):
    """XLA's attention in cuDNN's place passes. Documents that see each other, scaled values and an error do not."""
    by_xla = functools.partial(attention.attend_cudnn, implementation="xla")
    shape = (*heads, 64)
    attention.check_cudnn(shape, 96, by_xla)
    wrong = "cuDNN's attention is wrong on this device: its output differs .* set --config.model.attention=blocks"
    with pytest.raises(UserError, match=wrong):
        attention.check_cudnn(shape, 96, lambda q, k, v, s: by_xla(q, k, v, jnp.ones_like(s)))

    @jax.custom_vjp
    def bad_gradient(q, k, v, s):
        return by_xla(q, k, v, s)

    def backward(saved, dout):
        dq, dk, dv = jax.vjp(lambda q, k, v: by_xla(q, k, v, saved[3]), *saved[:3])[1](dout)
        return dq, 1.1 * dk, dv, None

    bad_gradient.defvjp(lambda *a: (by_xla(*a), a), backward)
    with pytest.raises(UserError, match="gradient of keys differs"):
        attention.check_cudnn(shape, 96, bad_gradient)
    with pytest.raises(UserError, match="does not run on this device .* set --config.model.attention=blocks"):
        attention.check_cudnn(shape, 96)    # cuDNN itself, on a CPU


def test_a_run_checks_its_attention_first(monkeypatch):
    """Training and evaluation call the check where the mesh is of a GPU with cuDNN, and only there."""
    config = tiny_config(model=dict(dim=128, num_heads=2, dtype="bfloat16"))
    mesh, calls = meshes.build(dataclasses.replace(config, mesh=Mesh(1, 1, 1)), jax.devices()[:1]), []
    monkeypatch.setattr(attention, "check_cudnn", lambda *a: calls.append(a))
    monkeypatch.setattr(attention, "cudnn_version", lambda: 92801)
    assert transformer.check_kernels(config, mesh).attention == "blocks" and not calls
    monkeypatch.setattr(meshes, "chip", lambda _: "h100")
    for c in (config, transformer.for_evaluation(config)):
        assert transformer.check_kernels(c, mesh).attention == "cudnn"
    assert calls == 2 * [((2, 2, 64), config.data.sequence_length)]
