"""A Llama-2-shaped decoder with an MoE layer of diverse expert sizes in every block (MoDSE, section 3).

Legend: B batch, L length, D model, V vocabulary; a leading `layers` axis on every parameter of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.config.options import Config
from modse_jax.model import embedding
from modse_jax.model.attention import attention_layer
from modse_jax.moe import layer
from modse_jax.moe.router import ROUTING, RouterStatistics
from modse_jax.runtime import sharding

MOST_UNROLLED = 4  # blocks, where model.unroll is 0: a step in seven size classes then compiles in 45 s on 2 cores


class Output(NamedTuple):
    """What a forward pass knows besides its activations. The losses are unweighted sums over layers."""

    balance_loss: jax.Array
    z_loss: jax.Array
    statistics: RouterStatistics  # every array with a leading axis of layers
    cache: tuple | None  # keys, values [layers, B, S, G, C]
    choices: tuple | None  # gates, expert ids [layers, B, L, K], where asked for


def build_model(config: Config, mesh: Mesh | None = None) -> "Transformer":
    """A freshly initialised model: a function of config.seed alone."""
    return Transformer(config, nnx.Rngs(params=config.seed), mesh)


def build_abstract_model(config: Config, mesh: Mesh | None = None):
    """(graph, abstract parameters as a plain dict) of the model, with no memory spent."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, mesh)))
    return graph, nnx.to_pure_dict(state)


def build_moe_layer(config: Config, mesh: Mesh | None, rngs: nnx.Rngs) -> layer.MoELayer:
    """Returns a mixture-of-experts layer with the options of a config."""
    return layer.MoELayer(
        config.model.dim,
        config.widths,
        config.router_options,
        config.expert_options,
        num_layers=config.model.num_layers,
        mesh=mesh,
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, eps: float):
        self.scale, self.eps = nnx.Param(jnp.ones((dim,))), eps

    def __call__(self, x_BLD):
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...][None, None, :]).astype(x_BLD.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: Config, mesh: Mesh | None, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.model.dim, config.model.norm_eps)
        self.attention = attention_layer.Attention(config.model, mesh, rngs)
        self.moe_norm = RMSNorm(config.model.dim, config.model.norm_eps)
        self.moe = build_moe_layer(config, mesh, rngs)

    def __call__(self, x_BLD, place, valid_BL, cache=None, trace=False):
        y_BLD, cache = self.attention(self.attention_norm(x_BLD), place, cache)
        x_BLD = x_BLD + y_BLD
        seen_BLD = self.moe_norm(x_BLD)
        y_BLD, *losses_and_statistics = self.moe(seen_BLD, valid_BL)
        return (
            x_BLD + y_BLD,
            cache,
            *losses_and_statistics,
            self.moe.choose_experts(seen_BLD) if trace else None,
        )


class Transformer(nnx.Module):
    """Blocks are scanned: their parameters carry a leading axis of layers, and the program does not grow with depth."""

    def __init__(self, config: Config, rngs: nnx.Rngs, mesh: Mesh | None = None):
        m = config.model
        self.config, self.mesh = m, mesh
        # Not the usual 0.02: beside a block's output of about 1 the token would be lost at first (LOG.md, 2026-11-22).
        std = 0.5 * m.dim**-0.5 if m.tie_embeddings else 0.5
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (m.vocab_size, m.dim)))
        keys = jax.random.split(rngs.params(), m.num_layers)
        self.blocks = nnx.vmap(lambda key: Block(config, mesh, nnx.Rngs(params=key)))(keys)
        self.final_norm = RMSNorm(m.dim, m.norm_eps)
        if not m.tie_embeddings:
            self.head = nnx.Param(
                0.5 * m.dim**-0.5 * jax.random.normal(rngs.params(), (m.dim, m.vocab_size))
            )

    def __call__(self, tokens_BL, segments_BL):
        """(logits_BLV in float32, Output) of packed rows; segment 0 is padding."""
        x_BLD, out = self.hidden(tokens_BL, segments_BL)
        return self.logits(x_BLD), out

    def hidden(self, tokens_BL, segments_BL, trace: bool = False):
        """(x_BLD after the last norm, Output) of packed rows. trace: with every token's experts."""
        place = attention_layer.packed_inputs(segments_BL, self.config)
        x_BLD, out = self._run(self._embed(tokens_BL), place, segments_BL > 0, None, trace)
        return x_BLD, out._replace(cache=None)

    def cached(self, tokens_BL, positions_BL, valid_BL, cache):
        """(x_BLD after the last norm, Output) of tokens at given positions after what the cache holds: prefill and
        decoding alike. `cache` is a pair [layers, B, S, G, C]; a position of S or more is not stored."""
        place = attention_layer.cached_inputs(positions_BL, cache[0].shape[2], self.config)
        return self._run(self._embed(tokens_BL), place, valid_BL, cache)

    def empty_cache(self, batch: int, length: int):
        m = self.config
        shape = (m.num_layers, batch, length, m.num_kv_heads or m.num_heads, m.dim // m.num_heads)
        return jnp.zeros(shape, m.dtype), jnp.zeros(shape, m.dtype)

    def logits(self, x_BLD):
        w_DV = self.head_weight()
        return jnp.einsum(
            "bld,dv->blv", x_BLD, w_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
        )

    def head_weight(self):
        """w_DV, the output embedding, float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _embed(self, tokens_BL):
        """Looks up the tokens; then the parts of the model width are exchanged axis by axis: else XLA gathers the
        embedding, and adds up all of its gradient everywhere."""
        # A tied embedding is small enough for logits, but too small beside a block's output (as in Gemma).
        scale = self.config.dim**0.5 if self.config.tie_embeddings else 1.0
        x_BLD = embedding.look_up(
            self.embedding[...], tokens_BL, jnp.dtype(self.config.dtype), scale, self.mesh
        )
        if self.mesh is not None:
            x_BLD = self._constrained(x_BLD, (sharding.DATA, sharding.FSDP), None, sharding.EXPERT)
        return self._spread(x_BLD)

    def _constrained(self, array, *axes):
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(self.mesh, PartitionSpec(*axes))
        )

    def _spread(self, x_BLD):
        """Its batch over all devices: weights that are cut along the model width must not cut activations there."""
        return (
            x_BLD
            if self.mesh is None
            else jax.lax.with_sharding_constraint(x_BLD, sharding.batch_sharding(self.mesh))
        )

    def _run(self, x_BLD, place, valid_BL, cache, trace=False):
        graph, stacked = nnx.split(self.blocks)

        def block(x_BLD, of_layer):
            weights, layer_cache = of_layer
            x_BLD, layer_cache, *rest = nnx.merge(graph, weights)(
                self._spread(x_BLD), place, valid_BL, layer_cache, trace
            )
            return x_BLD, (layer_cache if cache is not None else None, *rest)

        unroll, policy = self._unroll(x_BLD.shape[1]), self._policy()
        if (
            policy is not None
        ):  # only a loop keeps XLA from finding the forward pass's numbers again
            block = jax.checkpoint(block, prevent_cse=unroll > 1, policy=policy)
        x_BLD, (cache, balance_loss, z_loss, statistics, choices) = jax.lax.scan(
            block, x_BLD, (stacked, cache), unroll=unroll
        )
        return self.final_norm(x_BLD), Output(
            jnp.sum(balance_loss), jnp.sum(z_loss), statistics, cache, choices
        )

    def _unroll(self, length):
        """Blocks side by side, where few, are faster on CPU. But XLA then begins whatever it can, and what is computed
        again for a backward pass saves no memory."""
        if self.config.unroll:
            return min(self.config.unroll, self.config.num_layers)
        few = self.config.num_layers <= MOST_UNROLLED and sharding.chip_name(self.mesh) == "cpu"
        return (
            self.config.num_layers
            if few and self._policy() is None and length <= attention_layer.KEPT_LENGTH
            else 1
        )

    def _policy(self):
        """What a block keeps for its backward pass; None: everything."""
        if self.config.remat != "none":
            return _saved(self.config.remat)
        if (
            self.mesh is not None and self.mesh.shape[sharding.FSDP] > 1
        ):  # else every layer's whole weights are kept
            return _all_but_gathered_weights
        return None


def _all_but_gathered_weights(primitive, *_, **params):
    return not (primitive.name == "all_gather" and sharding.FSDP in params["axis_name"])


def _saved(remat):
    """What a rematerialised block keeps. Routing always: recomputed in another order of additions, a near tie could
    send a token to another expert than the forward pass did."""
    routing = jax.checkpoint_policies.save_only_these_names(ROUTING)
    if remat == "full":
        return routing
    return jax.checkpoint_policies.save_from_both_policies(
        routing, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )
