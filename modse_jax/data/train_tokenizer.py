"""Train a tokenizer on a source, offline.

python -m modse_jax.data.train_tokenizer --source=text:PATH --kind=sentencepiece|hf --vocab_size=8192 --out=FILE
"""

import argparse
import os
import pathlib
import sys

from modse_jax.data import sources, tokenizers
from modse_jax.data.prepare import OneLineParser
from modse_jax.errors import UserError

TRAINERS = {"sentencepiece": tokenizers.train_sentencepiece, "hf": tokenizers.train_hf}


def main(argv=None):
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help=sources.FORMS)
    parser.add_argument("--kind", required=True, choices=TRAINERS)
    parser.add_argument(
        "--field", default="text", help="jsonl field, parquet column, or tfds feature of the text"
    )
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--out", required=True, help="a new file")
    a = parser.parse_args(argv)
    out = pathlib.Path(a.out).expanduser()
    try:
        if out.exists():
            raise UserError(f"{out} exists; name a new file")
        if not os.access(out.absolute().parent, os.W_OK):
            raise UserError(
                f"directory {out.absolute().parent} does not exist or may not be written"
            )
        tokenizer = TRAINERS[a.kind](_decodable(a.source, a.field), a.vocab_size)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    temporary = out.with_name(out.name + ".tmp")  # it appears whole or not at all
    temporary.write_bytes(tokenizer.serialized())
    temporary.replace(out)
    print(f"{out}: {tokenizer.vocab_size} pieces, {tokenizers.fingerprint(tokenizer)}")


def _decodable(source, field):
    skipped = 0
    for document in sources.documents(source, field):
        try:
            document.text.decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        yield document.text
    print(f"skipped {skipped} documents that are not UTF-8", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
