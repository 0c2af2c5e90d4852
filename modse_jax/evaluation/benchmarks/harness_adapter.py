"""Adapter that lets EleutherAI's lm-evaluation-harness evaluate our models.

With several processes, the harness runs on process 0 only, because it does not guarantee an order
of requests that is the same everywhere. The other processes take part in the computations that
process 0 starts (see model_programs.py).
"""

import collections
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from modse_jax.evaluation.benchmarks import batch_engine
from modse_jax.evaluation.model_loading import LoadedModel
from modse_jax.model import sampling

# The harness represents a tokenized request by ((context text, continuation text), context ids,
# continuation ids). The texts are used for caching only, and stay empty here.
TokenizedRequest = tuple[tuple[str, str], list[int], list[int]]


class ScoredRequest(NamedTuple):
    """A request for the log-likelihood of a continuation, as batch_engine.Engine.score needs it.

    Attributes:
        tokens: The model's input: context and continuation, without the last token.
        start: Position of the first token of the continuation.
        candidate: The last token of the continuation. None if the continuation is empty.
    """

    tokens: tuple[int, ...]
    start: int
    candidate: int | None


class Adapter(TemplateLM):
    """Presents a trained model to the harness: log-likelihoods and generated text.

    A prompt that exceeds the context is truncated on the left, as the harness does for its own
    models; `counts` records how often. The scores and the greedily generated text of a request do
    not depend on which other requests there are, on their order, or on padding. Sampled text does.

    Attributes:
        engine: Runs the model in batches.
        counts: Number of requests, and of those that had to be truncated, since the last `reset`.
    """

    backend = "causal"

    def __init__(self, model: LoadedModel, batch_size: int = 0):
        """Creates an adapter. `batch_size` is rows per batch; 0 for as many as fit in memory."""
        super().__init__()
        self.engine = batch_engine.Engine(model, batch_size)
        self.max_length = model.config.model.context_length
        self._seed = model.config.seed
        self._tokenizer = model.data.tokenizer
        self.reset()

    def reset(self) -> None:
        """Sets the counts of requests and the measured times to zero. Called before each task."""
        self.counts: collections.Counter[str] = collections.Counter()
        self._truncated_contexts: set[tuple[int, ...]] = set()
        self.engine.programs.reset_times()

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token at the beginning of a document."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the token ids of a text.

        They follow the document-begin token, as every training document does, unless
        `add_special_tokens` is False.
        """
        ids = self._tokenizer.encode(string.encode(errors="replace")).tolist()
        if add_special_tokens is False:
            return ids
        return [self._tokenizer.bos_id, *ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood in nats, is_greedy) of the continuation of each request.

        is_greedy is True if greedy decoding would generate the continuation.
        """
        is_quiet = disable_tqdm or not sys.stderr.isatty()
        return super().loglikelihood(requests, is_quiet)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each text, in nats.

        A text is scored in windows of the context length that overlap by one token.
        """
        numbers = []
        windows: list[TokenizedRequest] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], False)
            for window in utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                context, continuation = utils.make_disjoint_window(window)
                numbers.append(number)
                windows.append((("", ""), context, continuation))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (log_p, _) in zip(numbers, scores):
            totals[number] += log_p
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood in nats, is_greedy) of the continuation of each request.

        The harness calls it with the requests of `loglikelihood`, tokenized. Requests that differ
        in their last token only, such as the letters of a multiple-choice question, share a row of
        a batch.
        """
        wanted = [self._prepare_request(context, rest) for _, context, rest in requests]
        # {(input, first scored position): last tokens}. The last tokens are the keys of a dict, and
        # not a set, so that they stay in the order of the requests.
        candidates: dict[tuple[tuple[int, ...], int], dict[int | None, None]] = {}
        for request in wanted:
            shared = candidates.setdefault((request.tokens, request.start), {})
            shared[request.candidate] = None
        rows = []
        for (tokens, start), shared in candidates.items():
            listed = list(shared)
            for first in range(0, len(listed), batch_engine.MAX_CANDIDATES):
                part = listed[first : first + batch_engine.MAX_CANDIDATES]
                rows.append(batch_engine.Row(tokens, start, part))
        found = {}
        for row, scores in self.engine.score(rows, "scoring", disable_tqdm):
            for candidate, score in zip(row.candidates, scores):
                found[ScoredRequest(row.tokens, row.start, candidate)] = score
        return [found[request] for request in wanted]

    def _prepare_request(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> ScoredRequest:
        """Splits a request into the model's input and the last token, and counts truncations."""
        if not continuation:
            # The tokenizer may have merged the continuation into the last token of the context.
            self.counts["empty_continuations"] += 1
            inputs = tuple(context[-self.max_length :])
            return ScoredRequest(inputs, min(len(context), self.max_length), None)
        tokens = [*context, *continuation][-self.max_length - 1 :]
        is_truncated = len(context) + len(continuation) > len(tokens)
        self._count_prompt(context, is_truncated)
        self.counts["continuations_truncated"] += len(continuation) >= len(tokens)
        start = max(len(tokens) - len(continuation), 1)
        return ScoredRequest(tuple(tokens[:-1]), start, tokens[-1])

    def _count_prompt(self, context: Sequence[int], is_truncated: bool) -> None:
        """Updates the counts of requests and of truncated contexts.

        The continuations of one question share a context, which is counted once.
        """
        self.counts["requests"] += 1
        if is_truncated:
            self._truncated_contexts.add(tuple(context))
            self.counts["contexts_truncated"] = len(self._truncated_contexts)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates a continuation of each prompt, and returns their texts.

        A text ends before the first stop string, before the end token, or after `max_gen_toks`
        tokens.
        """
        groups = collections.defaultdict(list)  # {options: requests}; a batch has equal options
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = normalize_gen_kwargs(requests[numbers[0]].args[1])
            stops = [stop for stop in options["until"] if stop]
            prompts = [self._prepare_prompt(requests[n].args[0], options) for n in numbers]
            generated = self.engine.generate(
                prompts,
                self._limit_new_tokens(options),
                _sampling_settings(options),
                self._seed,
                stops,
                "generating",
                disable_tqdm,
            )
            for index, text in generated:
                texts[numbers[index]] = postprocess_generated_text(text, stops, None)
        return texts

    def _limit_new_tokens(self, options: dict[str, Any]) -> int:
        """Returns how many tokens to generate: `max_gen_toks`, but at most half of the context."""
        return min(options["max_gen_toks"], self.max_length // 2)

    def _prepare_prompt(self, text: str, options: dict[str, Any]) -> list[int]:
        """Returns the tokens of a prompt, truncated on the left to leave room for new tokens."""
        tokens = self.tok_encode(text)
        max_new_tokens = self._limit_new_tokens(options)
        max_prompt = self.max_length - max_new_tokens
        self._count_prompt(tokens, len(tokens) > max_prompt)
        self.counts["generations_shortened"] += options["max_gen_toks"] > max_new_tokens
        return tokens[-max_prompt:]


def _sampling_settings(options: dict[str, Any]) -> sampling.Settings:
    """Translates the harness's sampling options; an option that is missing or None is not set.

    If sampling is requested without a temperature, the temperature is 1. The harness disables top-k
    by values below 1, such as -1.
    """
    temperature = options.get("temperature")
    if temperature is None:
        temperature = 1.0 if options["do_sample"] else 0.0
    top_k = options.get("top_k")
    top_p = options.get("top_p")
    return sampling.Settings(
        temperature=float(temperature),
        top_k=0 if top_k is None else max(int(top_k), 0),
        top_p=1.0 if top_p is None else float(top_p),
    )
