"""Text from a model: prefill, then decoding through a key/value cache, for prompts of different lengths.

Legend: B batch, P padded prompt length, V vocabulary.
"""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Settings(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generate(graph, params, prompts: Sequence[Sequence[int]], max_new_tokens: int, settings: Settings,
             key: jax.Array, pad_id: int, eos_id: int) -> list[list[int]]:
    """New tokens after each prompt, without the end token.

    Args: graph, params: as from transformer.build_abstract. prompts: token ids, any lengths above 0, with
      prompt + max_new_tokens within the context. Prompts are padded on the right to a power of two, so that few shapes
      compile.
    Raises: ValueError for an empty prompt.
    """
    if not all(len(p) for p in prompts):
        raise ValueError("a prompt needs at least one token")
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    tokens_BP = np.full((len(prompts), 1 << (int(lengths_B.max()) - 1).bit_length()), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, :len(prompt)] = prompt
    out = np.asarray(_generate(graph, params, tokens_BP, lengths_B, key, max_new_tokens, settings, pad_id, eos_id))
    return [_until(row.tolist(), eos_id) for row in out]


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def _generate(graph, params, tokens_BP, lengths_B, key, max_new_tokens, settings, pad_id, eos_id):
    model = nnx.merge(graph, params)
    B, P = tokens_BP.shape
    positions_BP = jnp.broadcast_to(jnp.arange(P)[None, :], (B, P))
    cache = model.empty_cache(B, P + max_new_tokens)
    x_BPD, out = model.cached(tokens_BP, positions_BP, positions_BP < lengths_B[:, None], cache)
    last_B1D = jnp.take_along_axis(x_BPD, lengths_B[:, None, None] - 1, axis=1)

    def step(carry, key):
        cache, logits_BV, positions_B, done_B = carry
        tokens_B = jnp.where(done_B, pad_id, pick(logits_BV, settings, key))
        done_B |= tokens_B == eos_id
        x_B1D, out = model.cached(tokens_B[:, None], positions_B[:, None], ~done_B[:, None], cache)
        return (out.cache, model.logits(x_B1D)[:, 0], positions_B + 1, done_B), tokens_B

    carry = (out.cache, model.logits(last_B1D)[:, 0], lengths_B, jnp.zeros((B,), bool))
    _, tokens = jax.lax.scan(step, carry, jax.random.split(key, max_new_tokens))
    return tokens.T


def pick(logits_BV: jax.Array, settings: Settings, key: jax.Array) -> jax.Array:
    """Token ids [B]: the likeliest at temperature 0, else a draw after top-k, then top-p (Holtzman et al. 2020)."""
    if settings.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / settings.temperature
    if settings.top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(settings.top_k, logits_BV.shape[1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if settings.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV    # probability ahead of a token: below top_p for those kept
        least_B1 = jnp.min(jnp.where(before_BV < settings.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)


def _until(tokens, end):
    return tokens[:tokens.index(end)] if end in tokens else tokens
