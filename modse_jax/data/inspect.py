"""Look at prepared data: its card, decoded records with the borders of documents, histograms.

python -m modse_jax.data.inspect --data=DIR [--record=N] [--split=train] [--out=DIR]
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from modse_jax.data import data_card, prepared_data
from modse_jax.data.prepared_data import Dataset
from modse_jax.errors import UserError
from modse_jax.runtime import console_encoding
from modse_jax.runtime.one_line_parser import EXIT_BAD_INPUT, OneLineParser

matplotlib.use("Agg")

HISTOGRAM_RECORDS = 20_000  # most records that are read for the histograms

LENGTH_BINS = 40

COLOR_LENGTHS = "#0072B2"

COLOR_DOCUMENTS = "#D55E00"

PICTURE_NAME = "lengths.png"


def format_record(dataset: Dataset, split: str, number: int) -> str:
    """Returns the decoded text of record `number`, with a header line before each document."""
    vocab_size = dataset.card["vocab_size"]
    record = prepared_data.read_records(dataset, split, [number], vocab_size)
    tokens = record["tokens"][0]
    segments = record["segments"][0]
    num_segments = int(segments.max())
    num_padding = int((segments == 0).sum())
    lines = [
        f"---- record {number} of {split}: {len(tokens)} tokens, {num_segments} documents or parts "
        f"of documents, {num_padding} padding tokens"
    ]
    for segment in range(1, num_segments + 1):
        ids = tokens[segments == segment].tolist()
        begins_here = ids[0] == dataset.tokenizer.bos_id
        ends_here = ids[-1] == dataset.tokenizer.eos_id
        begin = "begins here" if begins_here else "began in an earlier record"
        end = "ends here" if ends_here else "continues in a later record"
        lines.append(f"==== segment {segment}, {len(ids)} tokens, {begin}, {end}")
        lines.append(dataset.tokenizer.decode(ids).decode("utf-8", "replace"))
    return "\n".join(lines)


def plot_lengths(dataset: Dataset, split: str, path: pathlib.Path) -> None:
    """Plots the lengths of documents within records, and the number of documents per record."""
    records = dataset.splits[split]
    num_records = min(len(records), HISTOGRAM_RECORDS)
    segments = np.stack([records[i]["segments"] for i in range(num_records)]).astype(np.int64)
    max_segment = int(segments.max())
    # Element [r, s - 1] is the number of tokens of segment s in record r.
    lengths = np.stack([np.bincount(row, minlength=max_segment + 1)[1:] for row in segments])
    figure, (length_axes, count_axes) = plt.subplots(1, 2, figsize=(10, 3.8))
    length_axes.hist(lengths[lengths > 0], bins=LENGTH_BINS, color=COLOR_LENGTHS)
    length_axes.set(
        xlabel="tokens of a document in one record",
        ylabel="documents or parts of documents",
        title=f"{split}: lengths",
    )
    bins = np.arange(0.5, max_segment + 1.5)
    count_axes.hist(segments.max(axis=1), bins=bins, color=COLOR_DOCUMENTS)
    count_axes.set(
        xlabel="documents in a record",
        ylabel="records",
        title=f"{split}: first {num_records:,} records",
    )
    for axes in (length_axes, count_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; for bad input, prints one line and exits with code 2."""
    console_encoding.escape_unprintable()
    parser = _build_parser()
    options = parser.parse_args(argv)
    try:
        path = _inspect(options)
    except UserError as error:
        parser.exit(EXIT_BAD_INPUT, f"error: {error}\n")
    print(f"wrote {path}")


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a prepared directory, or data/ of a run")
    parser.add_argument("--record", type=int, default=0, help="number of the record to decode")
    parser.add_argument(
        "--split", choices=data_card.SPLITS, default="train", help="split of the record"
    )
    parser.add_argument("--out", default=".", help=f"directory of {PICTURE_NAME}")
    return parser


def _inspect(options: argparse.Namespace) -> pathlib.Path:
    """Prints the card (description) of the data and one record, and draws the histograms.

    Returns the path of the picture with the histograms.
    """
    out = pathlib.Path(options.out)
    if not out.is_dir():
        raise UserError(f"--out={options.out} is not a directory")
    dataset = prepared_data.open_prepared(pathlib.Path(options.data).expanduser().absolute())
    num_records = len(dataset.splits[options.split])
    if not num_records:
        raise UserError(f"--split={options.split}: {dataset.directory} has no such records")
    if not 0 <= options.record < num_records:
        raise UserError(
            f"--record={options.record}: {options.split} has records 0 to {num_records - 1}"
        )
    entries = {
        name: value
        for name, value in dataset.card.items()
        if name not in ("files", "splits", "waste")
    }
    print(json.dumps(entries, indent=1))
    print(data_card.summarize_card(dataset.card))
    print(format_record(dataset, options.split, options.record))
    plot_lengths(dataset, options.split, out / PICTURE_NAME)
    return out / PICTURE_NAME


if __name__ == "__main__":
    main()
