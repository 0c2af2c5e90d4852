"""A decoder-only Transformer in the form of Llama 2, with an MoE layer in every block.

The experts of an MoE layer may have different widths (MoDSE, section 3). A dense model has one
feed-forward network in place of the experts. All blocks have the same structure (block.py), so
their parameters are stacked along a leading axis of layers, and one `lax.scan` runs them: the size
of the program does not grow with the number of layers.

Legend: B batch, L length (in router_bias_LE: layers), S cache length, D model, V vocabulary,
E experts, K top-k, G key/value heads, C head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.config.options import Config, ModelConfig
from modse_jax.model import embedding
from modse_jax.model.attention.attention_layer import (
    MAX_SAVED_LENGTH,
    AttentionInputs,
    Cache,
    cached_inputs,
    packed_inputs,
)
from modse_jax.model.block import Block, BlockOutput
from modse_jax.model.initialization import draw_normal
from modse_jax.model.normalization import RMSNorm
from modse_jax.model.rematerialization import checkpoint_policy
from modse_jax.moe.router import RouterStatistics
from modse_jax.runtime import sharding

# The scan over at most this many blocks is unrolled on CPU if advanced.unroll is 0. A training step
# with seven size classes of experts then compiles in 45 s on 2 cores.
MAX_UNROLLED = 4


class ModelOutput(NamedTuple):
    """The results of a forward pass besides its activations."""

    balance_loss: jax.Array  # load-balancing loss, unweighted, summed over layers
    z_loss: jax.Array  # router z-loss, unweighted, summed over layers
    width_penalty: jax.Array  # width penalty, unweighted, summed over layers
    statistics: RouterStatistics  # every array has a leading axis of layers
    cache: Cache | None  # [layers, B, S, G, C]; None for packed rows
    choices: tuple[jax.Array, jax.Array] | None  # [layers, B, L, K], if requested


class Transformer(nnx.Module):
    """The model: token embedding, blocks, final norm, logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs, mesh: Mesh | None = None) -> None:
        self.config = config.model
        self.unroll = config.advanced.unroll
        self.mesh = mesh
        self.embedding = nnx.Param(_draw_embedding(config.model, rngs))

        def build_block(key: jax.Array) -> Block:
            return Block(config, mesh, nnx.Rngs(params=key))

        self.blocks = nnx.vmap(build_block)(
            jax.random.split(rngs.params(), config.model.num_layers)
        )
        self.final_norm = RMSNorm(config.model.dim, config.model.norm_eps)
        if not config.model.tie_embeddings:
            self.head = nnx.Param(_draw_head(config.model, rngs))

    def __call__(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array,
        router_bias_LE: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelOutput]:
        """Returns (logits_BLV in float32, ModelOutput) of packed rows.

        Args:
            segments_BL: the document number of every token, 0 for padding.
            router_bias_LE: see `run_blocks`.
        """
        x_BLD, output = self.hidden(tokens_BL, segments_BL, router_bias_LE=router_bias_LE)
        return self.logits(x_BLD), output

    def hidden(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array,
        trace: bool = False,
        router_bias_LE: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelOutput]:
        """Returns (x_BLD after the final norm, ModelOutput) of packed rows.

        Args:
            segments_BL: the document number of every token, 0 for padding.
            trace: also returns the gates and expert ids of every token.
            router_bias_LE: see `run_blocks`.
        """
        attention_inputs = packed_inputs(segments_BL, self.config)
        x_BLD = self.embed(tokens_BL)
        return self.run_blocks(
            x_BLD, attention_inputs, segments_BL > 0, trace=trace, router_bias_LE=router_bias_LE
        )

    def hidden_with_cache(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        valid_BL: jax.Array,
        cache: Cache,
        router_bias_LE: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelOutput]:
        """Returns (x_BLD after the final norm, ModelOutput) of tokens that extend a cache.

        Prefill and decoding both use it. Each row is one document.

        Args:
            positions_BL: positions of the tokens; keys at positions >= S are not stored.
            valid_BL: False for padding, which is routed to no expert.
            cache: keys and values of the tokens so far, [layers, B, S, G, C].
            router_bias_LE: see `run_blocks`.
        """
        keys, _ = cache
        attention_inputs = cached_inputs(positions_BL, keys.shape[2], self.config)
        return self.run_blocks(
            self.embed(tokens_BL), attention_inputs, valid_BL, cache, router_bias_LE=router_bias_LE
        )

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Returns a cache of zeros for `length` positions, [layers, B, S, G, C]."""
        num_groups = self.config.num_kv_heads or self.config.num_heads
        head_size = self.config.dim // self.config.num_heads
        shape = (self.config.num_layers, batch, length, num_groups, head_size)
        return jnp.zeros(shape, self.config.dtype), jnp.zeros(shape, self.config.dtype)

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns the embeddings of the tokens in the compute type, sharded over the batch.

        The table is sharded along the model dimension. Each device looks up its slice for all
        tokens of its group; then the slices are exchanged, one mesh axis after the other. Without
        these constraints, XLA all-gathers the table and all-reduces its full gradient.
        """
        # A tied embedding has the small standard deviation of a head, so it is scaled up (Gemma).
        scale = self.config.dim**0.5 if self.config.tie_embeddings else 1.0
        x_BLD = embedding.look_up(
            self.embedding[...], tokens_BL, jnp.dtype(self.config.dtype), scale, self.mesh
        )
        if self.mesh is not None:
            spec = PartitionSpec((sharding.DATA, sharding.FSDP), None, sharding.EXPERT)
            layout = NamedSharding(self.mesh, spec)
            x_BLD = jax.lax.with_sharding_constraint(x_BLD, layout)
        return self._shard_batch(x_BLD)

    def run_blocks(
        self,
        x_BLD: jax.Array,
        attention_inputs: AttentionInputs,
        valid_BL: jax.Array,
        cache: Cache | None = None,
        trace: bool = False,
        router_bias_LE: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelOutput]:
        """Scans the blocks; returns (x_BLD after the final norm, ModelOutput).

        Args:
            valid_BL: False for padding, which is routed to no expert.
            cache: keys and values of the tokens so far; None for packed rows.
            trace: also returns the gates and expert ids of every token.
            router_bias_LE: for every layer, is added to the scores that experts are chosen by
                (loss-free balancing); None for no bias.
        """
        block_graph, stacked_weights = nnx.split(self.blocks)

        def run_block(
            x_BLD: jax.Array, of_layer: tuple[dict, Cache | None, jax.Array | None]
        ) -> tuple[jax.Array, BlockOutput]:
            weights, layer_cache, router_bias_E = of_layer
            block = nnx.merge(block_graph, weights)
            x_BLD = self._shard_batch(x_BLD)
            return block(x_BLD, attention_inputs, valid_BL, layer_cache, trace, router_bias_E)

        unroll = self._blocks_per_iteration(length=x_BLD.shape[1])
        policy = checkpoint_policy(self.config.remat, self.mesh)
        if policy is not None:
            # With several blocks per iteration, XLA could merge the recomputation with the forward
            # pass (common subexpression elimination), which would save the activations after all.
            run_block = jax.checkpoint(run_block, prevent_cse=unroll > 1, policy=policy)
        of_layers = (stacked_weights, cache, router_bias_LE)
        x_BLD, outputs = jax.lax.scan(run_block, x_BLD, of_layers, unroll=unroll)
        x_BLD = self.final_norm(x_BLD)
        return x_BLD, ModelOutput(
            balance_loss=jnp.sum(outputs.balance_loss),
            z_loss=jnp.sum(outputs.z_loss),
            width_penalty=jnp.sum(outputs.width_penalty),
            statistics=outputs.statistics,
            cache=outputs.cache,
            choices=outputs.choices,
        )

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Returns logits_BLV in float32, for activations after the final norm."""
        w_DV = self.head_weight().astype(x_BLD.dtype)
        return jnp.einsum("bld,dv->blv", x_BLD, w_DV, preferred_element_type=jnp.float32)

    def head_weight(self) -> jax.Array:
        """Returns w_DV, the output embedding, in float32."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _shard_batch(self, x_BLD: jax.Array) -> jax.Array:
        """Shards the batch over all devices, and nothing else.

        Without the constraint, XLA would shard activations along the model dimension, as the
        weights are.
        """
        if self.mesh is None:
            return x_BLD
        return jax.lax.with_sharding_constraint(x_BLD, sharding.batch_sharding(self.mesh))

    def _blocks_per_iteration(self, length: int) -> int:
        """Returns the number of blocks per iteration of the scan.

        Unrolling a model of few layers is faster on CPU. It is not done with rematerialization:
        XLA for CPU would start the recomputation of all blocks early, so that no memory would be
        saved. Nor is it done for long sequences, whose scores are recomputed in the same way.
        """
        num_layers = self.config.num_layers
        if self.unroll:
            return min(self.unroll, num_layers)
        is_shallow = num_layers <= MAX_UNROLLED
        is_cpu = sharding.chip_name(self.mesh) == "cpu"
        saves_all = checkpoint_policy(self.config.remat, self.mesh) is None
        saves_scores = length <= MAX_SAVED_LENGTH
        return num_layers if is_shallow and is_cpu and saves_all and saves_scores else 1


def _draw_embedding(config: ModelConfig, rngs: nnx.Rngs) -> jax.Array:
    """Returns the initial embedding [V, D].

    Without `model.init_std`, the usual standard deviation of 0.02 is not used: the output of a
    pre-norm block is about 1, and would at first hide the token (LOG.md, 2026-11-22). A tied
    embedding is initialized as the head that it also is; `Transformer.embed` scales it up.
    """
    shape = (config.vocab_size, config.dim)
    if config.init_std:
        return draw_normal(rngs, shape, config.init_std)
    std = _head_std(config) if config.tie_embeddings else 0.5
    return std * jax.random.normal(rngs.params(), shape)


def _draw_head(config: ModelConfig, rngs: nnx.Rngs) -> jax.Array:
    """Returns the initial head [D, V]."""
    shape = (config.dim, config.vocab_size)
    if config.init_std:
        return draw_normal(rngs, shape, config.init_std)
    return _head_std(config) * jax.random.normal(rngs.params(), shape)


def _head_std(config: ModelConfig) -> float:
    return 0.5 * config.dim**-0.5


def build_model(
    config: Config, mesh: Mesh | None = None, seed: jax.Array | None = None
) -> Transformer:
    """Returns a freshly initialized model. The weights do not depend on the mesh.

    Args:
        config: the config.
        mesh: the mesh.
        seed: the seed, as a scalar; None for config.seed.
    """
    key = config.seed if seed is None else jax.random.key(seed)
    return Transformer(config, nnx.Rngs(params=key), mesh)


def build_abstract_model(config: Config, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, dict]:
    """Returns (graph, shapes and types of the parameters as a dict) without allocating memory."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, mesh)))
    return graph, nnx.to_pure_dict(state)
