"""Preparing and loading data: MB of text and tokens a second, on one process and on two.

    python -m benchmarks.data [--json=FILE] [--megabytes=64] [--length=2048] [--large=1000]

The text is random words. --large also prepares so many MB in one file with a process whose memory is watched.
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

from modse_jax.config.options import Config, DataConfig, ModelConfig, TrainingConfig
from modse_jax.data import loader

WORDS = 20_000


def write_text(path: pathlib.Path, megabytes: int) -> None:
    rng = random.Random(0)
    words = [
        "".join(rng.choice("etaoinshrdlucmfw") for _ in range(rng.randrange(2, 9)))
        for _ in range(WORDS)
    ]
    with open(path, "w") as file:
        for _ in range(megabytes):
            text = " ".join(words[int(WORDS * rng.random() ** 3)] for _ in range(210_000))
            file.write("\n\n".join(text[i : i + 2000] for i in range(0, 1_000_000, 2000)) + "\n\n")


def preparing(
    source: pathlib.Path, tokenizer: str, length: int, workers: int, out: pathlib.Path
) -> float:
    """MB/s of the command, end to end: processes started, both passes, hashes."""
    size, begin = source.stat().st_size, time.perf_counter()
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
    return size / 1e6 / (time.perf_counter() - begin)


def loading(directory: pathlib.Path, length: int, batch: int = 32, seconds: float = 5) -> float:
    """Tokens/s of the training batches of one process."""
    dataset = loader.open_prepared(directory)
    config = Config(
        model=ModelConfig(context_length=length),
        training=TrainingConfig(batch_size=batch),
        data=DataConfig(sequence_length=length),
    )
    batches = loader.train_batches(loader.TrainingData((dataset,), (1.0,)), config, 0)
    next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count * batch * length / (time.perf_counter() - begin)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="a file for the results")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument(
        "--large", type=int, default=0, help="MB of the file whose preparation's memory is watched"
    )
    a = parser.parse_args(argv)
    rows = {"cores": os.cpu_count(), "sequence_length": a.length, "megabytes": a.megabytes}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_text(root / "text.txt", a.megabytes)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "modse_jax.data.train_tokenizer",
                f"--source=text:{root / 'text.txt'}",
                "--kind=sentencepiece",
                "--vocab_size=4096",
                f"--out={root / 'sp.model'}",
            ],
            check=True,
        )
        for tokenizer in ("bytes", f"sentencepiece:{root / 'sp.model'}"):
            kind = tokenizer.partition(":")[0]
            for workers in (1, 2):
                out = root / f"{kind}{workers}"
                rate = preparing(root / "text.txt", tokenizer, a.length, workers, out)
                rows[f"prepare_{kind}_{workers}_megabytes_per_second"] = rate
        rows["load_1_tokens_per_second"] = loading(root / "bytes1", a.length)
        code = (
            f"from benchmarks import data; import pathlib; "
            f"print(data.loading(pathlib.Path({str(root / 'bytes1')!r}), {a.length}))"
        )
        both = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        rows["load_2_tokens_per_second"] = sum(float(p.communicate()[0]) for p in both)
        if a.large:
            write_text(root / "large.txt", a.large)
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            rows["large_megabytes"] = a.large
            rows["large_megabytes_per_second"] = preparing(
                root / "large.txt", "bytes", a.length, 2, root / "large"
            )
            rows["large_peak_megabytes_of_a_process"] = (
                resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
            )
            rows["peak_before_megabytes"] = before / 1e3
    print(json.dumps(rows, indent=1))
    if a.json:
        pathlib.Path(a.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
