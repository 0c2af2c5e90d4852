"""Benchmarks: the adapter's scores against direct ones, every family on small files, comparison, bad input."""

import concurrent.futures
import csv
import json
import math
import os
import pathlib
import queue
import tempfile
import threading
import types

import jax
import jax.numpy as jnp
import lm_eval.tasks
import numpy as np
import pyarrow
import pytest
from flax import nnx
from lm_eval.api.instance import Instance

from modse_jax.data import tokenizers
from modse_jax.errors import ExitCode, RunError, UserError
from modse_jax.evaluation import model_loading, result_files
from modse_jax.evaluation.benchmarks import (
    batch_engine,
    harness_adapter,
    run_comparison,
    task_files,
    task_runner,
)
from modse_jax.model import kernel_selection, transformer
from modse_jax.runtime import processes, sharding
from modse_jax.training import loop, train_step
from tests.helpers.configs import tiny_config

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when the harness is imported
)


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


def run_of(config, devices=1, params=None):
    mesh = sharding.build_batch_mesh(devices)
    params = params or jax.jit(lambda: train_step.init_state(config))().params
    params = jax.device_put(params, sharding.replicated(mesh))
    data = types.SimpleNamespace(tokenizer=tokenizers.Bytes())
    return model_loading.LoadedModel(config, data, mesh, 0, params)


@pytest.fixture(scope="module")
def model():
    """A model whose likeliest token is not always the same."""
    config = tiny_config()
    params = jax.jit(lambda: train_step.init_state(config))().params
    return config, {**params, "head": 4 * params["head"]}


def requests(kind, arguments):
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def scores(run, texts=TEXTS, batch_size=0):
    adapter = harness_adapter.Adapter(run, batch_size)
    return adapter.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True), adapter


def test_a_uniform_model_has_log2_of_the_vocabulary_bits_per_token(model):
    config, params = model
    run = run_of(config, params={**params, "head": jnp.zeros_like(params["head"])})
    text = "What is nine times seven? " * 9  # 234 tokens, over several windows of 64
    adapter = harness_adapter.Adapter(run)
    (total,) = adapter.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    assert -total / math.log(2) / len(text) == pytest.approx(
        math.log2(config.model.vocab_size), rel=1e-6
    )
    for (_, continuation), (score, _) in zip(TEXTS, scores(run)[0]):
        tokens = len(continuation) + (
            continuation == "space"
        )  # the context's last blank is scored with it
        assert -score / math.log(2) / tokens == pytest.approx(
            math.log2(config.model.vocab_size), rel=1e-6
        )


def direct(config, params, context, continuation):
    """(log p, greedy) by one forward pass over one row, nothing padded."""
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    encode = tokenizers.Bytes().encode
    ids = [1, *encode(context.encode()), *encode(continuation.encode())][
        -config.model.context_length - 1 :
    ]
    row = jnp.asarray(ids, jnp.int32)[None]
    logits, _ = jax.jit(lambda p: nnx.merge(graph, p)(row[:, :-1], jnp.ones_like(row[:, :-1])))(
        params
    )
    log_p = jax.nn.log_softmax(logits[0])
    places = range(len(ids) - 1 - len(continuation.encode()), len(ids) - 1)
    return (
        sum(float(log_p[i, ids[i + 1]]) for i in places),
        all(int(jnp.argmax(log_p[i])) == ids[i + 1] for i in places),
    )


def test_loglikelihoods_equal_a_direct_forward_pass(model):
    config, params = model
    first = jnp.argmax(transformer_logits(config, params, [1]))
    likely = tokenizers.Bytes().decode([int(first)]).decode("latin-1")
    texts = TEXTS + ([("", likely)] if likely.isascii() and likely else [])
    got, adapter = scores(run_of(config, params=params), texts)
    for text, (score, greedy) in zip(texts, got):
        if text[0] != "trailing ":
            want, want_greedy = direct(config, params, *text)
            assert (score, greedy) == (pytest.approx(want, abs=1e-4), want_greedy), text
    assert got[6][0] == pytest.approx(direct(config, params, "trailing", " space")[0], abs=1e-4)
    assert (
        adapter.counts["contexts_truncated"] == 1 and adapter.counts["continuations_truncated"] == 0
    )


def transformer_logits(config, params, ids):
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    row = jnp.asarray(ids, jnp.int32)[None]
    return jax.jit(lambda p: nnx.merge(graph, p)(row, jnp.ones_like(row)))(params)[0][0, -1]


def test_the_likeliest_continuation_is_greedy(model):
    """With ids of the byte tokenizer that spell no text, so by ids."""
    config, params = model
    adapter = harness_adapter.Adapter(run_of(config, params=params))
    context = [1, 70, 71]
    best = []
    for _ in range(3):
        best.append(int(jnp.argmax(transformer_logits(config, params, context + best))))
    other = [*best[:2], best[2] - 1], [best[0] - 1, *best[1:]]
    got = adapter._loglikelihood_tokens([(("", ""), context, c) for c in (best, *other)], True)
    assert [greedy for _, greedy in got] == [True, False, False]
    assert got[0][0] > got[1][0]


@pytest.mark.parametrize(
    "devices, batch_size, order", [(1, 1, 1), (1, 3, -1), (8, 0, -1), (8, 8, 1)]
)
def test_a_score_depends_on_nothing_but_its_request(model, devices, batch_size, order):
    config, params = model
    want, _ = scores(run_of(config, params=params))
    others = TEXTS + [(f"other {i}", f" text {i}") for i in range(20)]
    got, _ = scores(run_of(config, devices, params), others[::order], batch_size)
    for (a, a_greedy), (b, b_greedy) in zip(want, got[::order]):
        assert (a, a_greedy) == (pytest.approx(b, rel=1e-6, abs=1e-5), b_greedy)


def test_requests_that_share_a_context_share_a_row(model, monkeypatch):
    rows = []
    monkeypatch.setattr(
        batch_engine.Engine,
        "score",
        lambda self, r, *_: [
            (row, [(0.0, True)] * len(row.candidates)) for row in rows.append(r) or r
        ],
    )
    config, params = model
    scores(run_of(config, params=params), [("question", f" {letter}") for letter in "ABCDEFGHIJA"])
    assert [len(row.candidates) for row in rows[0]] == [8, 2]


def test_text_beyond_the_context_is_cut_from_the_left_and_counted(model):
    config, params = model
    got, adapter = scores(run_of(config, params=params), [("a", "b" * 100), ("a" * 100, "b")])
    assert (
        adapter.counts["continuations_truncated"] == 1 and adapter.counts["contexts_truncated"] == 2
    )
    assert got[0][0] == pytest.approx(direct(config, params, "b" * 36, "b" * 64)[0], abs=1e-4)
    adapter.generate_until(
        requests("generate_until", [("c" * 100, {"until": [], "max_gen_toks": 100})]), True
    )
    assert (
        adapter.counts["contexts_truncated"] == 3 and adapter.counts["generations_shortened"] == 1
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_generation_equals_full_recomputation(model, devices):
    """Greedy text of mixed lengths, through batches and cache, against recomputing every prefix alone."""
    config, params = model
    prompts = ["a", "some longer text", "b" * 20, "c" * 60]
    room = 12
    adapter = harness_adapter.Adapter(run_of(config, devices, params))
    got = adapter.generate_until(
        requests(
            "generate_until", [(p, {"until": ["\x00"], "max_gen_toks": room}) for p in prompts]
        ),
        True,
    )
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    forward = jax.jit(
        lambda p, row, n: nnx.merge(graph, p)(row, (jnp.arange(64)[None, :] < n).astype(jnp.int32))[
            0
        ]
    )
    for prompt, text in zip(prompts, got):
        ids, new = [1, *tokenizers.Bytes().encode(prompt.encode())][-(64 - room) :], []
        for _ in range(room):
            row = ids + new
            logits = forward(params, jnp.asarray([row + [0] * (64 - len(row))]), len(row))
            new.append(int(jnp.argmax(logits[0, len(row) - 1])))
        new = new[: new.index(2)] if 2 in new else new
        assert text == tokenizers.Bytes().decode(new).decode("utf-8", "replace").split("\x00")[0]


def test_generation_ends_at_a_stop_string(model, monkeypatch):
    """In chunks of 8 tokens: text goes on over their borders, and no chunk is computed after a stop string."""
    config, params = model
    monkeypatch.setattr(batch_engine, "CHUNK", 8)
    adapter, calls = harness_adapter.Adapter(run_of(config, params=params)), []
    run = adapter.engine.programs.run
    monkeypatch.setattr(
        adapter.engine.programs, "run", lambda kind, *rest: calls.append(kind) or run(kind, *rest)
    )

    def text(until):
        calls.clear()
        asked = requests("generate_until", [("Once", {"until": until, "max_gen_toks": 20})])
        return adapter.generate_until(asked, True)[0]

    long = text([])
    assert calls == ["prefill"] + 3 * ["decode"]
    stop = long[9:11]
    assert len(long) > 11 and text([stop, ""]) == long.split(stop)[0] and len(calls) <= 3
    monkeypatch.setattr(batch_engine, "CHUNK", 20)
    assert harness_adapter.Adapter(run_of(config, params=params)).generate_until(
        requests("generate_until", [("Once", {"until": None, "max_gen_toks": 20})]), True
    ) == [long]


def test_whole_texts_are_scored_in_windows(model):
    config, params = model
    text = "What is nine times seven, and why?  " * 4
    adapter = harness_adapter.Adapter(run_of(config, params=params))
    (got,) = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
    ids, want = [1, *tokenizers.Bytes().encode(text.encode()).tolist()], 0.0
    graph, _ = transformer.build_abstract_model(kernel_selection.for_evaluation(config))
    forward = jax.jit(lambda p, row: nnx.merge(graph, p)(row, jnp.ones_like(row))[0])
    for first in range(
        0, len(ids) - 1, 64
    ):  # windows of 64 predicted tokens; a short last one sees what precedes it
        stop = min(first + 64, len(ids) - 1)
        row = jnp.asarray(ids[max(stop - 64, 0) : stop], jnp.int32)[None]
        logits = forward(params, row)[0]
        log_p = jax.nn.log_softmax(logits)
        want += sum(float(log_p[i - max(stop - 64, 0), ids[i + 1]]) for i in range(first, stop))
    assert got == pytest.approx(want, rel=1e-6)


def test_other_processes_compute_what_the_first_asks(model, monkeypatch):
    """Two engines in two threads that exchange messages: the first's answers are those of one alone."""
    config, params = model
    want, _ = scores(run_of(config, params=params))
    box, leader = queue.Queue(), threading.current_thread()
    first, second = (harness_adapter.Adapter(run_of(config, params=params)) for _ in range(2))

    def gather(text):
        return box.put(text) if threading.current_thread() is leader else [box.get(timeout=60)]

    def broadcast(arrays):
        if threading.current_thread() is not leader:
            return box.get(timeout=60)
        box.put({name: a.copy() for name, a in arrays.items()})
        return arrays

    for name, function in (
        ("is_multi_process", lambda: True),
        ("gather", gather),
        ("broadcast", broadcast),
    ):
        monkeypatch.setattr(processes, name, function)
    ran, run = [], second.engine.programs.run
    monkeypatch.setattr(
        second.engine.programs, "run", lambda kind, *rest: ran.append(kind) or run(kind, *rest)
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        follower = pool.submit(second.engine.programs.follow)
        got = first.loglikelihood(requests("loglikelihood", TEXTS), True)
        first.generate_until(requests("generate_until", [("a", {"max_gen_toks": 4})]), True)
        first.engine.programs.release("some trouble")
        assert follower.result(timeout=60) == "some trouble"
    assert [g for _, g in got] == [g for _, g in want]
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in want], rtol=1e-6)
    assert set(ran) == {"score", "prefill", "decode"}


def test_batches_shrink_to_what_memory_holds(model, monkeypatch):
    config, params = model
    monkeypatch.setattr(batch_engine, "free_memory", lambda device: 2 << 20)
    engine = batch_engine.Engine(run_of(config, params=params), 0)
    small = engine.max_batch_size(64, 0)
    monkeypatch.setattr(batch_engine, "free_memory", lambda device: 1 << 40)
    assert 1 <= small < engine.max_batch_size(64, 0) == batch_engine.TOKEN_BUDGET["cpu"] // 64
    engine.token_budget = 32
    assert (
        engine.max_batch_size(64, 0) == 1
        and batch_engine.Engine(run_of(config, 8, params), 0).max_batch_size(2048, 0) == 8
    )


# ---- whole suites ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small file of every benchmark, in its publisher's form."""
    root = tmp_path_factory.mktemp("benchmarks")

    def jsonl(name, rows):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    stock = pathlib.Path(lm_eval.__file__).parent / "tasks"
    for i, split in enumerate(("train", "test")):
        jsonl(
            f"gsm8k/{split}.jsonl",
            [{"question": f"{n} and {i}?", "answer": f"sum\n#### {n + i}"} for n in range(12)],
        )
    for split, count in (("dev", 5), ("test", 3)):
        (root / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        for path in (stock / "mmlu" / "default").glob("mmlu_*.yaml"):
            name = path.stem.removeprefix("mmlu_")
            with open(root / "mmlu" / split / f"{name}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [f"{name} {n}?", "one", 'tw"o', "three, four", "five", "ABCD"[n % 4]]
                    for n in range(count)
                )
    types_ = (
        "Algebra",
        "Counting & Probability",
        "Geometry",
        "Intermediate Algebra",
        "Number Theory",
        "Prealgebra",
        "Precalculus",
    )
    jsonl(
        "math/test.jsonl",
        [
            {
                "problem": f"{n}+1",
                "solution": f"It is $\\boxed{{[{n}, {n + 1}]}}$.",
                "level": "Level 1",
                "type": t,
            }
            for t in types_
            for n in range(7)
        ],
    )
    jsonl(
        "lambada/lambada_test.jsonl",
        [{"text": f"number {n} is the last word{n}"} for n in range(7)],
    )
    jsonl(
        "piqa/valid.jsonl",
        [{"goal": f"open {n}", "sol1": "pull", "sol2": "push"} for n in range(7)],
    )
    (root / "piqa" / "valid-labels.lst").write_text("0\n1\n" * 3 + "0\n")
    (root / "siqa").mkdir()
    table = pyarrow.table(
        {
            "context": [f"{n} met" for n in range(7)],
            "question": ["Why?"] * 7,
            "answerA": ["a"] * 7,
            "answerB": ["b"] * 7,
            "answerC": ["c"] * 7,
            "label": ["1", "2", "3", "1", "2", "3", "1"],
        }
    )
    with pyarrow.ipc.new_stream(str(root / "siqa" / "validation.arrow"), table.schema) as writer:
        writer.write_table(table)
    jsonl(
        "triviaqa/triviaqa_sm_sub.jsonl",
        [
            {
                "context": f'Question: "Which ""{n}""?"\nAnswer:',
                "answer": str(n),
                "aliases": [f"no. {n}", str(n)],
            }
            for n in range(7)
        ],
    )
    for name in ("aqua-rat", "gaokao-english", "lsat-ar", "sat-en", "sat-math"):
        jsonl(
            f"agieval/{name}.jsonl",
            [
                {
                    "passage": "A passage." if n % 2 else None,
                    "question": f"{n}?",
                    "label": "B",
                    "options": ["(A)x", "(B)y", "(C)z"],
                }
                for n in range(7)
            ],
        )
    jsonl(
        "agieval/gaokao-mathcloze.jsonl",
        [
            {
                "passage": None,
                "question": f"{n}+2=",
                "options": None,
                "label": None,
                "answer": str(n + 2),
            }
            for n in range(7)
        ],
    )
    for split in ("train", "test"):
        jsonl(
            f"intent/{split}.jsonl",
            [{"text": f"turn {n}", "label": ("on", "off", "dim")[n % 3]} for n in range(8)],
        )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of different widths on one corpus."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text").mkdir()
    for i in range(24):
        (root / "text" / f"{i}.txt").write_text(
            "".join(f"Question: {i} and {n}?\nAnswer: {n}\n" for n in range(40))
        )
    out = {}
    for name, widths in (("modse", (20, 4, 12, 12)), ("equal", (12, 12, 12, 12))):
        config = tiny_config(
            model=dict(context_length=128),
            moe=dict(widths=widths),
            data=dict(source=f"text:{root / 'text'}"),
            training=dict(steps=2, checkpoint_every=2),
        )
        assert loop.train(config, str(root / name)) == ExitCode.FINISHED
        out[name] = str(root / name)
    return out


FAMILIES = ("agieval", "mmlu", "gsm8k", "lambada", "math", "triviaqa", "piqa", "siqa")


OTHERS = ("piqa_generated", "siqa_generated", "intent")


def test_every_family_runs_on_local_files_and_two_runs_compare(trained, data):
    shown = []
    results = task_runner.run_tasks(
        tuple(trained.values()), 0, (*FAMILIES, *OTHERS), str(data), 2, 0, shown.append
    )
    for workdir, result in zip(trained.values(), results):
        kept = json.loads((pathlib.Path(workdir) / "eval" / "2.first2.json").read_text())
        assert kept == json.loads(json.dumps(result)) and set(kept["tasks"]) == {*FAMILIES, *OTHERS}
        shots = {name: record["shots"] for name, record in kept["tasks"].items()}
        assert shots == {**dict.fromkeys((*FAMILIES, *OTHERS), 5), "gsm8k": 8}
        documents = {name: record["documents"] for name, record in kept["tasks"].items()}
        assert documents == {
            **dict.fromkeys((*FAMILIES, *OTHERS), 2),
            "mmlu": 57 * 2,
            "math": 7 * 2,
            "agieval": 6 * 2,
        }
        values = {
            (s["task"], s["metric"]): s["value"]
            for r in kept["tasks"].values()
            for s in r["scores"]
        }
        assert {
            ("mmlu", "acc"),
            ("math", "exact_match"),
            ("agieval", "acc"),
            ("piqa", "acc_norm"),
            ("piqa_generated", "exact_match"),
            ("lambada", "perplexity"),
            ("intent", "acc"),
        } <= set(values)
        for name, record in kept["tasks"].items():
            assert record["seconds"] > 0 and record["requests"] >= record["documents"]
            rows = [
                json.loads(line)
                for line in result_files.samples_path(pathlib.Path(workdir), 2, 2, name)
                .read_text()
                .splitlines()
            ]
            assert len({(r["task"], r["document"]) for r in rows}) == record["documents"]
            mean = (
                np.mean([r["metrics"]["acc"] for r in rows])
                if "acc" in rows[0]["metrics"]
                else None
            )
            assert mean is None or mean == pytest.approx(
                next(s["value"] for s in record["scores"] if s["metric"] == "acc")
            )
    text = "".join(shown)
    assert all(name in text for name in FAMILIES) and "modse, step 2" in text
    table = run_comparison.compare_runs(tuple(trained.values()), 0, (), 2)
    assert (
        "piqa_generated" in table
        and "seconds of computing" in table
        and "steps modse: 2, equal: 2" in table
    )
    assert "log p" in table and "perplexity" not in table
    again = task_runner.run_tasks(
        (trained["modse"],), 2, ("piqa",), str(data), 2, 4
    )  # other results stay
    assert set(again[0]["tasks"]) == {*FAMILIES, *OTHERS}


def prompts(name, data, limit=3):
    manager, (task,) = task_files.load((name,), str(data))
    seen = []

    class Spy(harness_adapter.TemplateLM):
        eot_token_id, tok_encode, _loglikelihood_tokens = 0, None, None

        def loglikelihood(self, rows, disable_tqdm=False):
            seen.extend(r.args for r in rows)
            return [(0.0, False)] * len(rows)

        def generate_until(self, rows, disable_tqdm=False):
            seen.extend(r.args for r in rows)
            return [""] * len(rows)

        loglikelihood_rolling = None

    lm_eval.simple_evaluate(
        Spy(), tasks=task.built, task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return seen


def test_prompts_show_their_shots_and_never_the_answer_asked(data):
    for context, choice in prompts("piqa", data):
        examples, _, asked = context.rpartition("\n\n")
        assert examples.count("Question: ") == 5 and asked.startswith("Question: open")
        assert asked.splitlines()[0] not in examples.splitlines() and choice in (" pull", " push")
    for context, choice in prompts("mmlu", data, 1)[:4]:
        assert (
            context.count("Answer:") == 6
            and '\nB. tw"o\nC. three, four\n' in context
            and choice in (" A", " B", " C", " D")
        )
    for context, _ in prompts("piqa_generated", data):
        assert context.endswith("\nA. pull\nB. push\nAnswer:") and context.count("Answer: ") == 5
    for context, choice in prompts("agieval", data, 1)[:3]:
        assert context.count("A: Among A through C, the answer is (B)y") == 5 and choice in (
            " (A)x",
            " (B)y",
            " (C)z",
        )


def test_prompts_of_the_generated_and_the_rest(data):
    for context, kwargs in prompts("gsm8k", data):
        assert (
            context.count("Question: ") == 9
            and context.endswith("?\nAnswer:")
            and "Question:" in kwargs["until"]
        )
    for context, _ in prompts("math", data, 1):
        assert (
            context.count("Problem: ") == 6 and context.count("Answer: [") == 5
        )  # an interval is no list
    for context, word in prompts("lambada", data):
        examples = context.split("\n\n")
        assert (
            len(examples) == 6 and "  " not in context and word == " word" + examples[-1].split()[1]
        )
        assert examples[-1] + word not in examples[:-1]
    for context, _ in prompts("triviaqa", data):
        assert (
            context.count('Question: Which "') == 6
            and "no. " not in context
            and '"?\nAnswer:' in context
        )
    for context, choice in prompts("siqa", data)[:3]:
        assert context.count(" met Why?\nA:") == 6 and choice in (" a", " b", " c")
    seen = [context for context, _ in prompts("agieval", data, 1)]
    assert any(
        c.count("\u95ee\u9898\uff1a") == 6 and c.endswith("\n\u7b54\u6848\uff1a") for c in seen
    )


def test_a_task_of_ones_own(trained, data, tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(9)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "names.txt").write_text("0\n1\n2\n")
    (tmp_path / "mine.yaml").write_text(
        'include: $tasks/intent.yaml\ntask: mine\ndataset_kwargs: {file: "$data/mine.jsonl", names: '
        '"$data/names.txt"}\n'
        "fewshot_split: test\nnum_fewshot: 2\n"
    )
    seen = prompts("mine", tmp_path)
    assert [choice for _, choice in seen[:3]] == [" 0", " 1", " 2"] and seen[0][0].count(
        "Label:"
    ) == 3
    (result,) = task_runner.run_tasks((trained["equal"],), 0, ("mine",), str(tmp_path), 0, 0)
    assert result["tasks"]["mine"]["documents"] == 9


def test_without_local_data_tasks_name_the_hub():
    """Nothing of a "# local" line is left, and the stock data set is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        (ours,), broken = task_files.copy_task_folders(
            pathlib.Path(folder), pathlib.Path(lm_eval.tasks.__file__).parent, ""
        )
        assert not broken
        for path in ours.glob("*.yaml"):
            assert path.stem == "intent" or "published_files" not in path.read_text()
        manager = lm_eval.tasks.TaskManager(include_path=ours, include_defaults=False)
        assert manager.task_index["gsm8k"].cfg["dataset_path"] == "openai/gsm8k"
        assert manager.task_index["gsm8k"].cfg["num_fewshot"] == 8


def test_paired_significance():
    first, other = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 1, 1, 1, 1, 0])
    difference, stderr, p = run_comparison.paired_test(first, other)
    assert difference == pytest.approx(3 / 8) and p == pytest.approx(
        2 * (1 + 5) / 2**5
    )  # 4 of 5 that differ
    assert stderr == pytest.approx(np.std(other - first, ddof=1) / 8**0.5)
    assert run_comparison.paired_test(first, first)[2] == 1.0
    rng = np.random.default_rng(0)
    a = rng.normal(size=50)
    d, s, p = run_comparison.paired_test(a, a + 0.1 + 0.01 * rng.normal(size=50))
    assert d == pytest.approx(0.1, abs=0.01) and p < 1e-6


def test_bad_input_is_told_before_anything_runs(trained, data, tmp_path):
    run = trained["modse"]

    def message(*names, tasks_dir=data, workdirs=(run,)):
        with pytest.raises(UserError) as error:
            task_runner.run_tasks(workdirs, 0, names, str(tasks_dir), 0, 0)
        return str(error.value)

    before = sorted(pathlib.Path(run, "eval").rglob("*"))
    assert "--tasks is empty" in message()
    assert "is not a directory" in message("piqa", tasks_dir=tmp_path / "none")
    empty = tmp_path / "empty"
    (empty / "gsm8k").mkdir(parents=True)
    assert "gsm8k/train.jsonl cannot be read: No such file" in message("gsm8k", tasks_dir=empty)
    for split in ("train", "test"):
        (empty / "gsm8k" / f"{split}.jsonl").write_text("")
    assert "has no documents" in message("gsm8k", tasks_dir=empty)
    (empty / "gsm8k" / "train.jsonl").write_text("{\n")
    assert "train.jsonl is not jsonl" in message("gsm8k", tasks_dir=empty)
    (empty / "gsm8k" / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    (empty / "gsm8k" / "test.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    assert "task gsm8k cannot be read: ValueError: Sample larger" in message(
        "gsm8k", tasks_dir=empty
    )  # 8 shots of 1
    (empty / "broken.yaml").write_text("task: [")
    told = message("piqua", tasks_dir=empty)
    assert (
        "'piqua' is unknown; close: " in told
        and "piqa" in told
        and "cannot be read: broken.yaml: " in told
    )
    (empty / "piqa").mkdir()
    (empty / "piqa" / "valid.jsonl").write_text("{}\n")
    (empty / "piqa" / "valid-labels.lst").write_text("")
    assert "valid-labels.lst has 0 lines, valid.jsonl 1" in message("piqa", tasks_dir=empty)
    assert "holds no run" in message("piqa", workdirs=(str(tmp_path),))
    assert sorted(pathlib.Path(run, "eval").rglob("*")) == before
    with pytest.raises(UserError, match="has no results of tasks with --limit=7"):
        run_comparison.compare_runs(tuple(trained.values()), 0, (), 7)


def test_a_task_that_fails_leaves_those_before_it(trained, data, monkeypatch):
    real = lm_eval.simple_evaluate

    def fail(adapter, tasks, **rest):
        if tasks[0].task_name == "siqa":
            raise ZeroDivisionError("a task's own code")
        return real(adapter, tasks=tasks, **rest)

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    with pytest.raises(RunError, match="task siqa failed: ZeroDivisionError: a task's own code"):
        task_runner.run_tasks((trained["equal"],), 0, ("piqa", "siqa"), str(data), 3, 0)
    assert set(
        json.loads((pathlib.Path(trained["equal"]) / "eval" / "2.first3.json").read_text())["tasks"]
    ) == {"piqa"}
    with pytest.raises(
        UserError, match="has results of piqa at step 2 with --limit=3, not of siqa"
    ):
        run_comparison.compare_runs((trained["equal"], trained["equal"]), 0, ("siqa",), 3)


def test_a_stock_task_without_internet_says_how_to_go_without(trained, tmp_path):
    with pytest.raises(
        UserError, match=r"task boolq cannot be read: .*include: \$harness/PATH.yaml"
    ):
        task_runner.run_tasks((trained["modse"],), 0, ("boolq",), str(tmp_path), 0, 0)


def test_runs_of_other_documents_do_not_compare(trained, data, tmp_path):
    task_runner.run_tasks((trained["modse"],), 0, ("lambada",), str(data), 1, 0)
    task_runner.run_tasks((trained["equal"],), 0, ("lambada",), str(data), 1, 0)
    path = result_files.samples_path(pathlib.Path(trained["equal"]), 2, 1, "lambada")
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "hash": "another"}) + "\n")
    with pytest.raises(UserError, match="equal was given other documents or shots of lambada"):
        run_comparison.compare_runs(tuple(trained.values()), 0, ("lambada",), 1)
