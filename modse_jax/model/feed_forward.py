"""The dense feed-forward network: the FFN of a dense model, and the shared expert of an MoE layer.

Legend: B batch, L length, D model, W hidden width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from modse_jax.config.options import ModelConfig
from modse_jax.model.cpu_matmul import matmul
from modse_jax.model.initialization import draw_normal
from modse_jax.moe.experts.swiglu import swiglu, swiglu_backward
from modse_jax.runtime import sharding


class FeedForward(nnx.Module):
    """A SwiGLU FFN without biases, which processes every token: w_down(silu(w_gate x) * w_up x).

    It computes what one expert of the same width computes. Its parameters have other names than
    those of the experts, because they are sharded in another way: over `fsdp` and `expert` along
    the model dimension, like those of attention.
    """

    def __init__(self, config: ModelConfig, width: int, mesh: Mesh | None, rngs: nnx.Rngs) -> None:
        self.mesh = mesh
        self.dtype = jnp.dtype(config.dtype)
        D = config.dim
        in_std = config.init_std or D**-0.5
        # The output of a residual branch is initialized 1 / sqrt(2 * num_layers) as large.
        out_std = config.init_std or width**-0.5 / (2 * config.num_layers) ** 0.5
        self.w_ffn_gate = nnx.Param(draw_normal(rngs, (D, width), in_std))
        self.w_ffn_up = nnx.Param(draw_normal(rngs, (D, width), in_std))
        self.w_ffn_down = nnx.Param(draw_normal(rngs, (width, D), out_std))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns y_BLD in the type of x_BLD."""
        chip = sharding.chip_name(self.mesh)
        gate_BLW = matmul(x_BLD, self.w_ffn_gate[...].astype(self.dtype), chip)
        up_BLW = matmul(x_BLD, self.w_ffn_up[...].astype(self.dtype), chip)
        return matmul(activate(gate_BLW, up_BLW), self.w_ffn_down[...].astype(self.dtype), chip)


@jax.custom_vjp
def activate(gate_BLW: jax.Array, up_BLW: jax.Array) -> jax.Array:
    """Returns silu(gate) * up in the type of its arguments, computed in float32.

    The backward pass needs the two arguments alone. JAX would save five arrays of the same size in
    float32, for every layer.
    """
    hidden_BLW = swiglu(gate_BLW.astype(jnp.float32), up_BLW.astype(jnp.float32))
    return hidden_BLW.astype(gate_BLW.dtype)


def _activate_forward(
    gate_BLW: jax.Array, up_BLW: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return activate(gate_BLW, up_BLW), (gate_BLW, up_BLW)


def _activate_backward(
    saved: tuple[jax.Array, jax.Array], dhidden_BLW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate_BLW, up_BLW = saved
    backward = swiglu_backward(
        gate_BLW.astype(jnp.float32), up_BLW.astype(jnp.float32), dhidden_BLW.astype(jnp.float32)
    )
    return backward.dgate.astype(gate_BLW.dtype), backward.dup.astype(up_BLW.dtype)


activate.defvjp(_activate_forward, _activate_backward)
