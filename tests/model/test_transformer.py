"""The Transformer: causality, packed rows, padding, the scan over blocks, mixed precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.model import transformer
from modse_jax.model.attention import attention_layer
from tests.helpers.block_forms import config_of
from tests.helpers.configs import tiny_config
from tests.helpers.models import build_forward, random_tokens

CONFIG = tiny_config()


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.int32)


def test_no_token_attends_to_a_later_one():
    """The gradient of the output at position 7 is exactly zero for later inputs only."""
    params, _ = build_forward(CONFIG)
    graph, _ = transformer.build_abstract_model(CONFIG)

    def output_at_7(x_BLD):
        model = nnx.merge(graph, params)
        attention_inputs = attention_layer.packed_inputs(ones(1, 12), CONFIG.model)
        x_BLD, _ = model.run_blocks(x_BLD, attention_inputs, jnp.ones((1, 12), bool))
        return jnp.sum(x_BLD[0, 7] ** 3)

    noise_BLD = jax.random.normal(jax.random.key(0), (1, 12, 16))
    gradient_LD = jax.jit(jax.grad(output_at_7))(noise_BLD)[0]
    assert float(jnp.abs(gradient_LD[8:]).max()) == 0
    assert bool((jnp.abs(gradient_LD[:8]).sum(axis=1) > 0).all())


def test_packed_documents_are_isolated():
    """Two documents in a row give the logits that each gives alone."""
    params, forward = build_forward(CONFIG)
    first, second = random_tokens((1, 7), 1), random_tokens((1, 9), 2)
    packed_tokens = jnp.concatenate((first, second), axis=1)
    packed, _ = forward(params, packed_tokens, jnp.array([[1] * 7 + [2] * 9]))
    first_alone, _ = forward(params, first, ones(1, 7))
    second_alone, _ = forward(params, second, ones(1, 9))
    np.testing.assert_allclose(packed[:, :7], first_alone, atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:], second_alone, atol=2e-5)


def test_padding_changes_nothing_and_is_not_counted():
    params, forward = build_forward(CONFIG)
    tokens = random_tokens((2, 10))
    padding = ((0, 1), (0, 6))
    padded_tokens = jnp.pad(tokens, padding, constant_values=5)
    padded_segments = jnp.pad(ones(2, 10), padding)
    logits, output = forward(params, tokens, ones(2, 10))
    padded_logits, padded_output = forward(params, padded_tokens, padded_segments)
    np.testing.assert_allclose(padded_logits[:2, :10], logits, atol=2e-5)
    np.testing.assert_allclose(padded_output.balance_loss, output.balance_loss, rtol=1e-5)
    np.testing.assert_array_equal(padded_output.statistics.counts_KE, output.statistics.counts_KE)
    assert bool(jnp.isfinite(padded_logits).all())


@pytest.mark.parametrize("remat", ["none", "full", "save_routing_and_dots"])
def test_scanned_blocks_equal_a_python_loop_with_gradients(remat):
    config = tiny_config(model=dict(remat=remat, num_layers=2))
    params, _ = build_forward(config)
    graph, _ = transformer.build_abstract_model(config)
    tokens, segments = random_tokens((2, 11)), ones(2, 11)

    def scanned_loss(params):
        logits, output = nnx.merge(graph, params)(tokens, segments)
        return jnp.sum(jnp.sin(logits)) + output.balance_loss

    def looped_loss(params):
        model = nnx.merge(graph, params)
        block_graph, stacked = nnx.split(model.blocks)
        x_BLD = model.embed(tokens)
        balance_loss = 0.0
        attention_inputs = attention_layer.packed_inputs(segments, config.model)
        for layer in range(config.model.num_layers):
            weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            block = nnx.merge(block_graph, weights)
            x_BLD, output = block(x_BLD, attention_inputs, segments > 0)
            balance_loss += output.balance_loss
        logits = model.logits(model.final_norm(x_BLD))
        return jnp.sum(jnp.sin(logits)) + balance_loss

    scanned = jax.jit(jax.value_and_grad(scanned_loss))(params)
    looped = jax.jit(jax.value_and_grad(looped_loss))(params)
    for got, want in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped)):
        scale = max(1, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got, want, atol=2e-4 * scale)


def test_program_size_does_not_grow_with_the_number_of_layers():
    def count_lines(num_layers):
        config = tiny_config(model=dict(num_layers=num_layers))
        graph, params = transformer.build_abstract_model(config)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens, tokens)[0])
        return len(forward.lower(params, tokens).as_text().splitlines())

    assert count_lines(12) == count_lines(2)


def test_bfloat16_compute_keeps_float32_parameters():
    params, forward = build_forward(tiny_config(model=dict(dtype="bfloat16")))
    exact_params, exact_forward = build_forward(CONFIG)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    tokens = random_tokens((2, 9))
    logits, _ = forward(params, tokens, ones(2, 9))
    exact_logits, _ = exact_forward(exact_params, tokens, ones(2, 9))
    assert logits.dtype == jnp.float32
    mean_error = float(jnp.abs(logits - exact_logits).mean())
    assert mean_error < 0.1 * float(jnp.abs(exact_logits).mean())


@pytest.mark.parametrize(
    "kind, model",
    [
        ("parallel", dict(num_kv_heads=1)),
        ("dense", dict(tie_embeddings=True)),
    ],
)
def test_init_std_is_that_of_every_initial_matrix(kind, model):
    """Embedding, head, attention, experts, router, its noise, shared expert and dense FFN."""
    config = config_of(
        kind,
        "post",
        model=dict(init_std=0.02, dim=64, num_layers=3, **model),
        moe=dict(router_noise="learned", num_experts=16, widths=(), pairs=False),
    )
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(transformer.build_model(config))[1]))()
    matrices = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            np.testing.assert_array_equal(leaf, 1)
            continue
        matrices += 1
        # Truncation at 3 standard deviations leaves 0.9866 of the standard deviation.
        assert float(leaf.std()) == pytest.approx(0.9866 * 0.02, rel=0.1), name
        assert 2 * 0.02 < float(jnp.abs(leaf).max()) <= 3 * 0.02, name
        assert abs(float(leaf.mean())) < 0.002, name
    assert matrices == {"parallel": 14, "dense": 8}[kind]


@pytest.mark.parametrize(
    "dim, num_layers, num_heads, total",
    [(48, 3, 3, 9_745_008), (336, 8, 7, 81_898_320)],  # 10M and 80M
)
def test_dense_models_of_slicing_and_dicing_have_the_parameters_of_its_logs(
    dim, num_layers, num_heads, total
):
    """The built model, which takes no memory, has the numbers that the study logged."""
    config = tiny_config(
        model=dict(
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            vocab_size=100_352,
            dense_width=4 * dim,
            norm_position="post",
            qk_norm="full",
        )
    )
    _, params = transformer.build_abstract_model(config)
    sizes = {
        jax.tree_util.keystr(path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert sum(sizes.values()) == total
    norms = sum(size for name, size in sizes.items() if "scale" in name)
    assert norms == (4 * num_layers + 1) * dim


def test_a_parallel_shared_expert_adds_one_norm_to_a_layer():
    def list_scales(kind):
        _, params = transformer.build_abstract_model(config_of(kind, "post"))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {jax.tree_util.keystr(path) for path, _ in leaves if "scale" in path[-1].key}

    extra = list_scales("parallel") - list_scales("moe")
    assert extra == {"['blocks']['shared_norm']['scale']"}
    assert list_scales("in_layer") == list_scales("moe")
