"""The lookup of token embeddings: both gradients agree, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.config import device_mesh
from modse_jax.config.options import MeshConfig
from modse_jax.model import embedding
from modse_jax.planning.hlo_collectives import bytes_by_kind, list_collectives
from modse_jax.runtime import sharding
from tests.helpers.configs import tiny_config

V, D = 37, 16


def numbers(batch: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a table, tokens (most rows never occur, others often), and an output gradient."""
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    tokens_BL = jnp.asarray(rng.integers(3, 12, (batch, length)), jnp.int32).at[0, 0].set(V - 1)
    gradient_BLD = jnp.asarray(rng.normal(size=(batch, length, D)), jnp.float32)
    return table_VD, tokens_BL, gradient_BLD


def output_and_gradient(look_up, table_VD, tokens_BL, gradient_BLD):
    x_BLD, pull = jax.vjp(lambda table_VD: look_up(table_VD, tokens_BL), table_VD)
    return x_BLD, pull(gradient_BLD.astype(x_BLD.dtype))[0]


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("dtype, scale", [("float32", 1.0), ("bfloat16", 1.0), ("bfloat16", 3.0)])
def test_matmul_gradient_equals_the_gathers(dtype, scale, chunk):
    """Chunks of one token, of some, of a divisor of all, and of more than there are."""
    table_VD, tokens_BL, gradient_BLD = numbers(3, 8)
    dtype = jnp.dtype(dtype)
    x_BLD, gradient_VD = output_and_gradient(
        lambda t, i: embedding.look_up_with_matmul_gradient(t, i, dtype, scale, chunk),
        table_VD,
        tokens_BL,
        gradient_BLD,
    )
    # The sum is float32 in either type; only the output gradient is rounded.
    rounded_BLD = np.asarray(gradient_BLD.astype(dtype), np.float64)
    want_VD = np.zeros((V, D))
    np.add.at(want_VD, np.asarray(tokens_BL), rounded_BLD * scale)
    assert x_BLD.dtype == dtype and gradient_VD.dtype == table_VD.dtype
    np.testing.assert_array_equal(x_BLD, (table_VD[tokens_BL] * scale).astype(dtype))
    np.testing.assert_allclose(gradient_VD, want_VD, rtol=1e-6, atol=1e-6)
    _, reference_VD = output_and_gradient(
        lambda t, i: embedding.look_up_with_gather(t, i, dtype, scale),
        table_VD,
        tokens_BL,
        gradient_BLD,
    )
    np.testing.assert_allclose(gradient_VD, reference_VD, rtol=1e-6, atol=2e-6)


@functools.cache
def compile_sharded(sizes: tuple[int, int, int], dtype: str, with_matmul: bool):
    """Returns (compiled output and gradient on a mesh, its arguments) of a sharded lookup."""
    config = tiny_config(
        training=dict(batch_size=16), moe=dict(num_experts=8, widths=(16,) * 8, pairs=False)
    )
    mesh = device_mesh.build_mesh(config.__class__(**{**vars(config), "mesh": MeshConfig(*sizes)}))
    table_VD, tokens_BL, gradient_BLD = numbers(16, 6)
    table_VD = jax.device_put(
        table_VD, sharding.parameter_shardings(mesh, {"embedding": table_VD})["embedding"]
    )
    tokens_BL, gradient_BLD = (
        jax.device_put(a, sharding.batch_sharding(mesh)) for a in (tokens_BL, gradient_BLD)
    )

    def run(*arguments):
        def look_up(table_VD, tokens_BL):
            return embedding.look_up(table_VD, tokens_BL, jnp.dtype(dtype), 2.0, mesh, with_matmul)

        return output_and_gradient(look_up, *arguments)

    arguments = table_VD, tokens_BL, gradient_BLD
    shardings = sharding.batch_sharding(mesh), table_VD.sharding
    return jax.jit(run, out_shardings=shardings).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)])
def test_sharded_lookups_agree_and_send_no_more(sizes, dtype):
    """The matmul gradient sends no more bytes of any kind of collective than the gather's."""
    (gather, arguments), (matmul, _) = (
        compile_sharded(sizes, dtype, with_matmul) for with_matmul in (False, True)
    )
    for got, want in zip(matmul(*arguments), gather(*arguments)):
        assert got.dtype == want.dtype
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=5e-6)
    sent, allowed = (bytes_by_kind(list_collectives(c.as_text())) for c in (matmul, gather))
    assert sent and sum(allowed.values()) > 0
    for kind, count in sent.items():
        assert count <= allowed.get(kind, 0), (kind, sent, allowed)


def test_the_gradient_is_selected_by_platform(monkeypatch):
    """Every GPU takes the matmul gradient, one whose name is unknown included; a CPU does not."""
    table_VD, tokens_BL, _ = numbers(2, 4)

    def has_matmul(chip):
        monkeypatch.setattr(sharding, "chip_name", lambda mesh: chip)
        grad = jax.grad(
            lambda t: jnp.sum(embedding.look_up(t, tokens_BL, jnp.dtype("float32"), 1.0, None))
        )
        return "dot_general" in str(jax.make_jaxpr(grad)(table_VD))

    assert [has_matmul(chip) for chip in ("cpu", "v5e", "gpu", "h100", "a100")] == [
        False,
        False,
        True,
        True,
        True,
    ]
