"""Prepare text as a TFDS dataset of fixed-length token records, without TensorFlow.

    python -m modse_jax.data.prepare --source=text:PATH --tokenizer=bytes --out=DIR

The text is read twice: the first pass finds empty, undecodable and duplicate documents and chooses
the validation split; the second pass tokenizes. The result does not depend on the number of
processes, and a run that was killed resumes when the same command is given again. DIR holds the
dataset, the tokenizer and card.json, and appears only when it is complete.
"""

import argparse
import os
import signal
from collections.abc import Sequence

from modse_jax.config.options import PACKINGS, UNDECODABLE, DataConfig
from modse_jax.data import data_card
from modse_jax.data.prepare import pipeline
from modse_jax.data.sources.source_files import SOURCE_FORMS
from modse_jax.errors import UserError
from modse_jax.runtime import console_encoding
from modse_jax.runtime.one_line_parser import EXIT_BAD_INPUT, OneLineParser

EXIT_INTERRUPTED = 130

DEFAULT_VOCAB_SIZE = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; prints a summary, or one line and a nonzero exit code."""
    console_encoding.escape_unprintable()
    parser = _build_parser()
    options = parser.parse_args(argv)
    is_fraction = 0 < options.validation_fraction <= 1
    if options.sequence_length < 2 or not is_fraction or options.workers < 1:
        parser.error(
            "--sequence_length must be >= 2, --validation_fraction above 0 and at most 1, "
            "--workers >= 1"
        )
    # SIGTERM raises KeyboardInterrupt too, so that the worker processes are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        data = DataConfig(
            **{name: getattr(options, name) for name in data_card.PREPARATION_OPTIONS}
        )
        card = pipeline.prepare_data(data, options.out, options.vocab_size, options.workers)
    except UserError as error:
        parser.exit(EXIT_BAD_INPUT, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(EXIT_INTERRUPTED, "stopped; run the same command again to resume\n")
    print(data_card.summarize_card(card))


def _build_parser() -> OneLineParser:
    default = DataConfig()
    parser = OneLineParser(
        prog="python -m modse_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, help=SOURCE_FORMS)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, sentencepiece:FILE, hf:FILE, or sentencepiece (trained on the source)",
    )
    parser.add_argument("--out", required=True, help="a new directory")
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=default.sequence_length,
        help="predicted tokens per record",
    )
    _add_document_options(parser, default)
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=default.packing,
        help="concat cuts documents, best_fit pads records",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=DEFAULT_VOCAB_SIZE,
        help="number of pieces of a tokenizer that is trained on the source",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of worker processes"
    )
    return parser


def _add_document_options(parser: argparse.ArgumentParser, default: DataConfig) -> None:
    """Adds the options that decide which documents are used, and in which split."""
    parser.add_argument(
        "--validation_source",
        default="",
        help="source of the validation documents; --source is then used for training only",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=default.validation_fraction,
        help="share of validation documents if there is no --validation_source; 1 prepares a "
        "validation set, without training documents",
    )
    parser.add_argument(
        "--field",
        default=default.field,
        help="jsonl field, parquet column, or tfds feature that holds the text",
    )
    parser.add_argument(
        "--drop_duplicates",
        action="store_true",
        help="use only the first of several identical documents",
    )
    parser.add_argument(
        "--undecodable",
        choices=UNDECODABLE,
        default=default.undecodable,
        help="documents that are not UTF-8: skip them, replace the invalid bytes, or fail",
    )
