"""Text generation through the key/value cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modse_jax.model import sampling, transformer
from modse_jax.model.variables import Variables
from tests.helpers.configs import tiny_config
from tests.helpers.models import build_forward, random_tokens

CONFIG = tiny_config()
KEY = jax.random.key(0)
GREEDY = sampling.Settings(temperature=0.0)


def generate(graph, params, prompts, max_new_tokens, settings, pad_id, eos_id) -> list[list[int]]:
    """Returns all new tokens of every prompt."""
    rows = [[] for _ in prompts]
    for pieces in sampling.stream(
        graph,
        Variables(params, {}),
        prompts,
        max_new_tokens,
        settings,
        KEY,
        pad_id,
        eos_id,
        chunk=4,
    ):
        rows = [row + piece for row, piece in zip(rows, pieces)]
    return rows


def generate_without_cache(forward, params, prompt, max_new_tokens, eos_id) -> list[int]:
    """Returns the greedy continuation, computing the forward pass of every prefix."""
    text = list(prompt)
    for _ in range(max_new_tokens):
        padded = jnp.asarray([text + [0] * (14 - len(text))])
        segments = (jnp.arange(14) < len(text)).astype(jnp.int32)[None]
        logits, _ = forward(params, padded, segments)
        token = int(jnp.argmax(logits[0, len(text) - 1]))
        if token == eos_id:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        dict(moe=dict(backend="blocked")),
        dict(model=dict(num_kv_heads=1, tie_embeddings=True)),
        dict(moe=dict(router_noise="learned", gate="softmax_top_k")),
    ],
)
def test_decoding_through_the_cache_equals_the_full_forward_pass(options):
    """Greedy decoding of prompts of different lengths."""
    config = tiny_config(**options)
    params, forward = build_forward(config)
    graph, _ = transformer.build_abstract_model(config)
    prompts = [random_tokens((length,), seed=length).tolist() for length in (1, 5, 8)]
    results = generate(graph, params, prompts, 6, GREEDY, pad_id=0, eos_id=2)
    for prompt, result in zip(prompts, results):
        assert result == generate_without_cache(forward, params, prompt, 6, eos_id=2)


@pytest.mark.parametrize(
    "settings, drawn",
    [
        (sampling.Settings(), {0, 1, 2, 3}),
        (sampling.Settings(top_k=2), {0, 1}),
        (sampling.Settings(top_p=0.6), {0, 1}),
        (sampling.Settings(top_p=0.5), {0}),
        (sampling.Settings(top_p=0.0), {0}),
        (sampling.Settings(temperature=0), {0}),
        (sampling.Settings(temperature=0.05), {0}),
    ],
)
def test_only_allowed_tokens_are_drawn(settings, drawn):
    logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(KEY, 300)
    tokens = jax.vmap(lambda key: sampling.pick(logits_BV, settings, key)[0])(keys)
    assert set(np.unique(tokens)) == drawn


@pytest.mark.parametrize("settings", [sampling.Settings(top_k=3), sampling.Settings(top_p=0.5)])
def test_equally_likely_tokens_are_kept(settings):
    logits_BV = jnp.array([[0.0] * 10 + [-1.0]] * 1000)
    tokens = sampling.pick(logits_BV, settings, KEY)
    assert set(np.unique(tokens)) == set(range(10))


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-50])
def test_tiny_temperatures_draw_the_most_likely_token(temperature):
    logits_BV = jnp.array([[1.0, 2.0, 3.0], [-1.0, -300.0, -2.0]])
    for settings in (sampling.Settings(temperature), sampling.Settings(temperature, 2, 0.9)):
        assert sampling.pick(logits_BV, settings, KEY).tolist() == [2, 0]


def test_generation_stops_at_the_end_token():
    """With a head of zeros, all logits are 0, and the first id is drawn: the end token."""
    params, _ = build_forward(CONFIG)
    graph, _ = transformer.build_abstract_model(CONFIG)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    assert generate(graph, params, [[5, 6]], 4, GREEDY, pad_id=9, eos_id=0) == [[]]


def test_empty_prompts_are_an_error():
    params, _ = build_forward(CONFIG)
    graph, _ = transformer.build_abstract_model(CONFIG)
    with pytest.raises(ValueError, match="at least one token"):
        generate(graph, params, [[]], 4, sampling.Settings(), pad_id=0, eos_id=2)
