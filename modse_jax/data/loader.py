"""Prepared records to batches. A batch is a function of (seed, its number) alone, on any number of processes.

Legend: B batch, L predicted tokens per record.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from modse_jax.config.options import Config, DataConfig
from modse_jax.data import prepare, sources, tokenizers
from modse_jax.errors import UserError
from modse_jax.runtime import integrity

HASHED_BYTES = (
    2**30
)  # larger data is compared by size when opened; its reader checks a hash of every chunk it reads


ON_THE_FLY_BYTES = 256 * 2**20  # larger sources are prepared once, on their own


BLOCK = 4096  # records in which every source of a mixture has its share


class Dataset(NamedTuple):
    """One prepared directory."""

    name: str
    directory: pathlib.Path
    card: dict
    tokenizer: tokenizers.Tokenizer
    splits: dict  # "train", "validation" -> random-access records


class TrainingData(NamedTuple):
    """What a run trains on: one dataset, or several by weights that sum to one."""

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Of all that it holds, and how it is mixed."""
        prints = [d.card["fingerprint"] for d in self.datasets]
        if len(prints) == 1:
            return prints[0]
        return hashlib.blake2b(
            json.dumps([prints, self.weights]).encode(), digest_size=16
        ).hexdigest()

    @property
    def training_bytes_per_token(self) -> float:
        """As mixed."""
        return sum(
            w * d.card["splits"]["train"]["bytes"] / d.card["splits"]["train"]["tokens"]
            for w, d in zip(self.weights, self.datasets)
        )


def check_source(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError, before anything is written, where `load` would not find its data."""
    d = config.data
    for directory in _directories(d):
        _read_card(directory)
    if not _directories(d) and not (workdir / "data" / "card.json").exists():
        total = sources.size(d.source)
        if total > ON_THE_FLY_BYTES:
            raise UserError(
                f"data.source={d.source} has {total / 2**20:.0f} MiB, too much to prepare on the fly; run "
                f"python -m modse_jax.data.prepare --source={d.source} --tokenizer={d.tokenizer} --out=DIR "
                f"and train with --config.data.source=prepared:DIR"
            )
        if d.validation_source:
            sources.size(d.validation_source)
        if d.tokenizer != "sentencepiece":
            _check_vocabulary(d.tokenizer, tokenizers.load(d.tokenizer).vocab_size, config)


def load(config: Config, workdir: pathlib.Path) -> TrainingData:
    """The run's data, prepared into workdir/data where the source is text. Raises UserError where card and config
    disagree."""
    d = config.data
    if directories := _directories(d):
        return _checked(config, directories)
    directory = workdir / "data"
    if (directory / "card.json").exists():
        card = _read_card(directory)
        for name in prepare.OPTIONS:
            if name not in ("tokenizer", "sequence_length") and card[name] != getattr(d, name):
                raise UserError(
                    f"{directory} was prepared with {name} {card[name]!r}, but data.{name}="
                    f"{getattr(d, name)!r}; use another --workdir, or remove {directory}"
                )
        return _checked(config, [directory])
    new = [p for p in (workdir, *workdir.parents) if not p.exists()]
    prepare.prepare(d, directory, config.model.vocab_size, os.cpu_count())
    try:
        return _checked(config, [directory])
    except UserError:  # bad input leaves nothing behind
        shutil.rmtree(directory)
        for parent in new:
            parent.rmdir()
        raise


def _directories(d):
    """Of prepared data; none where the source is text."""
    if d.mixture:
        return [pathlib.Path(name).expanduser().absolute() for name, _ in d.mixture]
    if d.source.startswith("prepared:"):
        return [pathlib.Path(d.source.removeprefix("prepared:")).expanduser().absolute()]
    return []


def _checked(config, directories):
    datasets = tuple(open_prepared(directory) for directory in directories)
    if len({dataset.name for dataset in datasets}) < len(
        datasets
    ):  # told apart by their whole paths
        datasets = tuple(dataset._replace(name=str(dataset.directory)) for dataset in datasets)
    for dataset in datasets:
        _check_card(config, dataset)
        if dataset.card["tokenizer"] != datasets[0].card["tokenizer"]:
            raise UserError(
                f"data.mixture: {dataset.directory} was prepared with {dataset.card['tokenizer']}, "
                f"{datasets[0].directory} with {datasets[0].card['tokenizer']}; prepare them with one"
            )
    weights = [weight for _, weight in config.data.mixture] or [1.0]
    data = TrainingData(datasets, tuple(weight / sum(weights) for weight in weights))
    records = sum(len(dataset.splits["train"]) for dataset in datasets)
    if records < config.training.batch_size:
        raise UserError(
            f"{directories[0]} has {records} training records, fewer than training.batch_size="
            f"{config.training.batch_size}; give more text or a smaller batch"
        )
    return data


def open_prepared(directory: pathlib.Path) -> Dataset:
    """Prepared data whose files are those that its card names. Raises UserError where one is not."""
    card = _read_card(directory)
    _check_files(directory, card)
    tokenizer = tokenizers.from_serialized(
        card["tokenizer"].partition(":")[0],
        (directory / "tokenizer.model").read_bytes(),
        f"{directory}/tokenizer.model",
    )
    if tokenizers.fingerprint(tokenizer) != card["tokenizer"]:
        raise UserError(
            f"{directory}/tokenizer.model is not the tokenizer its card.json names ({card['tokenizer']})"
        )
    builder = tfds.builder_from_directory(str(directory / prepare.NAME / prepare.VERSION))
    return Dataset(
        directory.name,
        directory,
        card,
        tokenizer,
        {s: builder.as_data_source(split=s) for s in prepare.SPLITS},
    )


# ---- training --------------------------------------------------------------------------------------------------------


def train_batches(
    data: TrainingData, config: Config, first_batch: int, rows: Sequence[int] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """Batches {"tokens", "segments"} [B, L + 1] of int32, from the one of that number on; read ahead by threads. What a
    batch holds is a function of (training.seed, its number). rows: which rows of every batch to read, (): all."""
    batches = grain.MapDataset.source(BatchSource(data, config, rows))
    batches = iter(
        batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16))
    )
    grain.experimental.set_next_index(batches, first_batch)
    while True:
        try:
            yield next(batches)
        except UserError as error:  # Grain adds lines on tracebacks to it
            raise UserError(str(error).splitlines()[0]) from None


def record_ids(data: TrainingData, config: Config, batch: int) -> list[tuple[int, int]]:
    """(dataset, record) of the rows of the batch of that number."""
    return MixtureOrder(data, config).batch(batch, range(config.training.batch_size))


def epochs(data: TrainingData, config: Config, batches: int) -> dict[str, float]:
    """{dataset: how often that many batches have gone over its training records}."""
    order = MixtureOrder(data, config)
    return {
        d.name: count / len(d.splits["train"])
        for d, count in zip(data.datasets, order.counts(batches * config.training.batch_size))
    }


def tokens_by_dataset(data: TrainingData, config: Config, batches: int) -> dict[str, int]:
    """{dataset: predicted tokens that many batches have taken from it, padding included}."""
    counts = MixtureOrder(data, config).counts(batches * config.training.batch_size)
    return {d.name: count * config.data.sequence_length for d, count in zip(data.datasets, counts)}


class MixtureOrder:
    """Which record stands at every place of the endless sequence of training records.

    In every BLOCK of places each dataset has its share, to one record, in an order drawn for the block; within a
    dataset the records come in a new order every epoch. All of it is arithmetic on the place: no state, any start.
    """

    def __init__(self, data: TrainingData, config: Config):
        self._seed, self._size = config.training.seed, config.training.batch_size
        self._ends = np.cumsum(data.weights) if len(data.datasets) > 1 else np.array([1.0])
        self._ends[-1] = 1.0
        numbers = [grain.MapDataset.source(range(len(d.splits["train"]))) for d in data.datasets]
        self._orders = [n.seed(self._seed + i).shuffle().repeat() for i, n in enumerate(numbers)]
        self._block = functools.lru_cache(maxsize=4)(self._drawn)

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` are of each dataset."""
        block, rest = divmod(places, BLOCK)
        labels = (
            self._block(block)[0][:rest] if rest and len(self._orders) > 1 else np.zeros(rest, int)
        )
        return [int(before + np.sum(labels == i)) for i, before in enumerate(self._before(block))]

    def batch(self, number: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        return [self._at(number * self._size + row) for row in rows]

    def _at(self, place):
        if len(self._orders) == 1:
            return 0, int(self._orders[0][place])
        block, rest = divmod(place, BLOCK)
        labels, ranks = self._block(block)
        dataset = int(labels[rest])
        return dataset, int(self._orders[dataset][self._before(block)[dataset] + int(ranks[rest])])

    def _before(self, block):
        """Records of each dataset before a block: shares rounded so that they add up."""
        ends = [int(np.floor(block * BLOCK * end)) for end in self._ends]
        return [b - a for a, b in zip([0, *ends], ends)]

    def _drawn(self, block):
        """(dataset, how many of it stood before in the block) of every place of a block."""
        shares = [b - a for a, b in zip(self._before(block), self._before(block + 1))]
        labels = np.random.default_rng((self._seed, block)).permutation(
            np.repeat(np.arange(len(shares)), shares)
        )
        ranks = np.zeros(BLOCK, int)
        for dataset in range(len(shares)):
            ranks[labels == dataset] = np.arange(shares[dataset])
        return labels, ranks


class BatchSource:
    """Random access to batches: the given rows of each."""

    def __init__(self, data, config, rows):
        self._data, self._config, self._order = data, config, MixtureOrder(data, config)
        self._rows = rows or range(config.training.batch_size)

    def __len__(self):
        return 2**62 // self._config.training.batch_size

    def __getitem__(self, number):
        places = self._order.batch(number, self._rows)
        vocab = self._config.model.vocab_size
        if len(self._data.datasets) == 1:
            return read_records(
                self._data.datasets[0], "train", [record for _, record in places], vocab
            )
        out = None
        for dataset in sorted({d for d, _ in places}):
            at = [row for row, (d, _) in enumerate(places) if d == dataset]
            part = read_records(
                self._data.datasets[dataset], "train", [places[row][1] for row in at], vocab
            )
            out = out or {k: np.zeros((len(places), a.shape[1]), a.dtype) for k, a in part.items()}
            for name, array in part.items():
                out[name][at] = array
        return out


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_records(
    dataset: Dataset, split: str, ids: Sequence[int], vocab_size: int
) -> dict[str, np.ndarray]:
    """Records of a split, stacked, int32, and checked. Raises UserError, naming the record, where its file is damaged
    or it does not hold what was prepared."""
    where = dataset.splits[split]
    try:
        records = (
            where.__getitems__(list(ids))
            if hasattr(where, "__getitems__")
            else [where[i] for i in ids]
        )
    except Exception as error:  # whatever the reader raises, it is the file
        raise UserError(
            f"record {_first_unreadable(where, ids)} of {split} in {dataset.directory} cannot be read "
            f"({str(error)[:200] or type(error).__name__}); its file is damaged: prepare the data again, "
            "or restore it from a copy"
        ) from None
    length = dataset.card["sequence_length"] + 1
    for number, record in zip(ids, records):
        if {a.shape for a in record.values()} != {(length,)}:
            raise UserError(
                f"record {number} of {split} in {dataset.directory} has shapes "
                f"{[a.shape for a in record.values()]}, not ({length},)"
            )
    batch = {
        name: np.stack([record[name] for record in records]).astype(np.int32)
        for name in ("tokens", "segments")
    }
    _check_values(dataset, split, ids, batch, vocab_size)
    return batch


def _first_unreadable(where, ids):
    for number in ids:
        try:
            where[number]
        except Exception:
            return number
    return ids[0]


def _check_values(dataset, split, ids, batch, vocab_size):
    """Token ids in the vocabulary (inside jit a wrong one would be clamped without a word); segments that count
    documents from 1, then 0."""
    tokens, segments = batch["tokens"], batch["segments"]
    step = np.diff(segments, axis=1)
    ends = (step < 0) & (segments[:, 1:] == 0)  # where padding begins
    odd = (segments[:, 0] != 1) | ((step != 0) & (step != 1) & ~ends).any(axis=1)
    odd |= ((segments[:, :-1] == 0) & (step != 0)).any(axis=1)
    outside = ((tokens < 0) | (tokens >= vocab_size)).any(axis=1)
    if outside.any():
        row = int(np.argmax(outside))
        wrong = next(int(t) for t in tokens[row] if not 0 <= t < vocab_size)
        raise UserError(
            f"record {ids[row]} of {split} in {dataset.directory} holds token id {wrong}, outside the "
            f"vocabulary 0..{vocab_size - 1} (model.vocab_size={vocab_size})"
        )
    if odd.any():
        raise UserError(
            f"record {ids[int(np.argmax(odd))]} of {split} in {dataset.directory} has segment ids that do "
            "not count documents from 1, with 0 only as padding at its end"
        )


def validation_batches(
    dataset: Dataset, batch_size: int, vocab_size: int, limit: int = 0, rows: Sequence[int] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """Every validation record once (the first `limit`, if not 0), in order; padding records fill up the last batch.
    rows: which rows of every batch to read, (): all."""
    records, rows = dataset.splits["validation"], rows or range(batch_size)
    count = min(limit or len(records), len(records))
    for start in range(0, count, batch_size):
        mine = [start + row for row in rows]
        real = [number for number in mine if number < count]
        batch = read_records(dataset, "validation", real or [0], vocab_size)
        places = [real.index(number) if number < count else -1 for number in mine]
        yield {
            name: np.stack(
                [array[place] if place >= 0 else np.zeros_like(array[0]) for place in places]
            )
            for name, array in batch.items()
        }


def documents(dataset: Dataset, split: str) -> Iterator[bytes]:
    """The documents of a split, decoded from its records: exactly what was prepared, in that order with concat."""
    begin, tokens = dataset.tokenizer.bos_id, []
    for record in dataset.splits[split]:
        ids = record["tokens"][record["segments"] > 0].tolist()
        for token in (
            ids[1:] if tokens and ids[0] == tokens[-1] else ids
        ):  # the first is shared with that before
            if token == begin and tokens:
                yield dataset.tokenizer.decode(tokens)
                tokens = []
            tokens.append(token)
    if tokens:
        yield dataset.tokenizer.decode(tokens)


# ---- cards -----------------------------------------------------------------------------------------------------------


def _check_files(directory, card):
    total = sum(size for size, _ in card["files"].values())
    try:
        here = integrity.files(directory)
        odd = sorted(set(here) ^ {"card.json", *card["files"]})
        bad = [
            f"{name} is {'missing' if name in card['files'] else 'not part of it'}" for name in odd
        ]
        bad += [
            reason
            for name, fact in card["files"].items()
            if name in here
            and (reason := integrity.mismatch(here[name], name, fact, hashes=total <= HASHED_BYTES))
        ]
    except (OSError, ValueError) as error:
        bad = [str(error)]
    if bad:
        raise UserError(
            f"the data in {directory} is damaged: {bad[0]}; prepare it again, or restore it from a copy"
        )


def _read_card(directory):
    path = directory.expanduser() / "card.json"
    try:
        card = integrity.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not prepared data (no card.json); make it with "
            f"python -m modse_jax.data.prepare --source=... --tokenizer=... --out={directory}"
        ) from None
    except ValueError as error:
        raise UserError(f"{directory}: {error}; prepare the data again") from None
    if not isinstance(card, dict) or card.get("format") != prepare.FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise UserError(
            f"{directory} has data format {found}, this code reads {prepare.FORMAT}; prepare the data "
            "again"
        )
    if card.get("fingerprint") != prepare.fingerprint(card):
        raise UserError(
            f"{path} is damaged (its own hash is another); prepare the data again, or restore it from a "
            "copy"
        )
    return card


def _check_vocabulary(name, size, config):
    if size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has {size} ids, more than model.vocab_size="
            f"{config.model.vocab_size}"
        )


def _check_card(config, dataset):
    d, card = config.data, dataset.card
    if card["sequence_length"] != d.sequence_length:
        raise UserError(
            f"{dataset.directory} has records of {card['sequence_length']} tokens, but "
            f"data.sequence_length={d.sequence_length}"
        )
    wanted = (
        d.tokenizer
        if d.tokenizer == "sentencepiece"
        else tokenizers.fingerprint(tokenizers.load(d.tokenizer))
    )
    if wanted.partition(":")[0] != card["tokenizer"].partition(":")[0] or (
        ":" in wanted and wanted != card["tokenizer"]
    ):
        raise UserError(
            f"data.tokenizer={d.tokenizer} does not match {dataset.directory}, prepared with "
            f"{card['tokenizer']}"
        )
    if _directories(d):  # what was decided when it was prepared
        for name in set(prepare.OPTIONS) - {"source", "tokenizer", "sequence_length"}:
            if getattr(d, name) not in (getattr(DataConfig(), name), card[name]):
                raise UserError(
                    f"{dataset.directory} was prepared with {name} {card[name]!r}, but data.{name}="
                    f"{getattr(d, name)!r}; prepare it so, or leave the option out"
                )
    _check_vocabulary(str(dataset.directory), card["vocab_size"], config)
