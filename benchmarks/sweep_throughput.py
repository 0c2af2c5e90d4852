"""Measures how much of its time a sweep trains, compared with its runs alone.

    python -m benchmarks.sweep_throughput --workdir=DIR [--seconds_per_run=120] [--shapes=dense,n32]
        [--json=FILE]

One run of each shape is first trained alone by train.py, for its steady tokens/s. A sweep then
trains each shape with three seeds. The efficiency is the time that all tokens of the sweep take at
the steady speeds, over the wall time of the command: start, compilation, validation, saving and
tables are all losses. Only the preparation of the data is left out.

With --shapes, the measurement can be made in pieces: a FILE that exists is extended, and its total
is that of all pieces. Every piece is a sweep of its own and pays for its own start.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from configs.sweeps import micro_ladder
from modse_jax.config import loading
from modse_jax.study import arms
from modse_jax.sweeps import dry_run, matching, results
from modse_jax.sweeps.definition import Sweep, choices, product, seeds
from modse_jax.sweeps.results import SweepDirectory
from modse_jax.training import run_logs

ROOT = pathlib.Path(__file__).parents[1]

SIZE = micro_ladder.XS
SEEDS = (0, 1, 2)
LONG_SECONDS = 120  # the length of a run for which the efficiency is extrapolated

SHAPES = {
    "dense": arms.dense_options(SIZE),
    "n32": arms.mixture_options(SIZE, 32, Fraction(1, 4)),
    "n16": arms.mixture_options(SIZE, 16, Fraction(1)),
    "n8": arms.mixture_options(SIZE, 8, Fraction(1, 2)),
}

TOKENS_PER_STEP = micro_ladder.BATCH_SIZE * micro_ladder.SEQUENCE_LENGTH

SWEEP_FILE = """from benchmarks import sweep_throughput

def get_sweep():
    return sweep_throughput.make_sweep({data!r}, {steps!r})
"""

CONFIG_FILE = """from benchmarks import sweep_throughput

def get_config():
    return sweep_throughput.make_config({data!r}, {shape!r}, {steps!r})
"""


def make_sweep(data: str, steps: Mapping[str, int]) -> Sweep:
    """Returns the sweep.

    Args:
        data: the directory of the prepared data.
        steps: {name of a shape: training steps}.
    """
    shapes = {name: {**SHAPES[name], "training.steps": count} for name, count in steps.items()}
    return Sweep(
        base=_base_config(data),
        arms=product(choices(shapes), seeds(*SEEDS)),
        compares_shapes=False,
    )


def make_config(data: str, shape: str, steps: int) -> ConfigDict:
    """Returns the config of the first run of a shape in the sweep."""
    config = _base_config(data)
    config.update_from_flattened_dict({**SHAPES[shape], "training.steps": steps})
    (seed,) = seeds(SEEDS[0])
    config.update_from_flattened_dict(dict(seed.options))
    return config


def choose_steps(shape: str, seconds: float, flops_per_second: float) -> int:
    """Returns the training steps of a shape that take some seconds at an assumed speed."""
    config = loading.from_dict(make_config("", shape, 1).to_dict())
    flops_per_step = matching.count_flops_per_token(config) * TOKENS_PER_STEP
    return max(3 * config.training.log_every, round(seconds * flops_per_second / flops_per_step))


def _base_config(data: str) -> ConfigDict:
    config = micro_ladder.base_config(SIZE)
    config.data.source = f"prepared:{data}"
    return config


def prepare_data(directory: pathlib.Path) -> None:
    """Prepares the data of the micro ladder, unless the directory has it already."""
    if directory.exists():
        return
    options = {
        "source": "python_stdlib",
        "tokenizer": "sentencepiece",
        "vocab_size": SIZE.vocab_size,
        "sequence_length": micro_ladder.SEQUENCE_LENGTH,
        "out": directory,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    _run("-m", "modse_jax", "prepare", *flags)


def measure_alone(root: pathlib.Path, data: pathlib.Path, shape: str, steps: int) -> float:
    """Returns the steady tokens/s of a run that train.py trains, after its first logged steps."""
    config = root / "config.py"
    config.write_text(CONFIG_FILE.format(data=str(data), shape=shape, steps=steps))
    workdir = root / f"alone_{shape}_{time.time_ns()}"
    _run("train.py", f"--config={config}", f"--workdir={workdir}")
    rows = [row for row in run_logs.read_log(workdir / "metrics.jsonl") if row["split"] == "train"]
    seconds = sum(
        (row["step"] - before["step"]) * row["step_seconds"] for before, row in zip(rows, rows[1:])
    )
    return (rows[-1]["step"] - rows[0]["step"]) * TOKENS_PER_STEP / seconds


def measure_sweep(
    root: pathlib.Path,
    data: pathlib.Path,
    steps: Mapping[str, int],
    tokens_per_second: Mapping[str, float],
) -> dict[str, Any]:
    """Trains a sweep, and returns its times in seconds.

    Args:
        root: a directory for the sweep.
        data: the directory of the prepared data.
        steps: {name of a shape: training steps}.
        tokens_per_second: {name of a shape: steady tokens/s alone}.
    """
    sweep = root / "sweep.py"
    sweep.write_text(SWEEP_FILE.format(data=str(data), steps=dict(steps)))
    workdir = root / f"sweep_{time.time_ns()}"
    start = time.monotonic()
    _run("-m", "modse_jax", "sweep", f"--sweep={sweep}", f"--workdir={workdir}")
    wall_seconds = time.monotonic() - start
    found = results.find_other_results(SweepDirectory(workdir), set())
    return {
        "steps": dict(steps),
        "alone_tokens_per_second": dict(tokens_per_second),
        "runs": len(found),
        "tokens": len(SEEDS) * TOKENS_PER_STEP * sum(steps.values()),
        "wall_seconds": wall_seconds,
        "steady_seconds": sum(
            len(SEEDS) * TOKENS_PER_STEP * count / tokens_per_second[name]
            for name, count in steps.items()
        ),
        "training_seconds": sum(result["metrics"]["training_seconds"] for result in found),
    }


def summarize(pieces: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the efficiency of all pieces together, measured and for runs of `LONG_SECONDS`.

    For long runs, the time that is not training is assumed to be the same for each run, and
    training to be as much slower or faster than alone as it was measured.
    """

    def total(name: str) -> float:
        return sum(piece[name] for piece in pieces)

    slowdown = total("training_seconds") / total("steady_seconds")
    overhead = (total("wall_seconds") - total("training_seconds")) / total("runs")
    return {
        "runs": total("runs"),
        "tokens_per_second": total("tokens") / total("wall_seconds"),
        "efficiency": total("steady_seconds") / total("wall_seconds"),
        "slowdown_of_training": slowdown,
        "other_seconds_per_run": overhead,
        f"efficiency_of_{LONG_SECONDS}_second_runs": LONG_SECONDS
        / (LONG_SECONDS * slowdown + overhead),
    }


def _run(*arguments: str) -> None:
    """Runs Python in the root of this repository, without output."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="directory for data and runs")
    parser.add_argument("--json", help="file to write the results to, or to extend")
    parser.add_argument(
        "--seconds_per_run",
        type=float,
        default=LONG_SECONDS,
        help="about how long each run trains, at the speed that --dry_run assumes",
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names, separated by commas")
    options = parser.parse_args(argv)
    shapes = options.shapes.split(",")
    unknown = sorted(set(shapes) - set(SHAPES))
    if unknown:
        parser.error(f"--shapes names {unknown[0]!r}; known shapes: {', '.join(SHAPES)}")
    root = pathlib.Path(options.workdir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    data = root / "data"
    prepare_data(data)
    speed = dry_run.find_speed(None, 0).flops_per_second
    steps = {name: choose_steps(name, options.seconds_per_run, speed) for name in shapes}
    alone = {name: measure_alone(root, data, name, count) for name, count in steps.items()}
    piece = measure_sweep(root, data, steps, alone)
    pieces = [piece]
    if options.json and pathlib.Path(options.json).exists():
        pieces = [*json.loads(pathlib.Path(options.json).read_text())["pieces"], piece]
    text = json.dumps({"total": summarize(pieces), "pieces": pieces}, indent=1)
    print(text)
    if options.json:
        pathlib.Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
