"""Every form of a block: its outputs and gradients, decoding through a cache, initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modse_jax.model import block, transformer
from modse_jax.model.attention import attention_layer
from tests.helpers import numpy_block, numpy_reference
from tests.helpers.block_forms import FORMS, config_of
from tests.helpers.models import build_forward, random_tokens

SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 2, 0, 0])


def draw_weights(config, rng) -> dict[str, np.ndarray]:
    """Returns random float64 weights of a block, by their paths."""
    shapes = jax.eval_shape(lambda: block.Block(config, None, nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(shapes)[1]))
    return {
        "/".join(str(key.key) for key in path): rng.normal(size=leaf.shape) / 2
        for path, leaf in leaves
    }


def make_block(config):
    """Returns the block as a jitted function of ({path: weight} and "x") -> outputs."""
    graph, _ = nnx.split(jax.eval_shape(lambda: block.Block(config, None, nnx.Rngs(0))))
    segments = jnp.asarray(SEGMENTS)[None]

    def apply(arrays):
        weights: dict = {}
        for path, value in arrays.items():
            *folders, name = path.split("/")
            folder = weights
            for key in folders:
                folder = folder.setdefault(key, {})
            folder[name] = value
        x_BLD = weights.pop("x")[None]
        inputs = attention_layer.packed_inputs(segments, config.model)
        y_BLD, output = nnx.merge(graph, weights)(x_BLD, inputs, segments > 0, trace=True)
        return y_BLD[0], output

    return apply


@pytest.mark.parametrize("kind, norm_position", FORMS)
def test_block_equals_the_numpy_loop_with_gradients(kind, norm_position):
    """With two documents and padding, whose rows have no cotangent."""
    num_kv_heads = 1 if kind == "in_layer" else 0
    config = config_of(
        kind, norm_position, model=dict(num_layers=1, num_kv_heads=num_kv_heads, norm_eps=1e-3)
    )
    rng = np.random.default_rng(5)
    arrays = {**draw_weights(config, rng), "x": rng.normal(size=(len(SEGMENTS), 16))}
    dy = rng.normal(size=(len(SEGMENTS), 16)) * (SEGMENTS > 0)[:, None]
    apply = make_block(config)

    def total(arrays):
        """Returns a scalar of all outputs, so that one derivative checks every path."""
        weights = {name: value for name, value in arrays.items() if name != "x"}
        result = numpy_block.block(arrays["x"], weights, SEGMENTS, config)
        return np.sum(result.y_LD * dy) + 3 * result.balance_loss + 2 * result.z_loss

    @jax.jit
    @jax.value_and_grad
    def total_and_gradients(arrays):
        y_LD, output = apply(arrays)
        loss = jnp.sum(y_LD * jnp.asarray(dy, jnp.float32))
        return loss + 3 * output.balance_loss + 2 * output.z_loss

    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    got_total, gradients = total_and_gradients(single)
    assert float(got_total) == pytest.approx(total(arrays), abs=1e-4)
    for name in arrays:  # one array at a time, so that a wrong gradient is named
        direction = {k: rng.normal(size=v.shape) * (k == name) for k, v in arrays.items()}
        expected = numpy_reference.directional_derivative(total, arrays, direction, 1e-6)
        got = float(np.sum(np.asarray(gradients[name], np.float64) * direction[name]))
        norm = np.linalg.norm(gradients[name]) * np.linalg.norm(direction[name])
        assert abs(got - expected) <= 2e-5 * max(norm, 1), name
        assert norm > 1e-3 or name.endswith("router_gate"), f"{name} has no gradient"


@pytest.mark.parametrize(
    "kind, norm_position",
    [("moe", "post"), ("in_layer", "pre"), ("parallel", "post"), ("dense", "post")],
)
def test_decoding_through_the_cache_equals_scoring(kind, norm_position):
    """The logits of a prefill of 5 tokens and of 4 single tokens are those of one packed row."""
    config = config_of(kind, norm_position)
    params, forward = build_forward(config)
    tokens = random_tokens((2, 9))
    logits, _ = forward(params, tokens, jnp.ones_like(tokens))
    graph, _ = transformer.build_abstract_model(config)

    @jax.jit
    def decode(params):
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
        valid = jnp.ones((2, 9), bool)
        x_BLD, output = model.hidden_with_cache(
            tokens[:, :5], positions[:, :5], valid[:, :5], model.empty_cache(2, 9)
        )

        def decode_token(cache, position):
            token = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
            x_B1D, output = model.hidden_with_cache(
                token, jnp.full((2, 1), position), valid[:, :1], cache
            )
            return output.cache, x_B1D[:, 0]

        _, x_LBD = jax.lax.scan(decode_token, output.cache, jnp.arange(5, 9))
        return model.logits(jnp.concatenate((x_BLD, x_LBD.swapaxes(0, 1)), axis=1))

    np.testing.assert_allclose(decode(params), logits, atol=2e-4)


def test_dense_block_has_no_routing():
    """Its statistics count the tokens and no expert, and a trace has no choices."""
    config = config_of("dense", "pre")
    rng = np.random.default_rng(0)
    arrays = {**draw_weights(config, rng), "x": rng.normal(size=(len(SEGMENTS), 16))}
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    _, output = jax.eval_shape(make_block(config), single)
    assert output.statistics.counts_KE.shape == (0, 0)
    assert output.statistics.gates_E.shape == (0,)
    assert [choice.shape for choice in output.choices] == 2 * [(1, len(SEGMENTS), 0)]
    _, output = jax.jit(make_block(config))(single)
    assert int(output.statistics.tokens) == 7
    assert float(output.balance_loss) == float(output.z_loss) == float(output.width_penalty) == 0


def test_arms_of_one_seed_share_the_weights_outside_the_experts():
    """So the arms of a study differ in what they compare, and not in the draw of the rest."""

    def draw(kind):
        config = config_of(kind, "pre", model=dict(num_layers=1))
        return jax.jit(lambda: nnx.to_pure_dict(nnx.split(transformer.build_model(config))[1]))()

    moe, parallel, dense = map(draw, ("moe", "parallel", "dense"))
    for name in ("attention", "moe"):
        assert_same(parallel["blocks"][name], moe["blocks"][name])
    assert_same(dense["blocks"]["attention"], moe["blocks"]["attention"])
    for name in ("embedding", "head"):
        assert_same(dense[name], moe[name])


def assert_same(tree, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)
