"""TFDS datasets in the array_record format: each record is a document, one feature is its text.

TFDS reads array_record files without TensorFlow. Building such a dataset takes TensorFlow, which
this package does not install.
"""

import re
from collections.abc import Iterator
from typing import Any

from modse_jax.data.sources.documents_and_parts import (
    Document,
    Part,
    SourceOptions,
    named_by_content,
)
from modse_jax.errors import UserError, describe_exception

RECORDS_PER_PART = 50_000

RECORDS_PER_READ = 64

DEFAULT_SPLIT = "train"

VERSION = re.compile(r"[0-9]+\.([0-9]+|\*)\.([0-9]+|\*)")  # as TFDS writes it: 1.0.0 or 1.*.*


def tfds_parts(options: SourceOptions, location: str) -> list[Part]:
    """Divides a TFDS source into parts of RECORDS_PER_PART, which processes read independently.

    Args:
        options: kind, field and split of all parts.
        location: the name of the source after "tfds:", NAME[/CONFIG][:VERSION][:SPLIT].

    Raises:
        UserError: the dataset cannot be opened, is empty, or lacks the feature.
    """
    name, split = _name_and_split(location)
    records = _open_split(name, split)
    if not len(records):
        raise UserError(f"tfds:{location} has no records")
    features = records[0]
    if options.field not in features:
        raise UserError(
            f"tfds:{location} has no field {options.field!r}; fields: {', '.join(features)}; name "
            "the field of the text with --field, or data.field"
        )
    parts = []
    for start in range(0, len(records), RECORDS_PER_PART):
        end = min(start + RECORDS_PER_PART, len(records))
        parts.append(options.make_part(((name, split),), start, end, True, end - start))
    return parts


def read_tfds(part: Part) -> Iterator[Document]:
    """Yields a document for each record of a part (a range of records).

    Raises:
        UserError: the dataset cannot be opened, or the feature is not text.
    """
    name, split = part.single_file
    records = _open_split(name, split)
    for start in range(part.start, part.end, RECORDS_PER_READ):
        ids = range(start, min(start + RECORDS_PER_READ, part.end))
        for record in records.__getitems__(list(ids)):
            text = record[part.field]
            if not isinstance(text, str | bytes):
                raise UserError(
                    f"tfds:{name}: feature {part.field!r} is not text; name the feature of the "
                    "text with --field, or data.field"
                )
            yield named_by_content(text.encode() if isinstance(text, str) else text)


def _name_and_split(location: str) -> tuple[str, str]:
    """Returns the name of a dataset, with its version if that is given, and the split."""
    name, _, rest = location.partition(":")
    version, _, after_version = rest.partition(":")
    if VERSION.fullmatch(version):
        return f"{name}:{version}", after_version or DEFAULT_SPLIT
    return name, rest or DEFAULT_SPLIT


def _open_split(name: str, split: str) -> Any:
    """Opens a split of a TFDS dataset, for random access to its records.

    The result has `len`, `[index]` and `__getitems__(list of indices)`.
    """
    import tensorflow_datasets as tfds  # imported here because the import is slow

    try:
        return tfds.data_source(name, split=split)
    except ModuleNotFoundError:
        raise UserError(_build_instructions(name)) from None
    except Exception as error:
        text = str(error).lower()
        if "tensorflow" in text and "pip install" in text:
            raise UserError(_build_instructions(name)) from None
        message = " ".join(describe_exception(error).split())
        raise UserError(
            f"tfds:{name}, split {split!r}, cannot be opened: {message[:300]}; if the dataset "
            f"has not been built yet: {_build_instructions(name)}"
        ) from None


def _build_instructions(name: str) -> str:
    return (
        f"building {name} requires TensorFlow, in any environment: "
        "pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record; then run this command again"
    )
