"""The working directory of a preparation, from which a run that was killed resumes.

plan              fingerprint of the options and sources; another plan starts from scratch
scanned/N.hashes  hashes of the documents of part N, uint64
scanned/N.json    findings of the first pass in part N; its presence says that N is done
shards/SPLIT-N    records of part N
shards/N.json     counts of part N; its presence says that N is done
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

TEMPORARY_NAMES = {SCANNED, SHARDS, PLAN}  # not part of the finished directory


class WorkingDirectory:
    """Paths of the files in a working directory."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    @property
    def plan_path(self) -> pathlib.Path:
        """The fingerprint of the preparation."""
        return self.path / PLAN

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The serialized tokenizer."""
        return self.path / data_card.TOKENIZER_NAME

    def scan_path(self, part_number: int) -> pathlib.Path:
        """Findings of the first pass in a part."""
        return self.path / SCANNED / f"{part_number:05}.json"

    def hashes_path(self, part_number: int) -> pathlib.Path:
        """Hashes of the documents of a part."""
        return self.path / SCANNED / f"{part_number:05}.hashes"

    def counts_path(self, part_number: int) -> pathlib.Path:
        """Counts of the second pass over a part."""
        return self.path / SHARDS / f"{part_number:05}.json"

    def shard_path(self, split: str, part_number: int) -> pathlib.Path:
        """Records of a part that belong to a split."""
        return self.path / SHARDS / f"{split}-{part_number:05}"

    def resume_or_create(self, plan: str) -> None:
        """Leaves the directory as it is if it has the same plan, or else creates it anew."""
        if self.plan_path.exists() and self.plan_path.read_text() == plan:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in (SCANNED, SHARDS):
            (self.path / folder).mkdir(parents=True)
        files.write_atomically(self.plan_path, plan)

    def remove_temporary_files(self) -> None:
        """Removes the files that are not part of the finished directory.

        The plan goes first: without it, no later run resumes from the files that remain.
        """
        self.plan_path.unlink()
        for folder in (SCANNED, SHARDS):
            shutil.rmtree(self.path / folder)


def plan_fingerprint(
    data: DataConfig, vocab_size: int, parts: list[Part], encoder: tokenizers.Tokenizer | None
) -> str:
    """Returns a hash of all that decides the result: options, tokenizer, and files with times."""
    plan = {
        "format": data_card.FORMAT,
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
