"""One decoder block: attention, then an MoE layer or a dense FFN, each with a residual connection.

Legend: B batch, L length, S cache length, D model, K top-k, E experts, G key/value heads,
C head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from modse_jax.config.options import Config
from modse_jax.model.attention.attention_layer import Attention, AttentionInputs, Cache
from modse_jax.model.feed_forward import FeedForward
from modse_jax.model.normalization import RMSNorm
from modse_jax.moe.layer import LayerOutput, MoELayer
from modse_jax.moe.router import RouterStatistics

Choices = tuple[jax.Array, jax.Array]  # gates and expert ids, [B, L, K]


class BlockOutput(NamedTuple):
    """The results of one block besides its activations."""

    cache: Cache | None  # [B, S, G, C]; None for packed rows
    balance_loss: jax.Array  # load-balancing loss, unweighted
    z_loss: jax.Array  # router z-loss, unweighted
    width_penalty: jax.Array  # width penalty, unweighted
    statistics: RouterStatistics
    choices: Choices | None  # if requested


class Block(nnx.Module):
    """Attention, then the feed-forward part of a config.

    With `model.norm_position=pre`, where every N is an RMSNorm of its own:

        h = x + attention(N(x))
        y = h + moe(N(h))                      moe.shared_placement=none
        y = h + moe(N(h)) + shared(N(h))       in_layer: both with one norm
        y = h + moe(N(x)) + shared(N(h))       parallel: each with its own norm
        y = h + feed_forward(N(h))             model.dense_width

    With `model.norm_position=post`, the norms are on the outputs (OLMo 2):

        h = x + N(attention(x))
        y = h + N(moe(h))                      moe.shared_placement=none
        y = h + N(moe(h) + shared(h))          in_layer
        y = h + N(moe(x)) + N(shared(h))       parallel
        y = h + N(feed_forward(h))             model.dense_width
    """

    def __init__(self, config: Config, mesh: Mesh | None, rngs: nnx.Rngs) -> None:
        model = config.model
        self.norm_position = model.norm_position
        self.shared_placement = config.moe.shared_placement
        self.is_dense = config.is_dense
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model, mesh, rngs)
        if self.is_dense:
            self.feed_forward_norm = RMSNorm(model.dim, model.norm_eps)
            self.feed_forward = FeedForward(model, model.dense_width, mesh, rngs)
            return
        self.moe_norm = RMSNorm(model.dim, model.norm_eps)
        self.moe = build_moe_layer(config, mesh, rngs)
        # The weights of the shared expert are drawn last, so that all others do not depend on it.
        if self.shared_placement != "none":
            self.shared = FeedForward(model, config.moe.shared_width, mesh, rngs)
        if self.shared_placement == "parallel":
            self.shared_norm = RMSNorm(model.dim, model.norm_eps)

    def __call__(
        self,
        x_BLD: jax.Array,
        attention_inputs: AttentionInputs,
        valid_BL: jax.Array,
        cache: Cache | None = None,
        trace: bool = False,
        router_bias_E: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """Returns (y_BLD, BlockOutput).

        Args:
            valid_BL: False for padding, which is routed to no expert.
            cache: keys and values of the tokens so far; None for packed rows.
            trace: also returns the gates and expert ids of every token.
            router_bias_E: is added to the scores that experts are chosen by; None for no bias.
        """
        branch_BLD = self._before(self.attention_norm, x_BLD)
        branch_BLD, cache = self.attention(branch_BLD, attention_inputs, cache)
        h_BLD = x_BLD + self._after(self.attention_norm, branch_BLD)
        if self.is_dense:
            branch_BLD = self.feed_forward(self._before(self.feed_forward_norm, h_BLD))
            y_BLD = h_BLD + self._after(self.feed_forward_norm, branch_BLD)
            return y_BLD, _output_without_routing(valid_BL, cache, trace)

        is_parallel = self.shared_placement == "parallel"
        routed_BLD = self._before(self.moe_norm, x_BLD if is_parallel else h_BLD)
        moe = self.moe(routed_BLD, valid_BL, router_bias_E)
        branch_BLD = moe.y_BLD
        if self.shared_placement == "in_layer":
            branch_BLD += self.shared(routed_BLD)
        y_BLD = h_BLD + self._after(self.moe_norm, branch_BLD)
        if is_parallel:
            branch_BLD = self.shared(self._before(self.shared_norm, h_BLD))
            y_BLD += self._after(self.shared_norm, branch_BLD)
        choices = self.moe.choose_experts(routed_BLD, router_bias_E) if trace else None
        return y_BLD, _output_of(moe, cache, choices)

    def _before(self, norm: RMSNorm, x_BLD: jax.Array) -> jax.Array:
        """Returns the input of a branch: normalized in a pre-norm block."""
        return norm(x_BLD) if self.norm_position == "pre" else x_BLD

    def _after(self, norm: RMSNorm, y_BLD: jax.Array) -> jax.Array:
        """Returns the output of a branch: normalized in a post-norm block."""
        return norm(y_BLD) if self.norm_position == "post" else y_BLD


def _output_of(moe: LayerOutput, cache: Cache | None, choices: Choices | None) -> BlockOutput:
    """Returns the output of a block with an MoE layer."""
    return BlockOutput(
        cache, moe.balance_loss, moe.z_loss, moe.width_penalty, moe.statistics, choices
    )


def _output_without_routing(valid_BL: jax.Array, cache: Cache | None, trace: bool) -> BlockOutput:
    """Returns the output of a dense block: losses of 0, and statistics and choices of no expert."""
    zero = jnp.zeros((), jnp.float32)
    statistics = RouterStatistics(
        counts_KE=jnp.zeros((0, 0), jnp.int32),
        gates_E=jnp.zeros((0,), jnp.float32),
        entropy_P=jnp.zeros((0,), jnp.float32),
        tokens=jnp.sum(valid_BL, dtype=jnp.int32),
        dropped_P=jnp.zeros((0,), jnp.int32),
    )
    no_choices = jnp.zeros((*valid_BL.shape, 0), jnp.float32)
    choices = (no_choices, no_choices.astype(jnp.int32)) if trace else None
    return BlockOutput(cache, zero, zero, zero, statistics, choices)


def build_moe_layer(config: Config, mesh: Mesh | None, rngs: nnx.Rngs) -> MoELayer:
    """Returns a mixture-of-experts layer with the options of a config."""
    return MoELayer(
        config.model.dim,
        config.widths,
        config.router_options,
        config.expert_options,
        num_layers=config.model.num_layers,
        init_std=config.model.init_std,
        mesh=mesh,
        rngs=rngs,
    )
