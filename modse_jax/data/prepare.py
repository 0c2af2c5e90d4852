"""Text to a TFDS dataset of fixed-length token records, without TensorFlow.

    python -m modse_jax.data.prepare --source=text:PATH --tokenizer=bytes --out=DIR

A source is cut into parts, and every part becomes shards of its own: any number of processes give the same files, and
a run that was killed goes on where it was. Two passes: the first looks (empty, undecodable and repeated documents,
which are held out), the second tokenizes. A document becomes begin, tokens, end; packing.py lays them into records. DIR
holds the TFDS dataset, the tokenizer and card.json, and appears under its name only when complete.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from array import array as Array
from concurrent import futures

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from modse_jax.config.options import PACKINGS, UNDECODABLE, DataConfig
from modse_jax.data import packing, sources, tokenizers
from modse_jax.errors import UserError
from modse_jax.runtime import integrity
from modse_jax.runtime.lock import Lock

FORMAT = 3


SPLITS = ("train", "validation")


NAME, VERSION = "token_records", "1.0.0"


BATCH_BYTES = 1 << 20  # of text tokenized at a time


FEW_DOCUMENTS = 1_000_000  # whose hashes are compared all at once


SAMPLED = 100_000  # documents on which both packings are compared


SCANNED, SHARDS, PLAN = "scanned", "shards", "plan"


def prepare(data: DataConfig, out: str, vocab_size: int, workers: int = 1) -> dict:
    """Writes the dataset of a config's data section and returns its card.

    Args: vocab_size: used only to train a tokenizer ("sentencepiece"). workers: processes.
    Raises UserError, with nothing left behind: no documents, fewer tokens than one record, a directory that exists.
    What a killed run leaves, DIR.partial, is taken up by the next with the same options.
    """
    out = pathlib.Path(out).expanduser().absolute()
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is not a directory that may be written")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new directory or remove it")
    parts = _parts(data)
    encoder = None if data.tokenizer == "sentencepiece" else tokenizers.load(data.tokenizer)
    partial, new = out.with_name(out.name + ".partial"), [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    held = Lock(out.with_name(out.name + ".preparing"), f"{out} is being prepared")
    try:
        _take_up(partial, data, vocab_size, parts, encoder)
        scan = _scan(data, parts, partial, workers)
        encoder = encoder or _trained(data, parts, scan, partial, vocab_size)
        card = _encode(data, parts, scan, encoder, partial, workers)
        _finish(partial, out, card, encoder)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        held.release(leave_no_trace=True)
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        held.release(leave_no_trace=True)
    return card


def _parts(data):
    if not data.validation_source:
        return sources.parts(data.source, data.field)
    return [
        p
        for source, held in ((data.source, False), (data.validation_source, True))
        for p in sources.parts(source, data.field, held)
    ]


def _take_up(partial, data, vocab_size, parts, encoder):
    """An empty working directory, or one that a run with the same options and sources has left."""

    def stamp(part):
        return (
            [[path, os.stat(path).st_mtime_ns] for _, path in part.files]
            if part.kind != "tfds"
            else []
        )

    plan = {
        "format": FORMAT,
        "data": {k: getattr(data, k) for k in OPTIONS},
        "vocab_size": vocab_size,
        "tokenizer": tokenizers.fingerprint(encoder) if encoder else "",
        "parts": [[*p, stamp(p)] for p in parts],
    }
    plan = hashlib.blake2b(json.dumps(plan).encode(), digest_size=16).hexdigest()
    if (partial / PLAN).exists() and (partial / PLAN).read_text() == plan:
        return
    shutil.rmtree(partial, ignore_errors=True)
    for folder in (SCANNED, SHARDS):
        (partial / folder).mkdir(parents=True)
    integrity.write(partial / PLAN, plan)


OPTIONS = (
    "source",
    "validation_source",
    "field",
    "tokenizer",
    "sequence_length",
    "validation_fraction",
    "packing",
    "drop_duplicates",
    "undecodable",
)


# ---- first pass ------------------------------------------------------------------------------------------------------


class _Scan:
    """What the first pass found. limit: held out is what lies below it. dropped: document numbers of every part."""

    def __init__(self, facts, limit, dropped, duplicates):
        self.limit, self.dropped = limit, dropped
        self.counts = {
            "empty_documents": sum(f["empty"] for f in facts),
            "undecodable_documents": sum(f["undecodable"] for f in facts),
            "duplicate_documents": duplicates,
            "dropped_documents": sum(map(len, dropped)),
        }
        self.bytes = sum(f["bytes"] for f in facts)


def _scan(data, parts, partial, workers):
    facts = _over_parts(
        functools.partial(_scan_part, data, partial), parts, workers, "reading", data
    )
    documents = sum(f["documents"] for f in facts)
    if not documents:
        raise UserError(
            f"source {data.source!r} has no document that is not empty and is UTF-8 "
            f"({sum(f['empty'] for f in facts)} empty, {sum(f['undecodable'] for f in facts)} not UTF-8)"
        )
    mine = [f for f, part in zip(facts, parts) if part.held_out is None and f["documents"]]
    limit = 0.0
    if mine:
        if sum(f["documents"] for f in mine) == 1:
            raise UserError(
                f"source {data.source!r} is a single document of {mine[0]['bytes']} bytes: nothing to hold "
                f"out; give more files, or one file of over {sources.PIECE_BYTES} bytes with blank lines, "
                "or a validation_source"
            )
        limit = sources.holdout_threshold(
            sum(f["below"] for f in mine),
            min(f["least"] for f in mine),
            max(f["greatest"] for f in mine),
            data.validation_fraction,
        )
    repeated = _repeated([partial / SCANNED / f"{i:05}.hashes" for i in range(len(parts))])
    dropped = repeated if data.drop_duplicates else [repeated[0][:0]] * len(parts)
    return _Scan(facts, limit, dropped, sum(map(len, repeated)))


def _scan_part(data, partial, number, part):
    path = partial / SCANNED / f"{number:05}.json"
    if path.exists():
        return integrity.read_json(path)
    facts = dict(documents=0, bytes=0, empty=0, undecodable=0, below=0, least=1.0, greatest=0.0)
    digests = Array("Q")
    for name, text in _usable(part, data.undecodable, facts):
        where = sources.holdout_score(name)
        facts["documents"], facts["bytes"] = facts["documents"] + 1, facts["bytes"] + len(text)
        facts["below"] += where < data.validation_fraction
        facts["least"], facts["greatest"] = (
            min(facts["least"], where),
            max(facts["greatest"], where),
        )
        digests.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()))
    with open(partial / SCANNED / f"{number:05}.hashes", "wb") as file:
        digests.tofile(file)
    integrity.sync(
        partial / SCANNED / f"{number:05}.hashes"
    )  # before the file that says that it is there
    integrity.write(path, json.dumps(facts))
    return facts


def _usable(part, undecodable, facts):
    """The part's documents but for empty ones, and those that are not UTF-8 as the option says; counted."""
    for document in sources.read(part):
        text = document.text
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            facts["undecodable"] += 1
            if undecodable == "fail":
                raise UserError(
                    f"{part.where}: document {document.name} is not UTF-8 (byte {error.start}); with "
                    "undecodable=skip it is left out, with replace what is wrong is replaced"
                ) from None
            if undecodable == "skip":
                continue
            text = text.decode("utf-8", "replace").encode()
        if text:
            yield document.name, text
        else:
            facts["empty"] += 1


def _repeated(files, buckets=64):
    """Document numbers of every part that are exact copies of an earlier document. In buckets of hashes, so that memory
    holds a part of them at a time."""
    starts = np.cumsum([0, *(f.stat().st_size // 8 for f in files)])
    buckets = 1 if starts[-1] < FEW_DOCUMENTS else buckets
    found = []
    for bucket in range(buckets):
        picked = []
        for file, start in zip(files, starts):
            hashes = np.fromfile(file, np.uint64)
            mine = hashes % np.uint64(buckets) == bucket
            picked.append((hashes[mine], np.flatnonzero(mine) + start))
        digests, numbers = (np.concatenate([p[i] for p in picked]) for i in range(2))
        first = np.unique(digests, return_index=True)[1]
        found.append(np.delete(numbers, first))
    repeated = np.sort(np.concatenate(found))
    edges = np.searchsorted(repeated, starts)
    return [repeated[a:b] - start for a, b, start in zip(edges, edges[1:], starts)]


def _trained(data, parts, scan, partial, vocab_size):
    """A tokenizer trained on the training documents, once."""
    path = partial / "tokenizer.model"
    if not path.exists():
        train = (
            text
            for number, part in enumerate(parts)
            for _, text, held in _documents(data, scan.limit, scan.dropped[number], part)
            if not held
        )
        model = tokenizers.train_sentencepiece(train, vocab_size).serialized()
        path.with_suffix(".tmp").write_bytes(model)
        path.with_suffix(".tmp").replace(path)
    return tokenizers.from_serialized("sentencepiece", path.read_bytes(), str(path))


def _documents(data, limit, dropped, part):
    """(name, text, whether it is held out) of the part's documents that are used."""
    dropped = set(dropped.tolist())
    for number, (name, text) in enumerate(
        _usable(part, data.undecodable, dict(undecodable=0, empty=0))
    ):
        if number not in dropped:
            yield (
                name,
                text,
                part.held_out if part.held_out is not None else sources.holdout_score(name) < limit,
            )


# ---- second pass -----------------------------------------------------------------------------------------------------


def _encode(data, parts, scan, encoder, partial, workers):
    """The shards of every part; returns the card."""
    model = encoder.kind, encoder.serialized()
    work = functools.partial(
        _encode_part, data, partial, model, scan.limit, max(20, SAMPLED // len(parts))
    )
    facts = _over_parts(work, parts, workers, "tokenizing", data, scan.dropped)
    splits = {}
    for split in SPLITS:
        mine = [f[split] for f in facts]
        splits[split] = {
            name: sum(m[name] for m in mine)
            for name in ("documents", "bytes", "tokens", "records", "padding")
        }
        splits[split]["sha256"] = hashlib.sha256(
            "".join(m["sha256"] for m in mine).encode()
        ).hexdigest()
        splits[split]["shards"] = [m["records"] for m in mine]
    if splits["train"]["tokens"] < data.sequence_length:
        found = splits["train"]["tokens"]
        raise UserError(
            f"source {data.source!r} has {found} training tokens, fewer than one record of "
            f"{data.sequence_length}; give more text or a shorter sequence_length"
        )
    if not splits["validation"]["tokens"]:
        raise UserError(
            f"nothing is held out of {data.validation_source or data.source!r}; give more text, or a "
            "larger validation_fraction"
        )
    sample = [size for f in facts for size in f["sizes"]]
    return {
        "format": FORMAT,
        **{k: getattr(data, k) for k in OPTIONS if k != "tokenizer"},
        "tokenizer": tokenizers.fingerprint(encoder),
        "vocab_size": encoder.vocab_size,
        **scan.counts,
        "waste": packing.waste(sample, data.sequence_length),
        "splits": splits,
        "command": _command(data),
    }


def _command(data):
    """What makes this data again."""
    default, flags = DataConfig(), [f"--source={data.source}", f"--tokenizer={data.tokenizer}"]
    for name in OPTIONS:
        value = getattr(data, name)
        if name not in ("source", "tokenizer") and value != getattr(default, name):
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return f"python -m modse_jax.data.prepare {' '.join(flags)} --out=DIR"


def _encode_part(data, partial, model, limit, sampled, number, part, dropped):
    path = partial / SHARDS / f"{number:05}.json"
    if path.exists():
        return integrity.read_json(path)
    encoder = tokenizers.from_serialized(*model, "the tokenizer")
    facts = {
        split: _Split(data, encoder, partial / SHARDS / f"{split}-{number:05}") for split in SPLITS
    }
    sizes, waiting, size = [], [], 0

    def encoded():
        for (_, held), ids in zip(waiting, encoder.encode_batch([text for text, _ in waiting])):
            ids = np.concatenate(([encoder.bos_id], ids, [encoder.eos_id])).astype(np.int32)
            facts["validation" if held else "train"].add(ids)
            if len(sizes) < sampled:
                sizes.append(len(ids))

    for _, text, held in _documents(data, limit, dropped, part):
        facts["validation" if held else "train"].count(text)
        waiting.append((text, held))
        size += len(text)
        if size >= BATCH_BYTES:
            encoded()
            waiting, size = [], 0
    encoded()
    out = {split: f.close() for split, f in facts.items()} | {"sizes": sizes}
    for split in SPLITS:
        integrity.sync(partial / SHARDS / f"{split}-{number:05}")
    integrity.write(path, json.dumps(out))
    return out


class _Split:
    """The shard that a part gives to a split: documents come in, records go out when there are enough of them."""

    def __init__(self, data, encoder, path):
        self._facts = dict(documents=0, bytes=0, tokens=0, records=0, padding=0)
        self._digest = hashlib.sha256()
        self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        self._serialize = Serializer(data.sequence_length + 1, encoder.vocab_size)
        self._packer = packing.Packer(data.packing, data.sequence_length, encoder.pad_id)

    def count(self, text):
        self._digest.update(text)
        self._facts["documents"] += 1
        self._facts["bytes"] += len(text)

    def add(self, ids):
        self._facts["tokens"] += len(ids) - 1  # predicted: all but the document's first
        for block in self._packer.add(ids):
            self._write(*block)

    def _write(self, tokens, segments):
        self._facts["records"] += len(tokens)
        self._facts["padding"] += int((segments == 0).sum())
        for record in self._serialize(tokens, segments):
            self._writer.write(record)

    def close(self):
        for block in self._packer.rest():
            self._write(*block)
        self._writer.close()
        return {**self._facts, "sha256": self._digest.hexdigest()}


def features(length: int, vocab_size: int) -> tfds.features.FeaturesDict:
    """Of a record of that many tokens: raw bytes, as narrow as the ids allow."""

    def array(dtype):
        return tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "tokens": array(np.uint16 if vocab_size <= 2**16 else np.uint32),
            "segments": array(np.uint16 if length < 2**16 else np.uint32),
        }
    )


class Serializer:
    """(tokens, segments) [n, length] to serialized examples: TFDS's own bytes, of which only the two arrays change from
    record to record. Five times as fast as serializing each."""

    def __init__(self, length, vocab_size):
        self._features = features(length, vocab_size)
        self._dtypes = {name: np.dtype(f.np_dtype) for name, f in self._features.items()}
        marks = {
            name: np.full(length, mark).astype(self._dtypes[name])
            for name, mark in (("tokens", 0xABAB), ("segments", 0xCDCD))
        }
        template = self.slow(marks)
        self._at = {name: template.index(mark.tobytes()) for name, mark in marks.items()}
        self._template = np.frombuffer(template, np.uint8)

    def slow(self, record):
        serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        example = serializer.get_tf_example(self._features.encode_example(record))
        return example.SerializeToString(
            deterministic=True
        )  # else in another order in every process

    def __call__(self, tokens, segments):
        rows = np.tile(self._template, (len(tokens), 1))
        for name, array in (("tokens", tokens), ("segments", segments)):
            raw = np.ascontiguousarray(array.astype(self._dtypes[name])).view(np.uint8)
            rows[:, self._at[name] : self._at[name] + raw.shape[1]] = raw
        return [row.tobytes() for row in rows]


def _finish(partial, out, card, encoder):
    """The shards under the names TFDS gives them, its metadata, the card; then the directory under its own name."""
    folder = partial / NAME / VERSION
    shutil.rmtree(partial / NAME, ignore_errors=True)
    folder.mkdir(parents=True)
    infos = []
    for split in SPLITS:
        lengths = card["splits"][split].pop("shards")
        used = [number for number, count in enumerate(lengths) if count]
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        for new, number in enumerate(used):
            os.link(
                partial / SHARDS / f"{split}-{number:05}",
                folder / f"{NAME}-{split}.array_record-{new:05}-of-{len(used):05}",
            )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[lengths[n] for n in used],
                num_bytes=0,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        split_infos=infos,
        check_data=False,
        features=features(card["sequence_length"] + 1, card["vocab_size"]),
    )
    (partial / "tokenizer.model").write_bytes(encoder.serialized())
    working = {SCANNED, SHARDS, PLAN}
    card["files"] = {
        name: fact
        for name, fact in integrity.manifest_entries(partial).items()
        if name.split("/")[0] not in working
    }
    card["fingerprint"] = fingerprint(card)
    integrity.write(partial / "card.json", json.dumps(card, indent=2) + "\n")
    (partial / PLAN).unlink()  # first: without it nothing below is taken up again
    for name in (SCANNED, SHARDS):
        shutil.rmtree(partial / name)
    with contextlib.suppress(FileNotFoundError):
        out.rmdir()
    partial.rename(out)


def fingerprint(card: dict) -> str:
    """A hash of everything else that the card says, the hash of every file included: what a checkpoint remembers of its
    data."""
    rest = {name: value for name, value in card.items() if name != "fingerprint"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


# ---- many processes --------------------------------------------------------------------------------------------------


def _over_parts(work, parts, workers, what, data, more=None):
    """work(number, part[, its item of more]) of every part, in order, in that many processes; a bar with documents/s,
    MB/s, time left."""
    unit = "rec" if data.source.startswith("tfds:") else "B"
    bar = tqdm.tqdm(
        total=sum(p.size for p in parts), unit=unit, unit_scale=True, desc=what, disable=None
    )
    results, documents, begin = [None] * len(parts), 0, time.monotonic()
    extra = [[item] for item in more] if more is not None else [[]] * len(parts)
    tasks = [(work, number, part, *extra[number]) for number, part in enumerate(parts)]
    with contextlib.ExitStack() as stack:
        stack.callback(bar.close)
        if min(workers, len(parts)) > 1:
            pool = futures.ProcessPoolExecutor(
                min(workers, len(parts)), multiprocessing.get_context("spawn"), _join
            )
            stack.callback(_end, pool)
            done = (
                f.result()
                for f in futures.as_completed([pool.submit(_call, task) for task in tasks])
            )
        else:
            done = map(_call, tasks)
        for number, result in done:
            results[number] = result
            documents += result.get("documents") or sum(
                result[s]["documents"] for s in SPLITS if s in result
            )
            bar.update(parts[number].size)
            bar.set_postfix_str(f"{documents / (time.monotonic() - begin):,.0f} documents/s")
    return results


def _end(pool):
    """Its processes too, should they still be at work: after an error, or a signal."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()


def _call(task):
    work, number, *arguments = task
    return number, work(number, *arguments)


def _join():
    """A worker's start. A scheduler signals a whole group: the parent decides. Where it dies, however it dies, its
    workers must not go on writing."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv=None):
    default, parser = (
        DataConfig(),
        OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter),
    )
    parser.add_argument("--source", required=True, help=sources.FORMS)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, sentencepiece:FILE, hf:FILE, or sentencepiece (train one)",
    )
    parser.add_argument("--out", required=True, help="a new directory")
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=default.sequence_length,
        help="predicted tokens per record",
    )
    parser.add_argument(
        "--validation_source",
        default="",
        help="held-out documents; then all of --source is for training",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=default.validation_fraction,
        help="share of documents held out, where there is no --validation_source",
    )
    parser.add_argument(
        "--field",
        default=default.field,
        help="jsonl field, parquet column, or tfds feature of the text",
    )
    parser.add_argument("--packing", choices=PACKINGS, default=default.packing)
    parser.add_argument(
        "--drop_duplicates", action="store_true", help="of exact copies, keep the first"
    )
    parser.add_argument(
        "--undecodable",
        choices=UNDECODABLE,
        default=default.undecodable,
        help="documents not in UTF-8",
    )
    parser.add_argument(
        "--vocab_size", type=int, default=4096, help="pieces, where a tokenizer is trained"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    a = parser.parse_args(argv)
    if a.sequence_length < 2 or not 0 < a.validation_fraction < 1 or a.workers < 1:
        parser.error(
            "--sequence_length must be >= 2, --validation_fraction between 0 and 1, --workers >= 1"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an end in order, workers and all
    try:
        data = DataConfig(**{k: getattr(a, k) for k in OPTIONS})
        card = prepare(data, a.out, a.vocab_size, a.workers)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from what is done\n")
    print(summary(card))


def summary(card: dict) -> str:
    """The card in a few lines."""
    lines = [
        f"source {card['source']}, tokenizer {card['tokenizer']} ({card['vocab_size']} ids), records of "
        f"{card['sequence_length']}, {card['packing']}; {card['empty_documents']} documents empty, "
        f"{card['undecodable_documents']} not UTF-8 ({card['undecodable']}), "
        f"{card['duplicate_documents']} repeated ({card['dropped_documents']} dropped)"
    ]
    for split, c in card["splits"].items():
        lines.append(
            f"{split}: {c['documents']:,} documents, {c['bytes']:,} bytes, {c['tokens']:,} tokens "
            f"({c['bytes'] / max(c['tokens'], 1):.2f} bytes each), {c['records']:,} records, "
            f"{c['padding']:,} padding"
        )
    lines.append(
        "wasted by packing: "
        + "; ".join(
            f"{kind} {w['padding']:.2%} padding, {w['cut']:.0%} of documents that fit a record cut"
            for kind, w in card["waste"].items()
        )
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
