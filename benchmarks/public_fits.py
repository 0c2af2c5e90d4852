"""Fits scaling laws to public runs, and compares the coefficients with published ones.

    python -m benchmarks.public_fits --chinchilla=FILE --routing=FILE [--json=FILE]

FILE of --chinchilla: Epoch AI's reconstruction of the runs of Hoffmann et al. (columns N, C, loss).
Its first five rows are left out, as Besiroglu et al. do. FILE of --routing: the curves of "Unified
Scaling Laws for Routed Language Models" that DeepMind published (CC-BY 4.0), of which the last
step of the dense and S-BASE runs with one expert per token and seed 42 is fitted.
"""

import argparse
import csv
import gzip
import json
import math
import pathlib
import time
from typing import Any

import numpy as np

from modse_jax.study import fits

OUTLIERS = 5  # rows that Besiroglu et al. leave out


def read_chinchilla(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns parameters, tokens and losses; tokens are C / (6 N)."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))[OUTLIERS:]
    parameters = np.array([float(row["N"]) for row in rows])
    compute = np.array([float(row["C"]) for row in rows])
    losses = np.array([float(row["loss"]) for row in rows])
    return {"parameters": parameters, "tokens": compute / (6 * parameters), "loss": losses}


def read_routing(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns dense parameters, experts and validation losses of the last step of every run."""
    last: dict[str, dict] = {}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            is_wanted = (
                row["routing_frequency"] == "0.5"
                and row["k"] == "1"
                and row["seed"] == "42"
                and row["router_type"] in ("Dense", "S-Base")
            )
            known = last.get(row["hyper_id"])
            if is_wanted and (known is None or int(row["step"]) > int(known["step"])):
                last[row["hyper_id"]] = row
    runs = list(last.values())
    return {
        "parameters": np.array([float(run["dense_parameter_count"]) for run in runs]),
        "experts": np.array([float(run["num_experts"]) for run in runs]),
        "loss": np.array([float(run["loss_validation"]) for run in runs]),
    }


def measure(law: fits.LawToFit, data: dict[str, np.ndarray], samples: int) -> dict[str, Any]:
    """Fits a law; returns coefficients, intervals, errors and CPU seconds."""
    started = time.process_time()
    found = fits.fit(law, data)
    seconds = time.process_time() - started
    intervals = fits.bootstrap(law, data, found, samples)
    size = data["parameters"] * data.get("tokens", np.ones_like(data["loss"]))
    held_out = fits.fit_without_largest(law, data, size)
    return {
        "runs": found.num_runs,
        "coefficients": found.coefficients,
        "intervals_90": {name: list(interval) for name, interval in intervals.items()},
        "objective": found.objective,
        "rmse_log10": found.rmse / math.log(10),
        "rmse_log10_of_largest_left_out": held_out.rmse / math.log(10),
        "starts": len(found.starts),
        "starts_within_1%": sum(s.objective <= found.objective * 1.01 for s in found.starts),
        "warnings": found.warnings,
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    """Fits, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chinchilla", type=pathlib.Path)
    parser.add_argument("--routing", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=100, help="samples of the bootstrap")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    arguments = parser.parse_args()
    results = {}
    if arguments.chinchilla:
        data = read_chinchilla(arguments.chinchilla)
        results["chinchilla"] = measure(fits.ChinchillaToFit(), data, arguments.samples)
    if arguments.routing:
        data = read_routing(arguments.routing)
        results["routed_s_base"] = measure(fits.RoutedToFit(), data, arguments.samples)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
