"""Train a tokenizer on a source, offline.

python -m modse_jax.data.train_tokenizer --source=text:PATH --kind=sentencepiece|hf --vocab_size=8192 --out=FILE
"""  # noqa: E501  (a command that is copied as one line)

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from modse_jax.data import sources, tokenizers
from modse_jax.data.sources.folder_files import describe_passed_over
from modse_jax.data.sources.source_files import SOURCE_FORMS
from modse_jax.errors import UserError
from modse_jax.runtime import console_encoding
from modse_jax.runtime.one_line_parser import EXIT_BAD_INPUT, OneLineParser

TRAINERS: dict[str, Callable[[Iterable[bytes], int], tokenizers.Tokenizer]] = {
    "sentencepiece": tokenizers.train_sentencepiece,
    "hf": tokenizers.train_hf,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; for bad input, prints one line and exits with code 2."""
    console_encoding.escape_unprintable()
    parser = _build_parser()
    options = parser.parse_args(argv)
    out = pathlib.Path(options.out).expanduser()
    try:
        _check_output(out)
        documents = _read_decodable(options.source, options.field)
        tokenizer = TRAINERS[options.kind](documents, options.vocab_size)
    except UserError as error:
        parser.exit(EXIT_BAD_INPUT, f"error: {error}\n")
    temporary = out.with_name(out.name + ".tmp")  # the rename makes the file appear complete
    temporary.write_bytes(tokenizer.serialize())
    temporary.replace(out)
    print(f"{out}: {tokenizer.vocab_size} pieces, {tokenizers.fingerprint(tokenizer)}")


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help=SOURCE_FORMS)
    parser.add_argument("--kind", required=True, choices=TRAINERS, help="the library to train with")
    parser.add_argument(
        "--field",
        default="text",
        help="jsonl field, parquet column, or tfds feature that holds the text",
    )
    parser.add_argument("--vocab_size", type=int, required=True, help="number of pieces")
    parser.add_argument("--out", required=True, help="a new file")
    return parser


def _check_output(out: pathlib.Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists; name a new file")
    parent = out.absolute().parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"directory {parent} does not exist or is not writable")


def _read_decodable(source: str, field: str) -> Iterator[bytes]:
    """Yields the documents of a source that are UTF-8; prints at the end how many are not."""
    num_skipped = 0
    for document in sources.read_documents(source, field):
        try:
            document.text.decode("utf-8")
        except UnicodeDecodeError:
            num_skipped += 1
            continue
        yield document.text
    print(f"skipped {num_skipped} documents that are not UTF-8", file=sys.stderr)
    passed_over = describe_passed_over(sources.count_passed_over([source]))
    if passed_over:
        print(passed_over, file=sys.stderr)


if __name__ == "__main__":
    main()
