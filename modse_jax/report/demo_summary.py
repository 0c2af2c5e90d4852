"""The last line of `make demo`: what the run reached against gzip on the same held-out bytes, as JSON."""

import argparse
import gzip
import json
import pathlib
import sys
import time

from modse_jax.data import decoding, training_data
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading
from modse_jax.runtime.one_line_parser import OneLineParser
from modse_jax.training import run_logs


def summary(workdir: pathlib.Path, since: float) -> dict:
    """Bits per byte of the newest evaluation and of gzip -9, median tokens/s of training, minutes since a time."""
    whole = [file for file in (workdir / "eval").glob("*.json") if file.stem.isdigit()]
    result = json.loads(max(whole, key=lambda file: int(file.stem)).read_text()) if whole else {}
    if "loss" not in result:
        raise UserError(
            f"{workdir} holds no evaluation of the loss; run eval.py --workdir={workdir} first"
        )
    (data,) = training_data.load(model_loading.read_config(workdir), workdir).datasets
    text = b"".join(decoding.decode_documents(data, "validation"))
    if len(text) != data.card["splits"]["validation"]["bytes"]:
        raise RuntimeError(
            "decoding the held-out records did not give back the bytes that were prepared"
        )
    speeds = sorted(
        row["tokens_per_second"]
        for row in run_logs.read_log(workdir / "metrics.jsonl")
        if row["split"] == "train"
    )
    return {
        "validation_bits_per_byte": result["loss"]["bits_per_byte"],
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "tokens_per_second": speeds[len(speeds) // 2],
        "minutes": round((time.time() - since) / 60, 2),
    }


def main(argv=None):
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--since", type=float, required=True, help="when the job began, seconds since 1970"
    )
    a = parser.parse_args(argv)
    try:
        print(json.dumps(summary(pathlib.Path(a.workdir).absolute(), a.since)))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
