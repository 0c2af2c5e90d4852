"""Activation checkpointing: what is recomputed, and that it saves memory."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from modse_jax.config.options import Config
from modse_jax.model import transformer
from tests.helpers.configs import tiny_config


def gradient_of(config: Config):
    """Returns (gradient function of (params, tokens), parameter shapes)."""
    graph, params = transformer.build_abstract_model(config)

    def loss(params, tokens):
        logits, _ = nnx.merge(graph, params)(tokens, jnp.ones_like(tokens))
        return jnp.sum(logits)

    return jax.grad(loss), params


@pytest.mark.parametrize("remat, recomputed", [("full", 11), ("save_routing_and_dots", 2)])
def test_remat_recomputes_matmuls_but_not_the_routing(remat, recomputed):
    """Counts the matmuls beyond those of "none".

    "full" recomputes 4 of attention, 1 of the router, and 3 of each of 2 experts. With matmuls
    saved, those with a batch dimension remain: the scores, and their sum over values.
    """

    def trace(remat):
        two_experts = dict(num_experts=2, widths=(), pairs=False)
        gradient, params = gradient_of(tiny_config(model=dict(remat=remat), moe=two_experts))
        return str(jax.make_jaxpr(gradient)(params, jnp.ones((2, 8), jnp.int32)))

    plain, text = trace("none"), trace(remat)
    # The choice of the top-k experts on CPU begins with the only bitcast of the program.
    assert text.count("bitcast_convert_type[") == 1
    assert text.count("dot_general[") - plain.count("dot_general[") == recomputed


def test_unrolled_recomputation_is_separated_from_the_forward_pass_by_barriers():
    """A scan without unrolling needs no barrier, which would prevent fusions."""

    def count_barriers(remat, unroll):
        gradient, params = gradient_of(
            tiny_config(model=dict(remat=remat, num_layers=3), advanced=dict(unroll=unroll))
        )
        lowered = jax.jit(gradient).lower(params, jnp.ones((2, 8), jnp.int32))
        return lowered.as_text().count("optimization_barrier")

    assert count_barriers("full", 3) > count_barriers("none", 3)
    assert count_barriers("full", 1) == count_barriers("none", 1)


def test_remat_and_scanned_long_sequences_reduce_memory():
    """XLA for CPU would start the recomputation of all blocks early if they were unrolled."""

    def memory(remat, length=64, unroll=0):
        gradient, params = gradient_of(
            tiny_config(
                model=dict(remat=remat, num_layers=4, vocab_size=32, context_length=2048),
                advanced=dict(unroll=unroll),
            )
        )
        tokens = jax.ShapeDtypeStruct((2048 // length, length), jnp.int32)
        compiled = jax.jit(gradient).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory("full") < 0.6 * memory("none")
    long_unrolled = memory("none", length=2048, unroll=4)
    assert memory("none", length=2048) < 0.75 * long_unrolled
