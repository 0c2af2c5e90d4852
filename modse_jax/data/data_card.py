"""The card of a prepared directory: `card.json`, which says what the data is and how it was made.

The card holds the options of the preparation, the tokenizer's fingerprint, the counts of each
split, and the size and hash of every other file. Its own fingerprint is stored in checkpoints, so
that a run does not resume with other data.
"""

import hashlib
import json
import pathlib
from typing import Any

from modse_jax.config.options import DataConfig
from modse_jax.data.sources.folder_files import describe_passed_over
from modse_jax.errors import UserError
from modse_jax.runtime import files

FORMAT = 3

CARD_NAME = "card.json"

TOKENIZER_NAME = "tokenizer.model"

SPLITS = ("train", "validation")

# Validation may have this many times the requested share of the bytes without a warning.
MAX_VALIDATION_EXCESS = 3

# The options of `DataConfig` that decide what a preparation writes.
PREPARATION_OPTIONS = (
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


def has_only_validation(data: DataConfig) -> bool:
    """Returns whether the options make all documents of the source validation documents."""
    return data.validation_fraction == 1 and not data.validation_source


def read_card(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the card of a prepared directory.

    Raises:
        UserError: the directory is not prepared data, its format is another one, or the card is
            damaged.
    """
    path = directory.expanduser() / CARD_NAME
    try:
        card = files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not prepared data (no {CARD_NAME}); make it with "
            f"python -m modse_jax.data.prepare --source=... --tokenizer=... --out={directory}"
        ) from None
    except ValueError as error:
        raise UserError(f"{directory}: {error}; prepare the data again") from None
    found_format = card.get("format") if isinstance(card, dict) else None
    if found_format != FORMAT:
        raise UserError(
            f"{directory} has data format {found_format}, expected {FORMAT}; prepare the data again"
        )
    if card.get("fingerprint") != card_fingerprint(card):
        raise UserError(
            f"{path} is damaged: its content does not match its fingerprint; prepare the data "
            "again, or restore it from a copy"
        )
    return card


def card_fingerprint(card: dict[str, Any]) -> str:
    """Returns a hash of all other entries of a card, which include the hash of every file."""
    entries = {name: value for name, value in card.items() if name != "fingerprint"}
    text = json.dumps(entries, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def summarize_card(card: dict[str, Any]) -> str:
    """Returns the main numbers of a data card as text: documents, tokens, records and padding."""
    lines = [
        f"source {card['source']}, tokenizer {card['tokenizer']} ({card['vocab_size']} ids), "
        f"records of {card['sequence_length']} tokens, {card['packing']}; "
        f"{card['empty_documents']} empty documents, "
        f"{card['undecodable_documents']} not UTF-8 ({card['undecodable']}), "
        f"{card['duplicate_documents']} duplicates ({card['dropped_documents']} dropped)"
    ]
    passed_over = describe_passed_over(card.get("passed_over", {}))
    if passed_over:
        lines.append(passed_over)
    for split, counts in card["splits"].items():
        lines.append(summarize_split(split, counts))
    for kind, waste in card["waste"].items():
        if kind == card["packing"]:
            padding = f"{_padding_share(card):.2%} padding"
        else:
            padding = f"about {waste['padding']:.2%} padding instead"
        lines.append(
            f"packing {kind}: {padding}, {waste['cut']:.0%} of the documents that fit into a "
            "record are cut"
        )
    warning = _warn_of_large_validation(card)
    return "\n".join([*lines, warning] if warning else lines)


def _padding_share(card: dict[str, Any]) -> float:
    """Returns the share of the tokens in all records that are padding."""
    splits = card["splits"].values()
    num_tokens = sum(split["records"] for split in splits) * (card["sequence_length"] + 1)
    return sum(split["padding"] for split in splits) / num_tokens


def _warn_of_large_validation(card: dict[str, Any]) -> str:
    """Returns a warning if validation has far more of the bytes than was requested; else ""."""
    fraction = card["validation_fraction"]
    if card["validation_source"] or fraction == 1:
        return ""
    num_bytes = {split: card["splits"][split]["bytes"] for split in SPLITS}
    share = num_bytes["validation"] / sum(num_bytes.values())
    if share <= MAX_VALIDATION_EXCESS * fraction:
        return ""
    return (
        f"warning: the validation split has {share:.0%} of the bytes, though validation_fraction="
        f"{fraction:g}, because the source has few documents, or some that are much longer than "
        "others; a validation_source, or another division of the text into files, avoids that"
    )


def summarize_validation_set(name: str, card: dict[str, Any]) -> str:
    """Returns the counts of a validation set of a run as text."""
    line = summarize_split(f"validation set {name}", card["splits"]["validation"])
    passed_over = describe_passed_over(card.get("passed_over", {}))
    return f"{line}; {passed_over}" if passed_over else line


def summarize_split(label: str, counts: dict[str, Any]) -> str:
    """Returns the counts of a split as a line of text that begins with a label."""
    bytes_per_token = counts["bytes"] / max(counts["tokens"], 1)
    return (
        f"{label}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
        f"{counts['tokens']:,} tokens ({bytes_per_token:.2f} bytes per token), "
        f"{counts['records']:,} records, {counts['padding']:,} padding tokens"
    )
