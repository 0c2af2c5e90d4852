"""Prepared records to batches. The batch of step s is a function of (seed, s) alone.

Legend: B batch, L predicted tokens per record.
"""
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from modse_jax.config import Config, UserError
from modse_jax.data import prepare, sources, tokenizers

ON_THE_FLY_BYTES = 256 * 2**20    # larger sources are prepared once, on their own


class Data(NamedTuple):
    directory: pathlib.Path
    card: dict
    tokenizer: tokenizers.Tokenizer
    splits: dict    # "train", "validation" -> random-access records

    def bytes_per_token(self, split: str) -> float:
        return self.card["splits"][split]["bytes"] / self.card["splits"][split]["tokens"]


def check_source(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError, before anything is written, where `load` would not find its data."""
    d = config.data
    if d.source.startswith("prepared:"):
        _read_card(pathlib.Path(d.source.removeprefix("prepared:")))
    elif not (workdir / "data" / "card.json").exists():
        total = sources.size(d.source)
        if total > ON_THE_FLY_BYTES:
            raise UserError(f"data.source={d.source} has {total / 2**20:.0f} MiB, too much to prepare on the fly; run "
                            f"python -m modse_jax.data.prepare --source={d.source} --tokenizer={d.tokenizer} --out=DIR "
                            f"and train with --config.data.source=prepared:DIR")
        if d.tokenizer != "sentencepiece":
            _check_vocabulary(d.tokenizer, tokenizers.load(d.tokenizer).vocab_size, config)


def load(config: Config, workdir: pathlib.Path) -> Data:
    """The run's data, prepared into workdir/data where the source is text. Raises UserError where card and config
    disagree."""
    d = config.data
    if d.source.startswith("prepared:"):
        directory = pathlib.Path(d.source.removeprefix("prepared:")).expanduser().absolute()
        return _open_checked(config, directory)
    directory = workdir / "data"
    if (directory / "card.json").exists():
        card = _read_card(directory)
        for name, wanted in (("source", d.source), ("validation_fraction", d.validation_fraction)):
            if card[name] != wanted:
                raise UserError(f"{directory} was prepared with {name} {card[name]!r}, but data.{name}={wanted!r}; use "
                                f"another --workdir, or remove {directory}")
        return _open_checked(config, directory)
    new = [p for p in (workdir, *workdir.parents) if not p.exists()]
    prepare.prepare(d.source, d.tokenizer, directory, d.sequence_length, d.validation_fraction, config.model.vocab_size)
    try:
        return _open_checked(config, directory)
    except UserError:    # bad input leaves nothing behind
        shutil.rmtree(directory)
        for parent in new:
            parent.rmdir()
        raise


def _open_checked(config, directory):
    data = open_prepared(directory)
    _check_card(config, data)
    return data


def open_prepared(directory: pathlib.Path) -> Data:
    card = _read_card(directory)
    tokenizer = tokenizers.from_serialized(card["tokenizer"].partition(":")[0],
                                           (directory / "tokenizer.model").read_bytes(), f"{directory}/tokenizer.model")
    if tokenizers.fingerprint(tokenizer) != card["tokenizer"]:
        raise UserError(f"{directory}/tokenizer.model is not the tokenizer its card.json names ({card['tokenizer']})")
    builder = tfds.builder_from_directory(str(directory / "token_records" / "1.0.0"))
    return Data(directory, card, tokenizer, {s: builder.as_data_source(split=s) for s in prepare.SPLITS})


def train_batches(data: Data, config: Config, start_step: int,
                  rows: Sequence[int] = ()) -> Iterator[dict[str, np.ndarray]]:
    """Batches {"tokens", "segments"} [B, L + 1] of steps start_step, start_step + 1, ...; a new order every epoch.
    rows: which rows of every batch to read, (): all."""
    order = grain.MapDataset.source(data.splits["train"]).seed(config.training.seed).shuffle().repeat()
    steps = grain.MapDataset.source(_Steps(order, config.training.batch_size, rows))
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    grain.experimental.set_next_index(batches, start_step)
    for batch in batches:
        yield check_tokens(batch, config.model.vocab_size, data.directory)


class _Steps:
    """Random access to the batches of an endless order of records: the given rows of each."""

    def __init__(self, order, batch_size, rows):
        self._order, self._size, self._rows = order, batch_size, rows or range(batch_size)

    def __len__(self):
        return len(self._order) // self._size

    def __getitem__(self, step):
        return _stacked([self._order[step * self._size + row] for row in self._rows])


def validation_batches(data: Data, batch_size: int, vocab_size: int, limit: int = 0,
                       rows: Sequence[int] = ()) -> Iterator[dict[str, np.ndarray]]:
    """Every validation record once (the first `limit`, if not 0), in order; padding records fill up the last batch.
    rows: which rows of every batch to read, (): all."""
    records, rows = data.splits["validation"], rows or range(batch_size)
    count = min(limit or len(records), len(records))
    padding = {name: np.zeros_like(array) for name, array in records[0].items()}
    for start in range(0, count, batch_size):
        batch = _stacked([records[start + row] if start + row < count else padding for row in rows])
        yield check_tokens(batch, vocab_size, data.directory)


def _stacked(records):
    return {name: np.stack([record[name] for record in records]) for name in ("tokens", "segments")}


def documents(data: Data, split: str) -> Iterator[bytes]:
    """The documents of a split, decoded from its records: exactly what was prepared."""
    tokens = []
    for record in data.splits[split]:
        ids = record["tokens"] if not tokens else record["tokens"][1:]
        segments = record["segments"][len(record["segments"]) - len(ids):]
        for token in ids[segments > 0].tolist():
            if token == data.tokenizer.bos_id and tokens:
                yield data.tokenizer.decode(tokens)
                tokens = []
            tokens.append(token)
    if tokens:
        yield data.tokenizer.decode(tokens)


def check_tokens(batch: dict[str, np.ndarray], vocab_size: int, where) -> dict[str, np.ndarray]:
    """The batch, if every id is inside the vocabulary; inside jit a wrong one would be clamped without a word."""
    low, high = int(batch["tokens"].min()), int(batch["tokens"].max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"token id {low if low < 0 else high} in {where} is outside the vocabulary "
                        f"0..{vocab_size - 1} (model.vocab_size={vocab_size})")
    return batch


def _read_card(directory):
    path = directory.expanduser() / "card.json"
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is not prepared data (no card.json); make it with "
                        f"python -m modse_jax.data.prepare --source=... --tokenizer=... --out={directory}") from None
    except ValueError:
        raise UserError(f"{path} is damaged (not JSON); prepare the data again") from None
    if card.get("format") != prepare.FORMAT:
        raise UserError(f"{directory} has data format {card.get('format')}, this code reads {prepare.FORMAT}; "
                        f"prepare the data again")
    return card


def _check_vocabulary(name, size, config):
    if size > config.model.vocab_size:
        raise UserError(f"the tokenizer of {name} has {size} ids, more than model.vocab_size="
                        f"{config.model.vocab_size}")


def _check_card(config, data):
    d, card = config.data, data.card
    if card["sequence_length"] != d.sequence_length:
        raise UserError(f"{data.directory} has records of {card['sequence_length']} tokens, but "
                        f"data.sequence_length={d.sequence_length}")
    wanted = d.tokenizer if d.tokenizer == "sentencepiece" else tokenizers.fingerprint(tokenizers.load(d.tokenizer))
    if wanted.partition(":")[0] != card["tokenizer"].partition(":")[0] or (":" in wanted
                                                                           and wanted != card["tokenizer"]):
        raise UserError(f"data.tokenizer={d.tokenizer} does not match {data.directory}, prepared with "
                        f"{card['tokenizer']}")
    _check_vocabulary(str(data.directory), card["vocab_size"], config)
    smallest = len(data.splits["train"])
    if smallest < config.training.batch_size:
        raise UserError(f"{data.directory} has {smallest} training records, fewer than training.batch_size="
                        f"{config.training.batch_size}; give more text or a smaller batch")
