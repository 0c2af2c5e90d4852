"""Prepares a source: scan, train a tokenizer if requested, encode, publish.

A source is divided into parts (ranges that processes read independently), and the records of each
part are written to files of their own. So the result does not depend on the number of processes,
and a run that was killed resumes with the missing parts.

1. `scanning` reads all documents: it counts the empty, undecodable and duplicate ones, and chooses
   the validation split.
2. `encoding` reads them again, tokenizes them, and packs them into records.
3. `publishing` writes the metadata and the card, and renames the working directory.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from modse_jax.config.options import DataConfig
from modse_jax.data import data_card, sources, tokenizers
from modse_jax.data.prepare import encoding, publishing, scanning
from modse_jax.data.prepare.working_directory import WorkingDirectory, plan_fingerprint
from modse_jax.data.sources import Part
from modse_jax.errors import UserError
from modse_jax.runtime import files
from modse_jax.runtime.lock import Lock

# A larger source must be prepared with its own command, before the run.
MAX_ON_THE_FLY_BYTES = 256 * 2**20


def prepare_data(
    data: DataConfig,
    out: str | pathlib.Path,
    vocab_size: int,
    workers: int = 1,
    encoder: tokenizers.Tokenizer | None = None,
    excluded: Sequence[pathlib.Path] = (),
) -> dict[str, Any]:
    """Prepares the source of a config: tokenizes its documents into records of equal length.

    The files are written in `OUT.partial`. If the process is killed, the next call with the same
    options resumes from there.

    Args:
        data: the data section of a config. With `validation_fraction=1` and no validation source,
            all documents are validation documents.
        out: the directory to make.
        vocab_size: number of pieces of a tokenizer that is trained on the source.
        workers: number of processes.
        encoder: the tokenizer; None takes the one that `data.tokenizer` names.
        excluded: files and folders, such as the workdir of a run, that are no part of the source
            even if it is a folder around them. What this function writes is excluded anyway.

    Returns:
        The card: a description of the data, which is also written to card.json.

    Raises:
        UserError: the source is invalid or has too few documents or tokens, or the directory exists
            and is not empty. No files are left behind.
    """
    out = pathlib.Path(out).expanduser().absolute()
    _check_output(out)
    partial = out.with_name(out.name + ".partial")
    lock_path = out.with_name(out.name + ".preparing")
    excluded = (*excluded, out, partial, lock_path)
    parts = _find_parts(data, excluded)
    passed_over = sources.count_passed_over([data.source, data.validation_source], excluded)
    if encoder is None:
        encoder = _load_tokenizer(data)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = WorkingDirectory(partial)
    lock = Lock(lock_path, f"{out} is being prepared")
    try:
        directory.resume_or_create(plan_fingerprint(data, vocab_size, parts, encoder))
        scan = scanning.scan_documents(data, parts, directory, workers)
        if encoder is None:
            encoder = scanning.train_tokenizer(data, parts, scan, directory, vocab_size)
        encoded = encoding.encode_documents(data, parts, scan, encoder, directory, workers)
        if passed_over:
            encoded.card["passed_over"] = passed_over
        return publishing.publish(directory, out, encoded, encoder)
    except UserError:
        shutil.rmtree(directory.path, ignore_errors=True)
        lock.release(leave_no_trace=True)
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        lock.release(leave_no_trace=True)


def _check_output(out: pathlib.Path) -> None:
    """Raises UserError if the directory cannot be made or is not empty."""
    files.check_is_text(out, "--out")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{out} cannot be made: {existing} is not a writable directory")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new directory or remove it")


def _load_tokenizer(data: DataConfig) -> tokenizers.Tokenizer | None:
    """Returns the tokenizer that the options name; None if it is to be trained on the source.

    Raises:
        UserError: the tokenizer is invalid, or is to be trained without training documents.
    """
    if data.tokenizer != tokenizers.TRAINED_ON_SOURCE:
        return tokenizers.load(data.tokenizer)
    if data_card.has_only_validation(data):
        raise UserError(
            f"tokenizer={data.tokenizer} is trained on training documents, and with "
            "validation_fraction=1 there are none; name a tokenizer, such as sentencepiece:FILE"
        )
    return None


def _find_parts(data: DataConfig, excluded: Sequence[pathlib.Path]) -> list[Part]:
    """Returns the parts of the source, and then those of the validation source if there is one."""
    if not data.validation_source:
        is_validation = True if data_card.has_only_validation(data) else None
        return sources.find_parts(data.source, data.field, is_validation, excluded)
    training_parts = sources.find_parts(data.source, data.field, False, excluded)
    validation_parts = sources.find_parts(data.validation_source, data.field, True, excluded)
    return [*training_parts, *validation_parts]
