"""Text generation: prefill, then decoding through a key/value cache.

The prompts of a batch may have different lengths.

Legend: B batch, P padded prompt length, N new tokens, D model, V vocabulary, S cache length,
G key/value heads, C head size, L layers, E experts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modse_jax.model.attention.attention_layer import Cache
from modse_jax.model.variables import Variables
from modse_jax.runtime import gpu_options


class Settings(NamedTuple):
    """Options for drawing the next token from the model's distribution."""

    temperature: float = 1.0  # 0 is greedy decoding
    top_k: int = 0  # draws from the top_k most likely tokens; 0 from all
    # Draws from the fewest most likely tokens that have at least this probability: 0 from the most
    # likely token, 1 from all.
    top_p: float = 1.0


class DecodingState(NamedTuple):
    """The state of the texts of a batch between two decoding steps."""

    cache: Cache  # keys and values of all tokens so far, [layers, B, S, G, C]
    logits_BV: jax.Array  # logits of the next token
    positions_B: jax.Array  # position of the next token
    done_B: jax.Array  # True after the end token: padding follows, which is routed to no expert


def stream(
    graph: nnx.GraphDef,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
    key: jax.Array,
    pad_id: int,
    eos_id: int,
    chunk: int,
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every prompt, `chunk` tokens at a time, without the end token.

    The tokens do not depend on `chunk`. Prompts are padded on the right to a power of two, so that
    few shapes have to be compiled.

    Args:
        graph: see transformer.build_abstract_model.
        variables: the arrays of the model.
        prompts: token ids. Every prompt needs at least one token, and its length plus
            max_new_tokens must be within the context.
        max_new_tokens: the number of tokens to generate, unless the end token comes first.
        settings: how tokens are drawn.
        key: the random key of the draws.
        pad_id, eos_id: the token ids of padding and of the end of a document.
        chunk: the number of tokens between two yields.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    tokens_BP, lengths_B = pad_rows(prompts, 1 << (longest - 1).bit_length(), pad_id)
    device = jax.tree.leaves(variables)[0].devices().pop()
    prefill_on_device, decode_on_device = programs_for(device)
    state = prefill_on_device(graph, variables, tokens_BP, lengths_B, max_new_tokens)
    keys = jax.random.split(key, max_new_tokens)
    for first in range(0, max_new_tokens, chunk):
        was_done_B = np.asarray(state.done_B)
        chunk_keys = keys[first : first + chunk]
        state, tokens_BN = decode_on_device(
            graph, variables, state, chunk_keys, settings, pad_id, eos_id
        )
        rows = np.asarray(tokens_BN).tolist()
        yield [
            [] if was_done else _truncate_at(row, eos_id) for was_done, row in zip(was_done_B, rows)
        ]
        if np.asarray(state.done_B).all():
            return


@functools.cache
def programs_for(device: jax.Device) -> tuple[Callable, Callable]:
    """Returns `prefill` and `decode`, jitted with the compiler options for the device, if any.

    XLA takes compiler options only at the outermost jit. `prefill` and `decode` cannot carry them
    themselves, because the benchmarks call them inside a jit of their own.
    """
    options = gpu_options.compiler_options(device)
    if not options:
        return prefill, decode
    return (
        jax.jit(prefill.__wrapped__, static_argnums=(0, 4), compiler_options=options),
        jax.jit(decode.__wrapped__, static_argnums=(0, 4, 5, 6), compiler_options=options),
    )


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens [B, length], lengths [B]), int32, with padding on the right."""
    tokens_BP = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens_BP[i, : len(row)] = row
    return tokens_BP, np.array([len(row) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
    graph: nnx.GraphDef,
    variables: Variables,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    max_new_tokens: int,
) -> DecodingState:
    """Runs the prompts through the model, and returns the state before the first new token.

    Args:
        graph, params: see transformer.build_abstract_model.
        tokens_BP: the prompts, padded on the right.
        lengths_B: the number of tokens of each prompt. 0 marks a row that only fills the batch;
            nothing is generated for it.
        max_new_tokens: the number of further tokens that the cache has room for.
    """
    model = nnx.merge(graph, variables.params)
    B, P = tokens_BP.shape
    positions_BP = jnp.broadcast_to(jnp.arange(P)[None, :], (B, P))
    cache = model.empty_cache(B, P + max_new_tokens)
    valid_BP = positions_BP < lengths_B[:, None]
    x_BPD, output = model.hidden_with_cache(
        tokens_BP, positions_BP, valid_BP, cache, variables.router_bias_LE
    )
    last_B11 = jnp.maximum(lengths_B[:, None, None] - 1, 0)
    x_B1D = jnp.take_along_axis(x_BPD, last_B11, axis=1)
    return DecodingState(
        cache=output.cache,
        logits_BV=model.logits(x_B1D)[:, 0],
        positions_B=lengths_B,
        done_B=lengths_B == 0,
    )


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def decode(
    graph: nnx.GraphDef,
    variables: Variables,
    state: DecodingState,
    keys: jax.Array,
    settings: Settings,
    pad_id: int,
    eos_id: int,
) -> tuple[DecodingState, jax.Array]:
    """Draws N new tokens of every text, one for each of N keys.

    Returns (the state after them, tokens [B, N]). After the end token of a text, its tokens are
    padding.
    """
    model = nnx.merge(graph, variables.params)

    def decode_token(state: DecodingState, key: jax.Array) -> tuple[DecodingState, jax.Array]:
        tokens_B = jnp.where(state.done_B, pad_id, pick(state.logits_BV, settings, key))
        done_B = state.done_B | (tokens_B == eos_id)
        x_B1D, output = model.hidden_with_cache(
            tokens_B[:, None],
            state.positions_B[:, None],
            ~done_B[:, None],
            state.cache,
            variables.router_bias_LE,
        )
        logits_BV = model.logits(x_B1D)[:, 0]
        state = DecodingState(output.cache, logits_BV, state.positions_B + 1, done_B)
        return state, tokens_B

    state, tokens_NB = jax.lax.scan(decode_token, state, keys)
    return state, tokens_NB.T


def pick(logits_BV: jax.Array, settings: Settings, key: jax.Array) -> jax.Array:
    """Returns the next token ids [B].

    At temperature 0 it is the token with the largest logit. Otherwise a token is drawn from those
    that top-k and then top-p (nucleus) sampling keep (Holtzman et al. 2020). Tokens that are as
    likely as the least likely one of these are kept as well, so ties may be more than top_k tokens.
    """
    # A temperature that float32 cannot represent as a normal number would divide by 0.
    if settings.temperature < jnp.finfo(jnp.float32).tiny:
        return jnp.argmax(logits_BV, axis=-1)
    # The largest logit becomes 0, because any other might become infinite.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / settings.temperature
    if settings.top_k:
        logits_BV = _mask_top_k(logits_BV, settings.top_k)
    if settings.top_p < 1:
        logits_BV = _mask_top_p(logits_BV, settings.top_p)
    return jax.random.categorical(key, logits_BV, axis=-1)


def _mask_top_k(logits_BV: jax.Array, top_k: int) -> jax.Array:
    """Sets all logits to -inf that are smaller than the top_k-th largest."""
    largest, _ = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[1]))
    smallest_allowed_B1 = largest[:, -1:]
    return jnp.where(logits_BV < smallest_allowed_B1, -jnp.inf, logits_BV)


def _mask_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Sets to -inf all but the fewest largest logits whose probabilities sum to top_p.

    The largest logit is always kept.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is allowed if the more likely tokens have less than top_p together.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    is_largest_V = jnp.arange(logits_BV.shape[1]) == 0
    is_allowed_BV = (before_BV < top_p) | is_largest_V[None, :]
    allowed_BV = jnp.where(is_allowed_BV, sorted_BV, jnp.inf)
    smallest_allowed_B1 = jnp.min(allowed_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV < smallest_allowed_B1, -jnp.inf, logits_BV)


def _truncate_at(tokens: list[int], end: int) -> list[int]:
    """Returns the tokens before the first `end`."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
