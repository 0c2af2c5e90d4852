"""The layer alone, as somebody else's code uses it."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modse_jax
from modse_jax import ExpertOptions, MoELayer, Pool, RouterOptions

WIDTHS = (300, 100, 200, 200)


def run_layer(mesh: jax.sharding.Mesh | None) -> tuple[jax.Array, dict]:
    """Returns the loss and the gradients of a layer."""
    layer = MoELayer(64, WIDTHS, RouterOptions(top_k=2), mesh=mesh, rngs=nnx.Rngs(0))
    x_BLD = jax.random.normal(jax.random.key(1), (8, 5, 64))

    @nnx.jit
    def loss_and_gradients(layer: MoELayer, x_BLD: jax.Array) -> tuple[jax.Array, nnx.State]:
        def loss(layer: MoELayer) -> jax.Array:
            out = layer(x_BLD)
            return jnp.sum(out.y_BLD**2) + 0.01 * out.balance_loss + 0.001 * out.z_loss

        return nnx.value_and_grad(loss)(layer)

    value, gradients = loss_and_gradients(layer, x_BLD)
    return value, nnx.to_pure_dict(gradients)


def test_a_layer_alone_gives_the_same_loss_and_gradients_on_a_mesh():
    value, gradients = run_layer(None)
    assert gradients["w_gate"].shape == (64, sum(WIDTHS))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))
    mesh = modse_jax.make_mesh(jax.devices()[:4], (2, 1, 2))
    sharded_value, sharded_gradients = run_layer(mesh)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    # 300 and 100 are on one shard, 200 and 200 on the other: the stored order is the same.
    for name, gradient in gradients.items():
        np.testing.assert_allclose(sharded_gradients[name], gradient, rtol=1e-3, atol=1e-3)


def test_the_example_of_the_readme_runs():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    gradients = nnx.to_pure_dict(names["gradients"])
    assert gradients["w_down"].shape == (800, 64)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_padding_tokens_are_routed_to_no_expert():
    layer = MoELayer(16, (8, 24), rngs=nnx.Rngs(0))
    valid_BL = jnp.array([[True, True, False]])
    out = layer(jnp.full((1, 3, 16), jnp.nan).at[:, :2].set(1.0), valid_BL)
    assert int(out.statistics.tokens) == 2 and not np.asarray(out.y_BLD[0, 2]).any()
    assert np.isfinite(np.asarray(out.y_BLD)).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RouterOptions(gate="softmax"), "gate='softmax' is unknown; choose one of"),
        (lambda: ExpertOptions(backend="cuda"), "backend='cuda' is unknown; choose one of"),
        (lambda: MoELayer(16, (8, -1), rngs=nnx.Rngs(0)), "expert 1 has width -1"),
        (
            lambda: MoELayer(16, (8, 8), RouterOptions(top_k=3), rngs=nnx.Rngs(0)),
            "top_k=3 must be between 1 and the number of experts, 2",
        ),
    ],
)
def test_wrong_options_are_reported_with_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_public_name_exists_and_the_package_imports_without_jax():
    for name in modse_jax.__all__:
        assert getattr(modse_jax, name) is not None
    code = "import sys, modse_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_layer_of_pools_is_built_from_public_names():
    pools = (Pool(num_experts=2, top_k=1), Pool(num_experts=3, top_k=2))
    options = RouterOptions(pools=pools, gate="uniform")
    layer = MoELayer(16, (8, 4, 2, 2, 2), options, rngs=nnx.Rngs(0))
    gates_BLK, ids_BLK = layer.choose_experts(jnp.ones((1, 2, 16)))
    np.testing.assert_allclose(gates_BLK, 1 / 3, rtol=1e-6)
    assert (ids_BLK[..., :1] < 2).all() and (ids_BLK[..., 1:] >= 2).all()
