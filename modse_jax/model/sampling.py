"""Text from a model: prefill, then decoding through a key/value cache, for prompts of different lengths.

Legend: B batch, P padded prompt length, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modse_jax.runtime import gpu_options


class Settings(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Decoding(NamedTuple):
    """What the next token is drawn from, for B texts."""

    cache: tuple[jax.Array, jax.Array]  # keys, values [layers, B, S, G, C]
    logits_BV: jax.Array
    positions_B: jax.Array  # of the next token
    done_B: jax.Array  # whether a text has ended: it goes on as padding, and costs no expert


def stream(
    graph,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
    key: jax.Array,
    pad_id: int,
    eos_id: int,
    chunk: int,
) -> Iterator[list[list[int]]]:
    """New tokens after each prompt, without the end token, in pieces of `chunk` as they come; the same for any chunk.

    Args: graph, params: as from transformer.build_abstract. prompts: token ids, any lengths above 0, with
      prompt + max_new_tokens within the context. Prompts are padded on the right to a power of two, so that few shapes
      compile.
    Raises: ValueError for an empty prompt.
    """
    if not all(len(p) for p in prompts):
        raise ValueError("a prompt needs at least one token")
    tokens_BP, lengths_B = padded(prompts, 1 << (max(map(len, prompts)) - 1).bit_length(), pad_id)
    prefill_here, decode_here = _programs(jax.tree.leaves(params)[0].devices().pop())
    state = prefill_here(graph, params, tokens_BP, lengths_B, max_new_tokens)
    keys = jax.random.split(key, max_new_tokens)
    for first in range(0, max_new_tokens, chunk):
        ended = np.asarray(state.done_B)
        state, tokens_BN = decode_here(
            graph, params, state, keys[first : first + chunk], settings, pad_id, eos_id
        )
        yield [
            [] if over else _until(row, eos_id)
            for over, row in zip(ended, np.asarray(tokens_BN).tolist())
        ]
        if np.asarray(state.done_B).all():
            return


@functools.cache
def _programs(device: jax.Device) -> tuple[Callable, Callable]:
    """Returns `prefill` and `decode` for a device, compiled with its options where it has any. Options are of the
    outermost jit: the functions themselves may be part of another program."""
    options = gpu_options.compiler_options(device)
    if not options:
        return prefill, decode
    return (
        jax.jit(prefill.__wrapped__, static_argnums=(0, 4), compiler_options=options),
        jax.jit(decode.__wrapped__, static_argnums=(0, 4, 5, 6), compiler_options=options),
    )


def padded(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, length], lengths [B]), int32, padding on the right."""
    tokens_BP = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens_BP[i, : len(row)] = row
    return tokens_BP, np.array([len(row) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(graph, params, tokens_BP, lengths_B, max_new_tokens: int) -> Decoding:
    """The state after prompts of given lengths, with room for so many tokens. A row of length 0 is none, and done."""
    model = nnx.merge(graph, params)
    B, P = tokens_BP.shape
    positions_BP = jnp.broadcast_to(jnp.arange(P)[None, :], (B, P))
    cache = model.empty_cache(B, P + max_new_tokens)
    x_BPD, out = model.hidden_with_cache(
        tokens_BP, positions_BP, positions_BP < lengths_B[:, None], cache
    )
    last_B1D = jnp.take_along_axis(x_BPD, jnp.maximum(lengths_B[:, None, None] - 1, 0), axis=1)
    return Decoding(out.cache, model.logits(last_B1D)[:, 0], lengths_B, lengths_B == 0)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def decode(graph, params, state: Decoding, keys, settings: Settings, pad_id: int, eos_id: int):
    """(state, tokens [B, N]) of N more steps, one per key; after a text's end token, padding."""
    model = nnx.merge(graph, params)

    def step(state, key):
        tokens_B = jnp.where(state.done_B, pad_id, pick(state.logits_BV, settings, key))
        done_B = state.done_B | (tokens_B == eos_id)
        x_B1D, out = model.hidden_with_cache(
            tokens_B[:, None], state.positions_B[:, None], ~done_B[:, None], state.cache
        )
        return Decoding(
            out.cache, model.logits(x_B1D)[:, 0], state.positions_B + 1, done_B
        ), tokens_B

    state, tokens_NB = jax.lax.scan(step, state, keys)
    return state, tokens_NB.T


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
        before_BV = (
            jnp.cumsum(p_BV, axis=-1) - p_BV
        )  # probability ahead of a token: below top_p for those kept
        least_B1 = jnp.min(
            jnp.where(before_BV < settings.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)


def _until(tokens, end):
    return tokens[: tokens.index(end)] if end in tokens else tokens
