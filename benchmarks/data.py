"""Measure the speed of preparing and loading data, with one process and with two.

    python -m benchmarks.data [--json=FILE] [--megabytes=64] [--length=2048] [--large=1000]

The text is random words. With --large, a file of that many MB is prepared as well, and the peak
memory of its processes is reported.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from modse_jax.config.options import Config, DataConfig, ModelConfig, TrainingConfig
from modse_jax.data import batching, prepared_data
from modse_jax.data.training_data import TrainingData

VOCABULARY_WORDS = 20_000

LETTERS = "etaoinshrdlucmfw"

WORDS_PER_MEGABYTE = 210_000

PARAGRAPH_BYTES = 2000

Results = dict[str, float]


def write_text(path: pathlib.Path, megabytes: int) -> None:
    """Writes paragraphs of random words, in which some words are more frequent than others."""
    rng = random.Random(0)
    words = []
    for _ in range(VOCABULARY_WORDS):
        length = rng.randrange(2, 9)
        words.append("".join(rng.choice(LETTERS) for _ in range(length)))
    with open(path, "w") as file:
        for _ in range(megabytes):
            # The third power makes the first words of the list the most frequent.
            chosen = [
                words[int(VOCABULARY_WORDS * rng.random() ** 3)] for _ in range(WORDS_PER_MEGABYTE)
            ]
            text = " ".join(chosen)
            starts = range(0, 1_000_000, PARAGRAPH_BYTES)
            paragraphs = [text[start : start + PARAGRAPH_BYTES] for start in starts]
            file.write("\n\n".join(paragraphs) + "\n\n")


def measure_preparing(
    source: pathlib.Path, tokenizer: str, length: int, workers: int, out: pathlib.Path
) -> float:
    """Returns MB/s of the prepare command, with the start of its processes."""
    size = source.stat().st_size
    start = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "modse_jax.data.prepare",
            f"--source=text:{source}",
            f"--out={out}",
            f"--tokenizer={tokenizer}",
            f"--sequence_length={length}",
            f"--workers={workers}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return size / 1e6 / (time.perf_counter() - start)


def measure_loading(
    directory: pathlib.Path, length: int, batch_size: int = 32, seconds: float = 5
) -> float:
    """Returns tokens/s of the training batches in one process."""
    dataset = prepared_data.open_prepared(directory)
    config = Config(
        model=ModelConfig(context_length=length),
        training=TrainingConfig(batch_size=batch_size),
        data=DataConfig(sequence_length=length),
    )
    batches = batching.train_batches(TrainingData((dataset,), (1.0,)), config, 0)
    next(batches)  # starts the reader threads
    num_batches = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        num_batches += 1
    return num_batches * batch_size * length / (time.perf_counter() - start)


def measure_loading_in_two_processes(directory: pathlib.Path, length: int) -> float:
    """Returns the sum of the tokens/s of two processes that read at the same time."""
    code = (
        "import pathlib; from benchmarks import data; "
        f"print(data.measure_loading(pathlib.Path({str(directory)!r}), {length}))"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    return sum(float(output) for output in outputs)


def train_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Trains a sentencepiece model with 4096 pieces."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "modse_jax.data.train_tokenizer",
            f"--source=text:{source}",
            "--kind=sentencepiece",
            "--vocab_size=4096",
            f"--out={out}",
        ],
        check=True,
    )


def measure_large_file(root: pathlib.Path, megabytes: int, length: int) -> Results:
    """Returns the speed and the peak memory of preparing a large file with two processes."""
    source = root / "large.txt"
    write_text(source, megabytes)
    memory_before = _peak_child_megabytes()
    speed = measure_preparing(source, "bytes", length, 2, root / "large")
    return {
        "large_megabytes": megabytes,
        "large_megabytes_per_second": speed,
        "large_peak_megabytes_of_a_process": _peak_child_megabytes(),
        "peak_before_megabytes": memory_before,
    }


def _peak_child_megabytes() -> float:
    """Returns the peak memory of the largest child process so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def run(root: pathlib.Path, megabytes: int, length: int) -> Results:
    """Returns the speeds of preparing and loading text, with one process and with two."""
    results: Results = {}
    source = root / "text.txt"
    write_text(source, megabytes)
    model = root / "sp.model"
    train_tokenizer(source, model)
    for tokenizer in ("bytes", f"sentencepiece:{model}"):
        kind = tokenizer.partition(":")[0]
        for workers in (1, 2):
            out = root / f"{kind}{workers}"
            speed = measure_preparing(source, tokenizer, length, workers, out)
            results[f"prepare_{kind}_{workers}_megabytes_per_second"] = speed
    prepared = root / "bytes1"
    results["load_1_tokens_per_second"] = measure_loading(prepared, length)
    results["load_2_tokens_per_second"] = measure_loading_in_two_processes(prepared, length)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the text in MB")
    parser.add_argument("--length", type=int, default=2048, help="predicted tokens per record")
    parser.add_argument(
        "--large", type=int, default=0, help="size in MB of the file whose peak memory is measured"
    )
    options = parser.parse_args(argv)
    results: Results = {
        "cores": os.cpu_count() or 1,
        "sequence_length": options.length,
        "megabytes": options.megabytes,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        results |= run(root, options.megabytes, options.length)
        if options.large:
            results |= measure_large_file(root, options.large, options.length)
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        pathlib.Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
