"""Prepared records to batches. The batch of step s is a function of (seed, s) alone.

Legend: B batch, L predicted tokens per record.
"""
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from modse_jax import integrity
from modse_jax.config import Config, UserError
from modse_jax.data import prepare, sources, tokenizers

HASHED_BYTES = 2**30    # larger data is compared by size when opened; its reader checks a hash of every chunk it reads
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
    """Prepared data whose files are those that its card names. Raises UserError where one is not."""
    card = _read_card(directory)
    _check_files(directory, card)
    tokenizer = tokenizers.from_serialized(card["tokenizer"].partition(":")[0],
                                           (directory / "tokenizer.model").read_bytes(), f"{directory}/tokenizer.model")
    if tokenizers.fingerprint(tokenizer) != card["tokenizer"]:
        raise UserError(f"{directory}/tokenizer.model is not the tokenizer its card.json names ({card['tokenizer']})")
    builder = tfds.builder_from_directory(str(directory / "token_records" / "1.0.0"))
    return Data(directory, card, tokenizer, {s: builder.as_data_source(split=s) for s in prepare.SPLITS})


def train_batches(data: Data, config: Config, first_batch: int,
                  rows: Sequence[int] = ()) -> Iterator[dict[str, np.ndarray]]:
    """Batches {"tokens", "segments"} [B, L + 1], from the one of that number on; a new order every epoch. What a batch
    holds is a function of (training.seed, its number). rows: which rows of every batch to read, (): all."""
    steps = grain.MapDataset.source(_Batches(data, config, rows))
    batches = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    grain.experimental.set_next_index(batches, first_batch)
    while True:
        try:
            yield next(batches)
        except UserError as error:    # Grain adds lines on tracebacks to it
            raise UserError(str(error).splitlines()[0]) from None


def record_ids(data: Data, config: Config, batch: int) -> list[int]:
    """Which training records make up the batch of that number: for the log of a step that went wrong."""
    return _Batches(data, config, ()).ids(batch)


class _Batches:
    """Random access to the batches of an endless order of records: the given rows of each."""

    def __init__(self, data, config, rows):
        numbers = grain.MapDataset.source(range(len(data.splits["train"])))
        self._order = numbers.seed(config.training.seed).shuffle().repeat()
        self._data, self._config, self._rows = data, config, rows or range(config.training.batch_size)

    def __len__(self):
        return len(self._order) // self._config.training.batch_size

    def ids(self, batch):
        return [int(self._order[batch * self._config.training.batch_size + row]) for row in self._rows]

    def __getitem__(self, batch):
        return read_records(self._data, "train", self.ids(batch), self._config.model.vocab_size)


def read_records(data: Data, split: str, ids: Sequence[int], vocab_size: int) -> dict[str, np.ndarray]:
    """Records of a split, stacked and checked. Raises UserError, naming the record, where its file is damaged or it
    does not hold what was prepared."""
    records = []
    for number in ids:
        try:
            records.append(data.splits[split][number])
        except Exception as error:    # whatever the reader raises, it is the file
            raise UserError(f"record {number} of {split} in {data.directory} cannot be read "
                            f"({str(error)[:200] or type(error).__name__}); its file is damaged: prepare the data "
                            "again, or restore it from a copy") from None
        reason = _trouble(records[-1], data.card["sequence_length"], vocab_size)
        if reason:
            raise UserError(f"record {number} of {split} in {data.directory} {reason}")
    return {name: np.stack([record[name] for record in records]) for name in ("tokens", "segments")}


def _trouble(record, length, vocab_size):
    """What a record of the data's length may not be; inside jit a wrong id would be clamped without a word."""
    tokens, segments = record["tokens"], record["segments"]
    if tokens.shape != (length + 1,) or segments.shape != (length + 1,):
        return f"has shapes {tokens.shape} and {segments.shape}, not ({length + 1},)"
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        return (f"holds token id {low if low < 0 else high}, outside the vocabulary 0..{vocab_size - 1} "
                f"(model.vocab_size={vocab_size})")
    real = segments[:np.argmin(segments)] if (segments == 0).any() else segments
    if segments[len(real):].any() or not len(real) or real[0] != 1 or not np.isin(np.diff(real), (0, 1)).all():
        return "has segment ids that do not count documents from 1, with 0 only as padding at its end"
    return ""


def validation_batches(data: Data, batch_size: int, vocab_size: int, limit: int = 0,
                       rows: Sequence[int] = ()) -> Iterator[dict[str, np.ndarray]]:
    """Every validation record once (the first `limit`, if not 0), in order; padding records fill up the last batch.
    rows: which rows of every batch to read, (): all."""
    records, rows = data.splits["validation"], rows or range(batch_size)
    count = min(limit or len(records), len(records))
    for start in range(0, count, batch_size):
        mine = [start + row for row in rows]
        real = [number for number in mine if number < count]
        batch = read_records(data, "validation", real or [0], vocab_size)
        places = [real.index(number) if number < count else -1 for number in mine]
        yield {name: np.stack([array[place] if place >= 0 else np.zeros_like(array[0]) for place in places])
               for name, array in batch.items()}


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


def _check_files(directory, card):
    total = sum(size for size, _ in card["files"].values())
    try:
        here = integrity.files(directory)
        odd = sorted(set(here) ^ {"card.json", *card["files"]})
        bad = [f"{name} is {'missing' if name in card['files'] else 'not part of it'}" for name in odd]
        bad += [reason for name, fact in card["files"].items() if name in here
                and (reason := integrity.differs(here[name], name, fact, hashes=total <= HASHED_BYTES))]
    except (OSError, ValueError) as error:
        bad = [str(error)]
    if bad:
        raise UserError(f"the data in {directory} is damaged: {bad[0]}; prepare it again, or restore it from a copy")


def _read_card(directory):
    path = directory.expanduser() / "card.json"
    try:
        card = integrity.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory} is not prepared data (no card.json); make it with "
                        f"python -m modse_jax.data.prepare --source=... --tokenizer=... --out={directory}") from None
    except ValueError as error:
        raise UserError(f"{directory}: {error}; prepare the data again") from None
    if not isinstance(card, dict) or card.get("format") != prepare.FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise UserError(f"{directory} has data format {found}, this code reads {prepare.FORMAT}; prepare the data "
                        "again")
    if card.get("fingerprint") != prepare.fingerprint(card):
        raise UserError(f"{path} is damaged (its own hash is another); prepare the data again, or restore it from a "
                        "copy")
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
