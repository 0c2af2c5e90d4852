"""Text to a TFDS dataset of fixed-length token records, without TensorFlow.

    python -m modse_jax.data.prepare --source=text:PATH --tokenizer=bytes --out=DIR

A document becomes begin, tokens, end; documents are laid end to end and cut every `sequence_length` tokens. A record
has one token more than that, the last of the record before, so that every token is predicted exactly once and a
validation loss times its tokens is a code length for the held-out bytes. Segment ids number the documents of a record
from 1; 0 is padding, which only the last record has. DIR holds the TFDS dataset, the tokenizer and card.json, and
appears under its name only when complete.
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from modse_jax import integrity
from modse_jax.config import UserError
from modse_jax.data import sources, tokenizers

FORMAT = 2
SPLITS = ("train", "validation")


class TokenRecords(tfds.core.GeneratorBasedBuilder):
    """Records {"tokens", "segments"}: int32 [sequence_length + 1]."""
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, generators, length, **kw):
        self._generators, self._length = generators, length
        super().__init__(**kw)

    def _info(self):
        array = tfds.features.Tensor(shape=(self._length,), dtype=np.int32)
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict(
            {"tokens": array, "segments": array}))

    def _split_generators(self, download_manager):
        return {split: enumerate(generator) for split, generator in self._generators.items()}

    def _generate_examples(self):
        raise RuntimeError("examples come from the generators given at construction")


def prepare(source: str, tokenizer: str, out: str, sequence_length: int, validation_fraction: float,
            vocab_size: int) -> dict:
    """Writes the dataset and returns its card. `vocab_size` is used only to train a tokenizer ("sentencepiece").

    Raises UserError, with nothing left behind: no documents, fewer tokens than one record, a directory that exists.
    """
    out = pathlib.Path(out).expanduser().absolute()
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is not a directory that may be written")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new directory or remove it")
    usable, counts = _usable(source)
    if not usable:
        raise UserError(f"source {source!r} has no document that is not empty and is UTF-8 ({counts})")
    held = sources.held_out(list(usable), validation_fraction)
    if not held:
        raise UserError(f"source {source!r} is a single document of {sum(usable.values())} bytes: nothing to hold out; "
                        f"give more files, or one file of over {sources.PIECE_BYTES} bytes with blank lines")
    if tokenizer == "sentencepiece":
        train = (d.text for d in sources.documents(source) if d.name in usable and d.name not in held)
        encoder = tokenizers.train_sentencepiece(train, vocab_size)
    else:
        encoder = tokenizers.load(tokenizer)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    new_parents = [p for p in partial.parents if not p.exists()]
    partial.mkdir(parents=True)
    try:
        splits = _write(source, usable, held, encoder, sequence_length, partial)
        card = {"format": FORMAT, "source": source, "tokenizer": tokenizers.fingerprint(encoder),
                "vocab_size": encoder.vocab_size, "sequence_length": sequence_length,
                "validation_fraction": validation_fraction, **counts, "splits": splits}
        (partial / "tokenizer.model").write_bytes(encoder.serialized())
        card["files"] = integrity.facts(partial)
        card["fingerprint"] = fingerprint(card)
        integrity.write(partial / "card.json", json.dumps(card, indent=2) + "\n")
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            parent.rmdir()
        raise
    return card


def fingerprint(card: dict) -> str:
    """A hash of everything else that the card says, the hash of every file included: what a checkpoint remembers of its
    data."""
    rest = {name: value for name, value in card.items() if name != "fingerprint"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _usable(source):
    """({name: bytes} of the documents to be used, counts of those that are not)."""
    usable, counts = {}, {"empty_documents": 0, "undecodable_documents": 0}
    for document in sources.documents(source):
        try:
            document.text.decode("utf-8")
        except UnicodeDecodeError:
            counts["undecodable_documents"] += 1
            continue
        if document.text:
            usable[document.name] = len(document.text)
        else:
            counts["empty_documents"] += 1
    return usable, counts


def _write(source, usable, held, encoder, sequence_length, directory):
    """The TFDS dataset under `directory`; returns the counts of each split."""
    splits = {split: dict(documents=0, bytes=0, tokens=0, records=0, padding=0, sha256="") for split in SPLITS}
    bar = tqdm.tqdm(total=sum(usable.values()), unit="B", unit_scale=True, desc="tokenizing", disable=None)

    def encoded(split):
        digest, count = hashlib.sha256(), splits[split]
        mine = (d.text for d in sources.documents(source)
                if d.name in usable and (d.name in held) == (split == "validation"))
        while texts := list(itertools.islice(mine, 64)):
            for text, tokens in zip(texts, encoder.encode_batch(texts)):
                ids = np.concatenate(([encoder.bos_id], tokens, [encoder.eos_id])).astype(np.int32)
                digest.update(text)
                count["documents"] += 1
                count["bytes"] += len(text)
                count["tokens"] += len(ids) - 1    # predicted: all but the document's first
                bar.update(len(text))
                yield ids
        count["sha256"] = digest.hexdigest()

    def records(split):
        for record in cut(encoded(split), sequence_length, encoder.pad_id):
            splits[split]["records"] += 1
            splits[split]["padding"] += int((record["segments"] == 0).sum())
            yield record

    tfds.disable_progress_bar()
    builder = TokenRecords(generators={split: records(split) for split in SPLITS}, length=sequence_length + 1,
                           data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):    # tfds tells of a download; there is none
        builder.download_and_prepare()
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    bar.close()
    if splits["train"]["tokens"] < sequence_length:
        raise UserError(f"source {source!r} has {splits['train']['tokens']} training tokens, fewer than one record of "
                        f"{sequence_length}; give more text or a shorter sequence_length")
    return splits


def cut(documents, length, pad_id):
    """Records of length + 1 tokens from token arrays laid end to end; neighbours share one token."""
    tokens, segments = np.zeros(0, np.int32), np.zeros(0, np.int32)
    for number, ids in enumerate(documents, 1):
        tokens = np.concatenate((tokens, ids))
        segments = np.concatenate((segments, np.full(len(ids), number, np.int32)))
        whole = (len(tokens) - 1) // length
        for start in range(0, whole * length, length):
            yield _record(tokens[start:start + length + 1], segments[start:start + length + 1], length, pad_id)
        tokens, segments = tokens[whole * length:], segments[whole * length:]
    if len(tokens) > 1:
        yield _record(tokens, segments, length, pad_id)


def _record(tokens, segments, length, pad_id):
    missing = length + 1 - len(tokens)
    segments = segments - segments[0] + 1
    return {"tokens": np.pad(tokens, (0, missing), constant_values=pad_id), "segments": np.pad(segments, (0, missing))}


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help=sources.FORMS)
    parser.add_argument("--tokenizer", required=True, help="bytes, sentencepiece:FILE, or sentencepiece (train one)")
    parser.add_argument("--out", required=True, help="a new directory")
    parser.add_argument("--sequence_length", type=int, default=512, help="predicted tokens per record")
    parser.add_argument("--validation_fraction", type=float, default=0.02, help="share of documents held out")
    parser.add_argument("--vocab_size", type=int, default=4096, help="pieces, where a tokenizer is trained")
    a = parser.parse_args(argv)
    if a.sequence_length < 2 or not 0 < a.validation_fraction < 1:
        parser.error("--sequence_length must be >= 2 and --validation_fraction between 0 and 1")
    try:
        card = prepare(a.source, a.tokenizer, a.out, a.sequence_length, a.validation_fraction, a.vocab_size)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(summary(card))


def summary(card: dict) -> str:
    """The card in a few lines."""
    lines = [f"source {card['source']}, tokenizer {card['tokenizer']} ({card['vocab_size']} ids), records of "
             f"{card['sequence_length']}; skipped: {card['empty_documents']} empty, "
             f"{card['undecodable_documents']} not UTF-8"]
    for split, c in card["splits"].items():
        lines.append(f"{split}: {c['documents']:,} documents, {c['bytes']:,} bytes, {c['tokens']:,} tokens "
                     f"({c['bytes'] / max(c['tokens'], 1):.2f} bytes each), {c['records']:,} records, "
                     f"{c['padding']:,} padding")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
