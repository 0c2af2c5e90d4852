"""Prints the last line of `make demo`: the result of the run beside that of gzip, as JSON."""

import argparse
import gzip
import json
import pathlib
import time
from collections.abc import Sequence

from modse_jax.data import decoding, training_data
from modse_jax.errors import UserError
from modse_jax.evaluation import model_loading, result_files
from modse_jax.runtime import console_encoding, files
from modse_jax.runtime.one_line_parser import OneLineParser
from modse_jax.training import run_logs


def summarize_run(workdir: pathlib.Path, since: float) -> dict:
    """Compares the newest evaluation of a run with gzip -9 on the same validation text.

    Args:
        workdir: The directory of the run.
        since: The time at which the demo began, in seconds since 1970.

    Returns:
        Bits per byte of the model and of gzip, median training speed, and minutes since the start.

    Raises:
        UserError: The loss of the run has not been evaluated.
    """
    paths = result_files.find_full_results(workdir)
    results = json.loads(paths[-1].read_text(encoding="utf-8")) if paths else {}
    if "loss" not in results:
        raise UserError(
            f"{workdir} holds no evaluation of the loss; run eval.py --workdir={workdir} first"
        )
    text = _read_validation_text(workdir)
    speeds = sorted(
        row["tokens_per_second"]
        for row in run_logs.read_log(workdir / "metrics.jsonl")
        if row["split"] == "train"
    )
    return {
        "validation_bits_per_byte": results["loss"]["bits_per_byte"],
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "tokens_per_second": speeds[len(speeds) // 2],
        "minutes": round((time.time() - since) / 60, 2),
    }


def _read_validation_text(workdir: pathlib.Path) -> bytes:
    """Returns the validation text of a run with a single dataset, decoded from its records."""
    (dataset,) = training_data.load(model_loading.read_config(workdir), workdir).datasets
    text = b"".join(decoding.decode_documents(dataset, "validation"))
    if len(text) != dataset.card["splits"]["validation"]["bytes"]:
        raise RuntimeError(
            "the decoded validation records do not have as many bytes as the prepared text"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the summary of the run in --workdir."""
    console_encoding.escape_unprintable()
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--since", type=float, required=True, help="start of the demo in seconds since 1970"
    )
    options = parser.parse_args(arguments)
    try:
        summary = summarize_run(pathlib.Path(options.workdir).absolute(), options.since)
        print(files.format_json(summary))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
