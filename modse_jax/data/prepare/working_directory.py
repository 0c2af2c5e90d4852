"""The working directory of a preparation, from which a run that was killed resumes.

A part is a range of the source that one process reads. N is the number of a part.

plan              fingerprint of the options and sources; if it differs, all is done again
scanned/N.hashes  hashes of the documents of part N, uint64
scanned/N.json    findings of the first pass in part N; exists when the pass over N is complete
shards/SPLIT-N    records of part N that belong to a split
shards/N.json     counts of part N; exists when the second pass over N is complete
tokenizer.model   the tokenizer
"""

import hashlib
import json
import os
import pathlib
import shutil

from modse_jax.config.options import DataConfig
from modse_jax.data import data_card, tokenizers
from modse_jax.data.sources import Part
from modse_jax.runtime import files

SCANNED = "scanned"

SHARDS = "shards"

PLAN = "plan"

# Counts the changes of how sources are divided into parts and documents. What an older version has
# begun is not resumed, because the numbers of its parts and documents mean others.
DIVISION = 2

TEMPORARY_NAMES = {SCANNED, SHARDS, PLAN}  # not part of the finished directory


class WorkingDirectory:
    """Paths of the files in a working directory."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    @property
    def plan_path(self) -> pathlib.Path:
        """The file with the fingerprint of options and sources, to see if they have changed."""
        return self.path / PLAN

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The file with the serialized tokenizer."""
        return self.path / data_card.TOKENIZER_NAME

    def scan_path(self, part_number: int) -> pathlib.Path:
        """Returns the path of the findings of the first pass in a part."""
        return self.path / SCANNED / f"{part_number:05}.json"

    def hashes_path(self, part_number: int) -> pathlib.Path:
        """Returns the path of the hashes of the documents of a part."""
        return self.path / SCANNED / f"{part_number:05}.hashes"

    def counts_path(self, part_number: int) -> pathlib.Path:
        """Returns the path of the counts of the second pass over a part."""
        return self.path / SHARDS / f"{part_number:05}.json"

    def shard_path(self, split: str, part_number: int) -> pathlib.Path:
        """Returns the path of the records of a part that belong to a split."""
        return self.path / SHARDS / f"{split}-{part_number:05}"

    def resume_or_create(self, plan: str) -> None:
        """Keeps the files of an earlier run with the same plan; otherwise starts with none.

        Args:
            plan: the fingerprint from `plan_fingerprint`.
        """
        if self.plan_path.exists() and self.plan_path.read_text(encoding="utf-8") == plan:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in (SCANNED, SHARDS):
            (self.path / folder).mkdir(parents=True)
        files.write_atomically(self.plan_path, plan)

    def remove_temporary_files(self) -> None:
        """Removes the files that are not part of the finished directory.

        The plan is removed first. If this is interrupted, a later run does not resume from the
        incomplete rest, because it finds no plan.
        """
        self.plan_path.unlink()
        for folder in (SCANNED, SHARDS):
            shutil.rmtree(self.path / folder)


def plan_fingerprint(
    data: DataConfig, vocab_size: int, parts: list[Part], encoder: tokenizers.Tokenizer | None
) -> str:
    """Returns a hash of everything that determines the result of a preparation.

    This is the options, the tokenizer, and the names, sizes and modification times of the files. A
    run that was killed may be resumed only if the hash is the same.

    Args:
        data: the options of the preparation.
        vocab_size: size of a tokenizer that is trained on the source.
        parts: the parts of the source.
        encoder: the tokenizer; None if it is trained on the source.
    """
    plan = {
        "format": data_card.FORMAT,
        "division": DIVISION,
        "data": {name: getattr(data, name) for name in data_card.PREPARATION_OPTIONS},
        "vocab_size": vocab_size,
        "tokenizer": tokenizers.fingerprint(encoder) if encoder else "",
        "parts": [[*part, _modification_times(part)] for part in parts],
    }
    return hashlib.blake2b(json.dumps(plan).encode(), digest_size=16).hexdigest()


def _modification_times(part: Part) -> list[list]:
    if part.kind == "tfds":
        return []
    return [[path, os.stat(path).st_mtime_ns] for _, path in part.files]
