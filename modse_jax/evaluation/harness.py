"""Our models as EleutherAI's lm-evaluation-harness sees them.

Requests are sorted by length and padded into batches of a few fixed shapes, each compiled once. On several processes
the harness runs on process 0 alone, since it promises no order; the others compute what it sends them.

Legend: B rows, L padded length, V vocabulary, N new tokens; M candidates, the last tokens asked for after one row.
"""

import collections
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from modse_jax.evaluation.scoring import LoadedModel
from modse_jax.model import kernel_selection, sampling, transformer
from modse_jax.runtime import gpu_options, memory_usage, processes, sharding
from modse_jax.training import losses

SHORTEST = 128  # the smallest padded length; the others are its doubles, and the context's length


CANDIDATES = 8  # M: choices of one letter that share their question cost one row


CHUNK = 32  # new tokens between two looks for a stop string


MOST_ROWS = 1024


TOKENS = {
    "cpu": 8192,
    "gpu": 131072,
    "tpu": 131072,
}  # of a first batch; halved when memory does not hold it


class Row(NamedTuple):
    """tokens, of which those from `start` on are scored, and then each of `last`."""

    tokens: tuple[int, ...]
    start: int
    last: list[int]


class Adapter(TemplateLM):
    """A checkpoint to the harness: log-likelihoods and generated text.

    What the context cannot hold is cut from the left, as the harness does for its own models; `counts` says how often.
    Scores and greedy text do not depend on the other requests, their order or padding; sampled text does.
    """

    backend = "causal"

    def __init__(self, run: LoadedModel, batch_size: int = 0):
        super().__init__()
        self.model, self.tokens = Engine(run, batch_size), run.data.tokenizer
        self.max_length, self.seed = run.config.model.context_length, run.config.seed
        self.reset()

    def reset(self) -> None:
        """Forgets counts and times: of what the task before has asked."""
        self.counts, self._truncated = collections.Counter(), set()
        self.model.seconds = self.model.compile_seconds = 0.0

    @property
    def eot_token_id(self):
        return self.tokens.eos_id

    @property
    def prefix_token_id(self):
        return self.tokens.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Token ids after the document-begin token, with which every document of the training data began."""
        ids = self.tokens.encode(string.encode(errors="replace")).tolist()
        return ids if add_special_tokens is False else [self.tokens.bos_id, *ids]

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of each whole text, nats, in windows of the context's length that overlap by one token."""
        windows = [
            (number, *utils.make_disjoint_window(pair))
            for number, request in enumerate(requests)
            for pair in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], False), self.prefix_token_id, self.max_length, 1
            )
        ]
        totals = [0.0] * len(requests)
        for (number, *_), (score, _) in zip(
            windows,
            self._loglikelihood_tokens(
                [(("", ""), context, rest) for _, context, rest in windows], disable_tqdm
            ),
        ):
            totals[number] += score
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """(log p nats, whether every token was the likeliest) of each continuation."""
        rows, wanted = {}, []
        for _, context, continuation in requests:
            row, last = self._row(context, continuation)
            rows.setdefault(row, {})[last] = None  # a set that keeps its order
            wanted.append((row, last))
        split = [
            Row(*row, list(last)[i : i + CANDIDATES])
            for row, last in rows.items()
            for i in range(0, len(last), CANDIDATES)
        ]
        found = {}
        for row, scores in self.model.score(split, "scoring", disable_tqdm):
            found.update({(row.tokens, row.start, last): s for last, s in zip(row.last, scores)})
        return [found[*row, last] for row, last in wanted]

    def _row(self, context, continuation):
        """((tokens, start), last token): what is fed, from where it is scored, and what is asked for after it."""
        if not continuation:  # a tokenizer may have drawn it into the context's last piece
            self.counts["empty_continuations"] += 1
            return (tuple(context[-self.max_length :]), min(len(context), self.max_length)), None
        whole = [*context, *continuation][-self.max_length - 1 :]
        self.counts["requests"] += 1
        self._note(context, len(context) + len(continuation) > len(whole))
        self.counts["continuations_truncated"] += len(continuation) >= len(whole)
        start = max(len(whole) - len(continuation), 1)
        return (tuple(whole[:-1]), start), whole[-1]

    def generate_until(self, requests, disable_tqdm=False):
        """The text after each prompt, up to the first stop string, the end token or max_gen_toks."""
        groups = collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1])
            asked["until"] = [stop for stop in asked["until"] if stop]
            prompts = [self._prompt(requests[n].args[0], asked) for n in numbers]
            done = self.model.generate(
                prompts,
                self._room(asked),
                _settings(asked),
                self.seed,
                asked["until"],
                "generating",
                disable_tqdm,
            )
            for place, text in done:
                texts[numbers[place]] = postprocess_generated_text(text, asked["until"], None)
        return texts

    def _note(self, context, truncated):
        """Counts a prompt that is cut, once for all its choices."""
        if truncated:
            self._truncated.add(tuple(context))
            self.counts["contexts_truncated"] = len(self._truncated)

    def _room(self, asked):
        return min(asked["max_gen_toks"], self.max_length // 2)  # what is not room for the prompt

    def _prompt(self, text, asked):
        tokens, room = self.tok_encode(text), self.max_length - self._room(asked)
        self.counts["requests"] += 1
        self._note(tokens, len(tokens) > room)
        self.counts["generations_shortened"] += asked["max_gen_toks"] > self._room(asked)
        return tokens[-room:]


def _settings(asked):
    """The harness's words for sampling: no temperature is 1 where sampling is asked for; top_k below 1 is all."""
    temperature = float(asked.get("temperature") or asked["do_sample"])
    return sampling.Settings(
        temperature, max(int(asked.get("top_k") or 0), 0), float(asked.get("top_p") or 1.0)
    )


class Engine:
    """Batches of rows through a model on a mesh, in few shapes.

    With several processes, process 0 calls `score` and `generate`, and the others `follow` until it calls `release`.
    """

    def __init__(self, run: LoadedModel, batch_size: int):
        self.run, self.batch_size, self.mesh = run, batch_size, run.mesh
        self.budget = TOKENS[run.mesh.devices.flat[0].platform]
        self.buckets = _buckets(run.config.model.context_length)
        mesh = run.mesh if run.mesh.size > 1 else None
        self.graph, _ = transformer.build_abstract_model(
            kernel_selection.for_evaluation(run.config), mesh
        )
        self.pad_id, self.eos_id = run.data.tokenizer.pad_id, run.data.tokenizer.eos_id
        self.programs, self.sizes, self.state = {}, {}, None
        self.seconds = self.compile_seconds = 0.0  # spent computing, and compiling

    def score(
        self, rows: list[Row], what: str, quiet: bool
    ) -> Iterator[tuple[Row, list[tuple[float, bool]]]]:
        """Each row with a (log p, greedy) per candidate, in no order. A candidate of None is the row without one."""
        for batch, bucket in self._batches(rows, lambda row: len(row.tokens), what, quiet):
            tokens_BL, lengths_B = sampling.pad_rows(
                [r.tokens for r in batch.rows], bucket, self.pad_id
            )
            last_BM, _ = sampling.pad_rows(
                [[c or 0 for c in r.last] for r in batch.rows], CANDIDATES, 0
            )
            arrays = {
                "tokens": tokens_BL,
                "lengths": lengths_B,
                "last": last_BM,
                "starts": np.array([r.start for r in batch.rows], np.int32),
            }
            log_p_B, greedy_B, last_log_p_BM, last_greedy_BM = self.call("score", (), arrays)
            for i, row in enumerate(batch.rows[: batch.real]):
                yield (
                    row,
                    [
                        (float(log_p_B[i]), bool(greedy_B[i]))
                        if c is None
                        else (
                            float(log_p_B[i] + last_log_p_BM[i, m]),
                            bool(greedy_B[i] & last_greedy_BM[i, m]),
                        )
                        for m, c in enumerate(row.last)
                    ],
                )

    def generate(
        self,
        prompts: list[list[int]],
        room: int,
        settings: sampling.Settings,
        seed: int,
        stops: list[str],
        what: str,
        quiet: bool,
    ) -> Iterator[tuple[int, str]]:
        """(place of a prompt, text after it). The text runs on past a stop string, to the end of its chunk."""
        rows = [Row(tuple(p), i, []) for i, p in enumerate(prompts)]
        for batch, bucket in self._batches(
            rows, lambda row: len(row.tokens) + room, what, quiet, room
        ):
            tokens_BP, lengths_B = sampling.pad_rows(
                [r.tokens for r in batch.rows], bucket - room, self.pad_id
            )
            lengths_B[batch.real :] = 0
            texts = self._decode(batch, tokens_BP, lengths_B, room, settings, seed, stops)
            yield from ((row.start, text) for row, text in zip(batch.rows[: batch.real], texts))

    def _decode(self, batch, tokens_BP, lengths_B, room, settings, seed, stops):
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), batch.number), _slots(room)
        )
        ended_B, out = lengths_B == 0, [[] for _ in lengths_B]
        self.call("prefill", (_slots(room),), {"tokens": tokens_BP, "lengths": lengths_B})
        for first in range(0, room, CHUNK):
            (tokens_BN,) = self.call(
                "decode",
                tuple(settings),
                {
                    "keys": np.asarray(jax.random.key_data(keys[first : first + CHUNK])),
                    "ended": ended_B,
                },
            )
            for i, row in enumerate(tokens_BN.tolist()):
                if not ended_B[i]:
                    new = row[: row.index(self.eos_id)] if self.eos_id in row else row
                    out[i] = (out[i] + new)[:room]
                    text = self._text(out[i])
                    ended_B[i] = len(new) < len(row) or any(stop in text for stop in stops)
            if ended_B.all():
                break
        self.state = None  # the cache is not to count as taken when the next batch is measured
        return [self._text(row) for row in out]

    def _text(self, ids):
        return self.run.data.tokenizer.decode(ids).decode("utf-8", "replace")

    # ---- batches ----

    def _batches(self, rows, length, what, quiet, room=0):
        """(Batch, padded length) over all rows, the longest first, so that what memory does not hold shows at once."""
        rows = sorted(rows, key=length, reverse=True)
        with tqdm(total=len(rows), desc=what, disable=quiet or None, leave=False) as bar:
            for number, (members, bucket, size) in enumerate(self._cut(rows, length, room)):
                yield (
                    Batch(number, members + [Row((), 0, [])] * (size - len(members)), len(members)),
                    bucket,
                )
                bar.update(len(members))

    def _cut(self, rows, length, room):
        while rows:
            bucket = next(b for b in self.buckets if b >= length(rows[0]))
            if (bucket, room) not in self.sizes:
                self.sizes[bucket, room] = self._rows(bucket, room)
            size = self.sizes[bucket, room]
            fitting = next(
                (
                    i
                    for i, row in enumerate(rows)
                    if bucket != next(b for b in self.buckets if b >= length(row))
                ),
                len(rows),
            )
            members, rows = rows[: min(size, fitting)], rows[min(size, fitting) :]
            yield members, bucket, size

    def _rows(self, bucket, room):
        """Rows of a batch: the given number, or the most that half of the free memory holds, from self.budget down. Not
        tried with several processes, where a compilation may wait for the others."""
        if self.batch_size:
            return self.batch_size
        ways = self.mesh.size
        size = ways * (1 << max(1, min(self.budget // bucket, MOST_ROWS) // ways).bit_length() - 1)
        if processes.is_multi_process():
            return size
        kind, shapes = ("prefill", (bucket - room,)) if room else ("score", (bucket,))
        while size > ways and not self._fits(kind, (_slots(room),) if room else (), size, *shapes):
            size //= 2
        return size

    def _fits(self, kind, static, size, length):
        free = _free_memory(self.mesh.local_devices[0])
        program = self._program(kind, static, _shapes(kind, size, length))
        need = memory_usage.peak_bytes(program, include_arguments=False)
        return need is None or need <= free / 2

    # ---- programs ----

    def call(
        self, kind: str, static: tuple, arrays: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, ...]:
        """Runs a program on every process; its small outputs. The state of decoding stays on the devices."""
        if processes.is_multi_process():
            shapes = {name: (a.shape, str(a.dtype)) for name, a in arrays.items()}
            processes.gather(json.dumps({"kind": kind, "static": static, "shapes": shapes}))
            arrays = processes.broadcast(arrays)
        return self._run(kind, static, arrays)

    def follow(self) -> str:
        """Computes what process 0 asks for; returns the trouble it ended with, "" for none."""
        while True:
            order = json.loads(processes.gather("")[0])
            if order["kind"] == "release":
                return order["trouble"]
            zeros = {
                name: np.zeros(shape, dtype) for name, (shape, dtype) in order["shapes"].items()
            }
            self._run(order["kind"], tuple(order["static"]), processes.broadcast(zeros))

    def release(self, trouble: str = "") -> None:
        if processes.is_multi_process():
            processes.gather(json.dumps({"kind": "release", "trouble": trouble}))

    def _run(self, kind, static, arrays):
        program = self._program(
            kind, static, {name: (a.shape, a.dtype) for name, a in arrays.items()}
        )
        start = time.perf_counter()
        placed = {name: self._placed(name, a) for name, a in arrays.items()}
        if kind == "score":
            out = program(self.run.params, placed)
        elif kind == "prefill":
            self.state, out = program(self.run.params, placed), ()
        else:
            self.state, tokens = program(self.run.params, placed, self.state)
            out = (tokens,)
        out = tuple(np.asarray(a) for a in out)
        self.seconds += time.perf_counter() - start
        return out

    def _placed(self, name, array):
        if name == "keys":
            return jax.device_put(array, sharding.replicated(self.mesh))
        rows = sharding.local_rows(self.mesh, len(array))
        return sharding.shard_batch(self.mesh, {name: array[rows]}, len(array))[name]

    def _program(self, kind, static, shapes):
        key = (
            kind,
            static,
            tuple((name, tuple(shape)) for name, (shape, _) in sorted(shapes.items())),
            (kind == "decode" and self.state.cache[0].shape),
        )
        if key not in self.programs:
            start = time.perf_counter()
            self.programs[key] = self._lower(kind, static, shapes).compile(
                compiler_options=gpu_options.compiler_options(self.mesh.devices.flat[0]) or None
            )
            self.compile_seconds += time.perf_counter() - start
        return self.programs[key]

    def _lower(self, kind, static, shapes):
        whole, rows = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        abstract = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=whole if name == "keys" else rows)
            for name, (shape, dtype) in shapes.items()
        }
        if kind == "score":
            chunk = self.run.config.training.loss_chunk
            mesh = self.mesh if self.mesh.size > 1 else None
            return jax.jit(
                lambda params, a: _score(self.graph, params, chunk, mesh, **a), out_shardings=whole
            ).lower(self.run.params, abstract)
        if kind == "prefill":
            return jax.jit(
                lambda params, a: sampling.prefill(
                    self.graph, params, a["tokens"], a["lengths"], *static
                )
            ).lower(self.run.params, abstract)

        def decode(params, a, state):
            state = state._replace(done_B=state.done_B | a["ended"])
            return sampling.decode(
                self.graph,
                params,
                state,
                jax.random.wrap_key_data(a["keys"]),
                sampling.Settings(*static),
                self.pad_id,
                self.eos_id,
            )

        held = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(decode, donate_argnums=2, out_shardings=(held, whole)).lower(
            self.run.params, abstract, self.state
        )


class Batch(NamedTuple):
    """Rows of one call, of which the first `real` are asked for; the others are padding."""

    number: int
    rows: list[Row]
    real: int


def _score(graph, params, chunk, mesh, tokens, lengths, starts, last):
    """(log p [B] of tokens[start:length], whether all were likeliest [B], the same of each candidate [B, M])."""
    model = nnx.merge(graph, params)
    place_1L = jnp.arange(tokens.shape[1])[None, :]
    x_BLD, _ = model.hidden(tokens, (place_1L < lengths[:, None]).astype(jnp.int32))
    nll_BL, greedy_BL = losses.nll(
        x_BLD, model.head_weight(), jnp.roll(tokens, -1, axis=1), chunk, mesh, greedy=True
    )
    asked_BL = (place_1L + 1 >= starts[:, None]) & (place_1L + 1 < lengths[:, None])
    last_B1D = jnp.take_along_axis(x_BLD, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    logits_BV = model.logits(last_B1D)[:, 0]
    log_p_BM = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, axis=-1), last, axis=1)
    return (
        -jnp.sum(jnp.where(asked_BL, nll_BL, 0.0), axis=1),
        jnp.all(greedy_BL | ~asked_BL, axis=1),
        log_p_BM,
        jnp.argmax(logits_BV, axis=-1)[:, None] == last,
    )


def _shapes(kind, size, length):
    rows, whole = ((size,), np.int32), ((size, length), np.int32)
    if kind == "prefill":
        return {"tokens": whole, "lengths": rows}
    return {
        "tokens": whole,
        "lengths": rows,
        "starts": rows,
        "last": ((size, CANDIDATES), np.int32),
    }


def _slots(room):
    return -(-room // CHUNK) * CHUNK


def _buckets(context_length):
    doubles = [SHORTEST << i for i in range(32) if SHORTEST << i < context_length]
    return [*doubles, context_length]


def _free_memory(device):
    """Bytes: of an accelerator, what it says; of a CPU, of the machine."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
