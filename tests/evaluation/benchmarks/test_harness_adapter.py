"""The harness adapter and its engine: scores and text against direct forward passes."""

import concurrent.futures
import math
import queue
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from modse_jax.data import tokenizers
from modse_jax.evaluation import model_loading
from modse_jax.evaluation.benchmarks import batch_engine, harness_adapter
from modse_jax.model import kernel_selection, transformer
from modse_jax.model.variables import Variables
from modse_jax.runtime import processes, sharding
from modse_jax.training import train_step
from tests.helpers.configs import tiny_config

CONTEXT = 64  # context_length of the model
BOS = 1
EOS = 2

TEXTS = [
    ("The cat", " sat"),
    ("", "alone"),
    ("The cat", " ran"),
    ("a b c d e f g h i j k l m n o p q r s t", " u v"),
    ("x", "y" * 30),
    ("The cat", " sat on the mat"),
    ("trailing ", "space"),
    ("z" * 90, "cut"),
]


def load(config, devices=1, params=None):
    mesh = sharding.build_batch_mesh(devices)
    params = params or jax.jit(lambda: train_step.init_state(config))().params
    params = jax.device_put(params, sharding.replicated(mesh))
    data = types.SimpleNamespace(tokenizer=tokenizers.Bytes())
    return model_loading.LoadedModel(config, data, mesh, 0, Variables(params, {}))


def make_adapter(model, devices=1, batch_size=0):
    config, params = model
    return harness_adapter.Adapter(load(config, devices, params), batch_size)


@pytest.fixture(scope="module")
def model():
    """A config and parameters whose most likely token is not always the same."""
    config = tiny_config()
    params = jax.jit(lambda: train_step.init_state(config))().params
    return config, {**params, "head": 4 * params["head"]}


def make_requests(kind, arguments):
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def score(adapter, texts=TEXTS):
    return adapter.loglikelihood(make_requests("loglikelihood", texts), disable_tqdm=True)


def score_rolling(adapter, text):
    requests = make_requests("loglikelihood_rolling", [(text,)])
    (total,) = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    return total


def generate(adapter, prompts, **options):
    requests = make_requests("generate_until", [(prompt, options) for prompt in prompts])
    return adapter.generate_until(requests, True)


def encode(text):
    return tokenizers.Bytes().encode(text.encode()).tolist()


def make_forward(config):
    """Returns a jitted function (params, tokens [1, L], valid [1, L]) -> logits."""
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    return jax.jit(lambda params, row, valid: nnx.merge(graph, params)(row, valid)[0])


def last_logits(config, params, ids):
    row = jnp.asarray(ids, jnp.int32)[None]
    return make_forward(config)(params, row, jnp.ones_like(row))[0, -1]


def score_directly(model, context, continuation):
    """Returns (log p, greedy) by one forward pass over one row without padding."""
    config, params = model
    ids = [BOS, *encode(context), *encode(continuation)][-CONTEXT - 1 :]
    row = jnp.asarray(ids, jnp.int32)[None, :-1]
    logits = make_forward(config)(params, row, jnp.ones_like(row))[0]
    log_p = jax.nn.log_softmax(logits)
    end = len(ids) - 1
    positions = range(end - len(continuation.encode()), end)
    total = sum(float(log_p[i, ids[i + 1]]) for i in positions)
    return total, all(int(jnp.argmax(log_p[i])) == ids[i + 1] for i in positions)


def test_a_uniform_model_has_log2_of_the_vocabulary_bits_per_token(model):
    config, params = model
    uniform = {**params, "head": jnp.zeros_like(params["head"])}
    adapter = make_adapter((config, uniform))
    expected = pytest.approx(math.log2(config.model.vocab_size), rel=1e-6)
    text = "What is nine times seven? " * 9  # 234 tokens, so several windows
    assert -score_rolling(adapter, text) / math.log(2) / len(text) == expected
    for (_, continuation), (log_p, _) in zip(TEXTS, score(adapter)):
        # The last blank of the context is scored with the continuation.
        num_tokens = len(continuation) + (continuation == "space")
        assert -log_p / math.log(2) / num_tokens == expected


def test_loglikelihoods_equal_a_direct_forward_pass(model):
    config, params = model
    likely_token = int(jnp.argmax(last_logits(config, params, [BOS])))
    likely = tokenizers.Bytes().decode([likely_token]).decode("latin-1")
    texts = TEXTS + ([("", likely)] if likely.isascii() and likely else [])
    adapter = make_adapter(model)
    for (context, continuation), (log_p, is_greedy) in zip(texts, score(adapter, texts)):
        if context == "trailing ":
            expected, _ = score_directly(model, "trailing", " space")
            assert log_p == pytest.approx(expected, abs=1e-4)
        else:
            expected, expected_greedy = score_directly(model, context, continuation)
            assert log_p == pytest.approx(expected, abs=1e-4)
            assert is_greedy == expected_greedy
    assert adapter.counts["contexts_truncated"] == 1
    assert adapter.counts["continuations_truncated"] == 0


def test_only_the_most_likely_continuation_is_greedy(model):
    """Uses token ids, since the most likely ones are not valid text."""
    config, params = model
    context = [BOS, 70, 71]
    best = []
    for _ in range(3):
        best.append(int(jnp.argmax(last_logits(config, params, context + best))))
    other_last = [*best[:2], best[2] - 1]
    other_first = [best[0] - 1, *best[1:]]
    requests = [(("", ""), context, ids) for ids in (best, other_last, other_first)]
    scores = make_adapter(model)._loglikelihood_tokens(requests, True)
    assert [is_greedy for _, is_greedy in scores] == [True, False, False]
    assert scores[0][0] > scores[1][0]


@pytest.mark.parametrize(
    "devices, batch_size, order",
    [
        (1, 3, -1),
        (8, 0, -1),
        pytest.param(1, 1, 1, marks=pytest.mark.slow),
        pytest.param(8, 8, 1, marks=pytest.mark.slow),
    ],
)
def test_a_score_depends_on_its_request_only(model, devices, batch_size, order):
    expected = score(make_adapter(model))
    others = TEXTS + [(f"other {i}", f" text {i}") for i in range(20)]
    scores = score(make_adapter(model, devices, batch_size), others[::order])[::order]
    for (log_p, is_greedy), (other_log_p, other_is_greedy) in zip(expected, scores):
        assert log_p == pytest.approx(other_log_p, rel=1e-6, abs=1e-5)
        assert is_greedy == other_is_greedy


def test_requests_that_share_a_context_share_a_row(model, monkeypatch):
    scored = []

    def score_nothing(self, rows, *_):
        scored.extend(rows)
        return [(row, [(0.0, True)] * len(row.candidates)) for row in rows]

    monkeypatch.setattr(batch_engine.Engine, "score", score_nothing)
    score(make_adapter(model), [("question", f" {letter}") for letter in "ABCDEFGHIJA"])
    assert [len(row.candidates) for row in scored] == [8, 2]


def test_long_text_is_truncated_on_the_left_and_counted(model):
    adapter = make_adapter(model)
    scores = score(adapter, [("a", "b" * 100), ("a" * 100, "b")])
    assert adapter.counts["continuations_truncated"] == 1
    assert adapter.counts["contexts_truncated"] == 2
    expected, _ = score_directly(model, "b" * 36, "b" * 64)
    assert scores[0][0] == pytest.approx(expected, abs=1e-4)
    generate(adapter, ["c" * 100], until=[], max_gen_toks=100)
    assert adapter.counts["contexts_truncated"] == 3
    assert adapter.counts["generations_shortened"] == 1


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_generation_equals_full_recomputation(model, devices):
    """Compares greedy text from padded batches and a cache with a new pass for every token."""
    config, params = model
    prompts = ["a", "some longer text", "b" * 20, "c" * 60]
    num_new = 12
    adapter = make_adapter(model, devices)
    texts = generate(adapter, prompts, until=["\x00"], max_gen_toks=num_new)
    forward = make_forward(config)
    for prompt, text in zip(prompts, texts):
        ids = [BOS, *encode(prompt)][-(CONTEXT - num_new) :]
        new = []
        for _ in range(num_new):
            row = ids + new
            padded = jnp.asarray([row + [0] * (CONTEXT - len(row))])
            valid = (jnp.arange(CONTEXT)[None, :] < len(row)).astype(jnp.int32)
            logits = forward(params, padded, valid)
            new.append(int(jnp.argmax(logits[0, len(row) - 1])))
        new = new[: new.index(EOS)] if EOS in new else new
        expected = tokenizers.Bytes().decode(new).decode("utf-8", "replace")
        assert text == expected.split("\x00")[0]


def record_programs(adapter, monkeypatch):
    """Returns a list to which the kind of every program is added when it runs."""
    kinds = []
    run = adapter.engine.programs.run

    def run_and_record(kind, *rest):
        kinds.append(kind)
        return run(kind, *rest)

    monkeypatch.setattr(adapter.engine.programs, "run", run_and_record)
    return kinds


@pytest.mark.parametrize(
    "options, settings",
    [
        (dict(), (0.0, 0, 1.0)),
        (dict(do_sample=False, temperature=0.7), (0.0, 0, 1.0)),
        (dict(do_sample=True), (1.0, 0, 1.0)),
        (dict(do_sample=True, temperature=0.0), (0.0, 0, 1.0)),
        (dict(temperature=0.5, top_k=-1, top_p=0.0), (0.5, 0, 0.0)),
        (dict(do_sample=True, top_k=0, top_p=None), (1.0, 0, 1.0)),
        (dict(temperature=0.5, top_k=3, top_p=0.9), (0.5, 3, 0.9)),
    ],
)
def test_sampling_options_of_the_harness_keep_their_zeros(options, settings):
    options = normalize_gen_kwargs({"until": [], **options})
    assert harness_adapter._sampling_settings(options) == settings


def test_generation_ends_at_a_stop_string(model, monkeypatch):
    """No chunk of 8 tokens is computed after one with a stop string."""
    monkeypatch.setattr(batch_engine, "CHUNK", 8)
    adapter = make_adapter(model)
    kinds = record_programs(adapter, monkeypatch)
    (long,) = generate(adapter, ["Once"], until=[], max_gen_toks=20)
    assert kinds == ["prefill", "decode", "decode", "decode"]
    assert len(long) > 11
    kinds.clear()
    stop = long[9:11]
    assert generate(adapter, ["Once"], until=[stop, ""], max_gen_toks=20) == [long.split(stop)[0]]
    assert len(kinds) <= 3


def test_generated_text_does_not_depend_on_the_chunk_size(model, monkeypatch):
    texts = []
    for chunk in (8, 20):
        monkeypatch.setattr(batch_engine, "CHUNK", chunk)
        texts += generate(make_adapter(model), ["Once"], until=None, max_gen_toks=20)
    assert texts[0] == texts[1]


def test_long_texts_are_scored_in_windows(model):
    config, params = model
    text = "What is nine times seven, and why?  " * 4
    ids = [BOS, *encode(text)]
    forward = make_forward(config)
    expected = 0.0
    # Each window predicts CONTEXT tokens. The last one is shorter, and its input includes tokens
    # before it.
    for first in range(0, len(ids) - 1, CONTEXT):
        stop = min(first + CONTEXT, len(ids) - 1)
        start = max(stop - CONTEXT, 0)
        row = jnp.asarray(ids[start:stop], jnp.int32)[None]
        log_p = jax.nn.log_softmax(forward(params, row, jnp.ones_like(row))[0])
        expected += sum(float(log_p[i - start, ids[i + 1]]) for i in range(first, stop))
    assert score_rolling(make_adapter(model), text) == pytest.approx(expected, rel=1e-6)


def connect_two_threads(monkeypatch):
    """Replaces communication between processes by a queue from this thread to another one."""
    messages = queue.Queue()
    leader = threading.current_thread()

    def gather(text):
        if threading.current_thread() is leader:
            messages.put(text)
            return [text]
        return [messages.get(timeout=60)]

    def broadcast(arrays):
        if threading.current_thread() is not leader:
            return messages.get(timeout=60)
        messages.put({name: array.copy() for name, array in arrays.items()})
        return arrays

    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "broadcast", broadcast)


def test_other_processes_run_the_programs_of_the_main_process(model, monkeypatch):
    """Runs two engines in two threads: the first one's scores are those of a single process."""
    expected = score(make_adapter(model))
    first = make_adapter(model)
    second = make_adapter(model)
    connect_two_threads(monkeypatch)
    kinds = record_programs(second, monkeypatch)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        follower = pool.submit(second.engine.programs.follow)
        scores = score(first)
        generate(first, ["a"], max_gen_toks=4)
        first.engine.programs.release("some trouble")
        assert follower.result(timeout=60) == "some trouble"
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    log_p = [log_p for log_p, _ in scores]
    np.testing.assert_allclose(log_p, [log_p for log_p, _ in expected], rtol=1e-6)
    assert set(kinds) == {"score", "prefill", "decode"}


def test_batches_are_as_large_as_memory_allows(model, monkeypatch):
    config, params = model
    engine = batch_engine.Engine(load(config, params=params), 0)
    monkeypatch.setattr(batch_engine, "free_memory", lambda device: 2 << 20)
    limited = engine.max_batch_size(64, 0)
    monkeypatch.setattr(batch_engine, "free_memory", lambda device: 1 << 40)
    unlimited = engine.max_batch_size(64, 0)
    assert 1 <= limited < unlimited == batch_engine.TOKEN_BUDGET["cpu"] // 64
    engine.token_budget = 32
    assert engine.max_batch_size(64, 0) == 1


def test_a_batch_has_a_row_for_every_device(model):
    config, params = model
    engine = batch_engine.Engine(load(config, 8, params), 0)
    engine.token_budget = 32
    assert engine.max_batch_size(2048, 0) == 8
