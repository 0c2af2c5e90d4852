"""Scores and continues texts with a model, in batches of a few shapes.

A row is one sequence of a batch. Rows are sorted by length and padded to one of a few lengths, so
that the model is compiled for a few shapes only. The longest rows come first, so that a batch that
does not fit in memory fails at the start.

Legend: B rows of a batch, L padded length, P padded length of a prompt, N new tokens, M candidates
for the last token of a row.
"""

import os
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from modse_jax.evaluation.benchmarks import model_programs
from modse_jax.evaluation.model_loading import LoadedModel
from modse_jax.model import sampling
from modse_jax.runtime import memory_usage, processes

SHORTEST_LENGTH = 128  # the smallest padded length; the others double it, up to the context length
MAX_CANDIDATES = 8  # M: most alternatives for the last token that are scored with one row
CHUNK = 32  # new tokens between two searches for a stop string
MAX_ROWS = 1024  # most rows of a batch

# Tokens of a batch, by platform. A batch that does not fit in memory is halved until it does.
TOKEN_BUDGET = {"cpu": 8192, "gpu": 131072, "tpu": 131072}


class Row(NamedTuple):
    """A sequence to score, together with alternatives for its last token.

    Continuations that differ in their last token only, such as the letters of a multiple-choice
    question, thus take one row of a batch.

    Attributes:
        tokens: The input of the model: the sequence without its last token.
        start: Position of the first scored token; all tokens after it are scored too.
        candidates: The alternatives for the last token, at most MAX_CANDIDATES. None stands for a
            sequence without a further token.
    """

    tokens: tuple[int, ...]
    start: int
    candidates: list[int | None]


class Prompt(NamedTuple):
    """A text to continue."""

    tokens: tuple[int, ...]
    position: int  # in the list of prompts given to Engine.generate


Item = TypeVar("Item", Row, Prompt)


class Batch(NamedTuple, Generic[Item]):
    """Rows that the model processes at once.

    Attributes:
        number: Index of the batch within one call of Engine.score or Engine.generate.
        rows: The rows to process, followed by empty rows that fill the batch to its static size.
        num_real: Number of rows without the empty ones.
        length: Length to which the rows are padded, with room for new tokens.
    """

    number: int
    rows: list[Item]
    num_real: int
    length: int

    @property
    def real_rows(self) -> list[Item]:
        """The rows without the empty ones that fill the batch."""
        return self.rows[: self.num_real]


class Engine:
    """Scores and continues texts with a model, in batches.

    With several processes, only process 0 calls `score` and `generate`. The others call
    `programs.follow`, which takes part in every computation that process 0 starts.

    Attributes:
        programs: The compiled functions of the model.
        token_budget: Most tokens of a batch. A batch that does not fit into memory gets fewer.
    """

    def __init__(self, model: LoadedModel, batch_size: int):
        """Creates an engine. `batch_size` is rows per batch; 0 for as many as fit in memory."""
        self.programs = model_programs.Programs(model)
        self.token_budget = TOKEN_BUDGET[model.mesh.devices.flat[0].platform]
        self._mesh = model.mesh
        self._tokenizer = model.data.tokenizer
        self._batch_size = batch_size
        self._padded_lengths = list_padded_lengths(model.config.model.context_length)
        self._batch_sizes: dict[tuple[int, int], int] = {}

    def score(
        self, rows: list[Row], description: str, quiet: bool
    ) -> Iterator[tuple[Row, list[tuple[float, bool]]]]:
        """Yields every row with the scores of its candidates, in no particular order.

        A score is (log-probability, is_greedy) of the tokens from row.start on, followed by the
        candidate. The log-probability is in nats (0 or negative). is_greedy is True if each of
        these tokens is the most likely one.

        Args:
            rows: The rows to score.
            description: Title of the progress bar.
            quiet: Hides the progress bar.
        """
        padding = Row((), 0, [])
        for batch in self._make_batches(rows, padding, 0, description, quiet):
            tokens_BL, lengths_B = sampling.pad_rows(
                [row.tokens for row in batch.rows], batch.length, self._tokenizer.pad_id
            )
            last_BM, _ = sampling.pad_rows(
                [[candidate or 0 for candidate in row.candidates] for row in batch.rows],
                MAX_CANDIDATES,
                0,
            )
            starts_B = np.array([row.start for row in batch.rows], np.int32)
            arrays = {
                "tokens": tokens_BL,
                "lengths": lengths_B,
                "last": last_BM,
                "starts": starts_B,
            }
            scores = model_programs.Scores(*self.programs.call("score", (), arrays))
            for index, row in enumerate(batch.real_rows):
                yield row, _list_candidate_scores(scores, index, row.candidates)

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        settings: sampling.Settings,
        seed: int,
        stops: list[str],
        description: str,
        quiet: bool,
    ) -> Iterator[tuple[int, str]]:
        """Yields (index of a prompt, generated text after it), in no particular order.

        A text ends at the end token or after `max_new_tokens` tokens. A stop string ends it too,
        but possibly up to CHUNK tokens later: the text is not cut at the stop string.

        Args:
            prompts: The token ids of the texts to continue.
            max_new_tokens: Most tokens to generate.
            settings: How tokens are drawn.
            seed: The seed of the draws.
            stops: The stop strings.
            description: Title of the progress bar.
            quiet: Hides the progress bar.
        """
        rows = [Prompt(tuple(tokens), index) for index, tokens in enumerate(prompts)]
        padding = Prompt((), 0)
        for batch in self._make_batches(rows, padding, max_new_tokens, description, quiet):
            key = jax.random.fold_in(jax.random.key(seed), batch.number)
            texts = self._decode(batch, max_new_tokens, settings, key, stops)
            for row, text in zip(batch.real_rows, texts):
                yield row.position, text

    def _decode(
        self,
        batch: Batch[Prompt],
        max_new_tokens: int,
        settings: sampling.Settings,
        key: jax.Array,
        stops: list[str],
    ) -> list[str]:
        """Returns the generated text after each prompt of a batch, cut at the first stop string."""
        tokens_BP, lengths_B = sampling.pad_rows(
            [row.tokens for row in batch.rows],
            batch.length - max_new_tokens,
            self._tokenizer.pad_id,
        )
        lengths_B[batch.num_real :] = 0
        ended_B = lengths_B == 0
        new_tokens: list[list[int]] = [[] for _ in batch.rows]
        num_keys = _round_up_to_chunk(max_new_tokens)
        keys = jax.random.split(key, num_keys)
        self.programs.call("prefill", (num_keys,), {"tokens": tokens_BP, "lengths": lengths_B})
        for first in range(0, max_new_tokens, CHUNK):
            key_data = np.asarray(jax.random.key_data(keys[first : first + CHUNK]))
            arrays = {"keys": key_data, "ended": ended_B}
            (tokens_BN,) = self.programs.call("decode", tuple(settings), arrays)
            for index, chunk in enumerate(tokens_BN.tolist()):
                if not ended_B[index]:
                    before_end = self._cut_at_end_token(chunk)
                    new_tokens[index] = (new_tokens[index] + before_end)[:max_new_tokens]
                    text = self._to_text(new_tokens[index])
                    has_stop = any(stop in text for stop in stops)
                    ended_B[index] = has_stop or len(before_end) < len(chunk)
            if ended_B.all():
                break
        self.programs.discard_state()
        return [self._to_text(tokens) for tokens in new_tokens]

    def _cut_at_end_token(self, tokens: list[int]) -> list[int]:
        end = self._tokenizer.eos_id
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def _to_text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens).decode("utf-8", "replace")

    def _make_batches(
        self, rows: list[Item], padding: Item, max_new_tokens: int, description: str, quiet: bool
    ) -> Iterator[Batch[Item]]:
        """Divides rows into batches, the longest rows first, and advances a progress bar.

        Args:
            rows: The rows.
            padding: The empty row that fills the last batch of a length.
            max_new_tokens: New tokens that each row needs room for; 0 for scoring.
            description: Title of the progress bar.
            quiet: Hides the progress bar.
        """
        rows = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
        number = 0
        with tqdm(total=len(rows), desc=description, disable=quiet or None, leave=False) as bar:
            while rows:
                length = self._padded_length(rows[0], max_new_tokens)
                size = self._batch_size_for(length, max_new_tokens)
                same_length = self._count_same_length(rows, max_new_tokens)
                members = rows[: min(size, same_length)]
                rows = rows[len(members) :]
                padded = members + [padding] * (size - len(members))
                yield Batch(number, padded, len(members), length)
                bar.update(len(members))
                number += 1

    def _padded_length(self, row: Row | Prompt, max_new_tokens: int) -> int:
        needed = len(row.tokens) + max_new_tokens
        return next(length for length in self._padded_lengths if length >= needed)

    def _count_same_length(self, rows: list[Item], max_new_tokens: int) -> int:
        """Returns how many of the first rows are padded to the same length as the first one."""
        length = self._padded_length(rows[0], max_new_tokens)
        for count, row in enumerate(rows):
            if self._padded_length(row, max_new_tokens) != length:
                return count
        return len(rows)

    def _batch_size_for(self, length: int, max_new_tokens: int) -> int:
        """Returns `max_batch_size` for a shape, computed only once, because it may compile."""
        shape = (length, max_new_tokens)
        if shape not in self._batch_sizes:
            self._batch_sizes[shape] = self.max_batch_size(*shape)
        return self._batch_sizes[shape]

    def max_batch_size(self, length: int, max_new_tokens: int) -> int:
        """Returns the rows per batch: as requested, or as many as fit in half of the free memory.

        With several processes, the token budget alone decides. To find the memory that a batch
        needs, the model is compiled, and process 0 must not do so while the others wait for it in a
        collective, which would time out.

        Args:
            length: Padded length, new tokens included.
            max_new_tokens: New tokens; 0 for scoring.
        """
        if self._batch_size:
            return self._batch_size
        devices = self._mesh.size
        rows_per_device = max(1, min(self.token_budget // length, MAX_ROWS) // devices)
        size = devices * _round_down_to_power_of_two(rows_per_device)
        if processes.is_multi_process():
            return size
        while size > devices and not self._fits_in_memory(size, length, max_new_tokens):
            size //= 2
        return size

    def _fits_in_memory(self, size: int, length: int, max_new_tokens: int) -> bool:
        """Returns True if a batch of `size` rows needs at most half of the free memory."""
        free = free_memory(self._mesh.local_devices[0])
        if max_new_tokens:
            static: tuple[int, ...] = (_round_up_to_chunk(max_new_tokens),)
            shapes = _prefill_shapes(size, length - max_new_tokens)
            program = self.programs.compile("prefill", static, shapes)
        else:
            program = self.programs.compile("score", (), _score_shapes(size, length))
        needed = memory_usage.peak_bytes(program, include_arguments=False)
        return needed is None or needed <= free / 2


def _list_candidate_scores(
    scores: model_programs.Scores, index: int, candidates: list[int | None]
) -> list[tuple[float, bool]]:
    """Returns (log-probability in nats, is_greedy) of a row with each of its candidates.

    Args:
        scores: The scores of a batch.
        index: The index of the row in the batch.
        candidates: The candidates of the row.
    """
    log_p = scores.log_p_B[index]
    is_greedy = scores.is_greedy_B[index]
    listed = []
    for column, candidate in enumerate(candidates):
        if candidate is None:
            listed.append((float(log_p), bool(is_greedy)))
        else:
            total = log_p + scores.last_log_p_BM[index, column]
            all_greedy = is_greedy & scores.last_is_greedy_BM[index, column]
            listed.append((float(total), bool(all_greedy)))
    return listed


def _prefill_shapes(size: int, length: int) -> model_programs.Shapes:
    return {"tokens": ((size, length), np.int32), "lengths": ((size,), np.int32)}


def _score_shapes(size: int, length: int) -> model_programs.Shapes:
    return {
        "tokens": ((size, length), np.int32),
        "lengths": ((size,), np.int32),
        "starts": ((size,), np.int32),
        "last": ((size, MAX_CANDIDATES), np.int32),
    }


def _round_up_to_chunk(count: int) -> int:
    return -(-count // CHUNK) * CHUNK


def _round_down_to_power_of_two(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def list_padded_lengths(context_length: int) -> list[int]:
    """Returns the lengths to which rows are padded, in ascending order."""
    lengths = []
    length = SHORTEST_LENGTH
    while length < context_length:
        lengths.append(length)
        length *= 2
    return [*lengths, context_length]


def free_memory(device: jax.Device) -> int:
    """Returns the free bytes of an accelerator, or of this machine if the device is a CPU."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
