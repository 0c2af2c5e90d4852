"""Measures this project on the accelerator of this machine, within a time limit.

    python -m benchmarks.accelerator [--minutes=9] [--out=DIR] [--json=FILE] [--phases=...]
    python -m benchmarks.accelerator --show=FILE
    python -m benchmarks.accelerator --tiny        a rehearsal, for which a CPU is enough

docs/accelerator.md explains the phases and every number.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from benchmarks.accelerator import results, schedule, table
from modse_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# Exit codes.
NOTHING_MEASURED = 1
BAD_INPUT = 2

COMMAND = (sys.executable, "-m", "benchmarks.accelerator.phases")


class Run(NamedTuple):
    """The settings that all phases of a run share."""

    writer: results.Writer
    seconds: float  # limit of all phases together
    tiny: bool = False
    devices: int = 1
    command: Sequence[str] = COMMAND  # to which a phase's arguments are added as JSON

    @property
    def seconds_left(self) -> float:
        return self.writer.started + self.seconds - time.time()


class Parser(argparse.ArgumentParser):
    """Reports errors as one sentence, like the other commands."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the checked command line.

    Raises:
        UserError: an option is unknown or has an invalid value.
    """
    parser = Parser(prog="benchmarks.accelerator", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="time for everything")
    parser.add_argument("--out", help="folder of the results (default: accelerator-results)")
    parser.add_argument("--json", help="file of the results (default: accelerator.jsonl in --out)")
    parser.add_argument("--phases", help="only these: names, or first words of names, with commas")
    parser.add_argument("--devices", type=int, default=1, help="devices of the training steps")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal")
    parser.add_argument("--show", metavar="FILE", help="print the tables of a results file")
    parser.add_argument("--list", action="store_true", help="print the names of all phases")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        raise UserError(f"--minutes={options.minutes} must be above 0")
    if options.devices < 1:
        raise UserError(f"--devices={options.devices} must be at least 1")
    return options


def select(phases: Sequence[schedule.Phase], wanted: str | None) -> list[schedule.Phase]:
    """Returns the phases whose names start with one of those in --phases."""
    if wanted is None:
        return list(phases)
    return [p for p in phases if any(_names(word, p.name) for word in wanted.split(","))]


def _names(word: str, name: str) -> bool:
    return f"{name} ".startswith(f"{word.strip()} ")


def check_selection(wanted: str | None) -> None:
    """Raises UserError if a word of --phases names no phase of any chip."""
    if wanted is None:
        return
    known = list_names()
    for word in wanted.split(","):
        if not any(_names(word, name) for name in known):
            raise UserError(
                f"--phases: {word.strip()!r} is no phase; choose among {', '.join(known)}, or "
                "their first words (kernels, layer, step)"
            )


def list_names() -> list[str]:
    """Returns the names of the phases of all chips."""
    from modse_jax.moe.experts import select  # imports jax, which --show does without

    return schedule.all_names(list(select.KERNELS))


def open_results(options: argparse.Namespace) -> pathlib.Path:
    """Creates the results file and returns its path.

    Raises:
        UserError: the file exists or cannot be written.
    """
    folder = pathlib.Path(options.out or "accelerator-results")
    path = pathlib.Path(options.json) if options.json else folder / "accelerator.jsonl"
    path = path.absolute()
    if path.exists():
        raise UserError(
            f"{path} exists; choose another --json or --out, or print it with --show={path}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(
            f"the results file {path} cannot be written: {error.strerror}; choose another --out"
        ) from None
    return path


def run_all(run: Run, wanted: str | None = None) -> None:
    """Runs the phases that the machine can run.

    Raises:
        UserError: the machine has no accelerator, or fewer devices than --devices.
    """
    run_phase(run, schedule.facts())
    found = [row for row in results.read(run.writer.path) if row["phase"] == "facts"]
    if not found:
        raise UserError("jax could not start on this machine; the line above has its message")
    chip, backends = found[0]["chip"], found[0]["backends"]
    if chip == "cpu" and not run.tiny:
        raise UserError(
            "jax sees no accelerator on this machine, only a CPU; install jax for it "
            "(pip install jax[cuda13] or jax[tpu]), or rehearse with --tiny"
        )
    if found[0]["devices"] < run.devices:
        raise UserError(
            f"--devices={run.devices}, but jax sees {found[0]['devices']}; choose at most as many"
        )
    for phase in select(schedule.kernel_phases(chip, backends, run.tiny), wanted):
        run_phase(run, phase)
    backends = order_backends(backends, results.read(run.writer.path))
    for phase in select(schedule.step_phases(chip, backends, run.tiny), wanted):
        run_phase(run, phase)


def order_backends(backends: Sequence[str], rows: Sequence[dict]) -> list[str]:
    """Returns the backends that did not fail a check, fastest first.

    A backend fails if a result is wrong, or if its check crashed or was stopped. Backends that were
    not checked (--phases) are included.
    """
    milliseconds = {}
    wrong = set()
    for row in rows:
        if row["phase"] == "kernels" and not row["correct"]:
            wrong.add(row["backend"])
        if row["phase"] in ("failed", "stopped") and row["name"].startswith("kernels "):
            wrong.add(row["name"].removeprefix("kernels "))
        if row["phase"] == "layer" and row.get("case") == "modse" and "milliseconds" in row:
            milliseconds[row["backend"], row["what"]] = row["milliseconds"]
    return sorted(
        (backend for backend in backends if backend not in wrong),
        key=lambda backend: milliseconds.get((backend, "forward_backward"), float("inf")),
    )


def run_phase(run: Run, phase: schedule.Phase) -> None:
    """Runs one phase in a separate process, and records how it ended if it did not succeed."""
    write = run.writer.append
    if run.seconds_left < (1 if run.tiny else phase.expected_seconds):
        write(
            phase="skipped",
            name=phase.name,
            seconds_left=round(run.seconds_left),
            seconds_expected=phase.expected_seconds,
        )
        return
    begin = time.time()
    limit = min(phase.limit_seconds, run.seconds_left)
    process = _start(run, phase)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        write(
            phase="stopped",
            name=phase.name,
            seconds=round(limit, 1),
            error=f"it was stopped after its limit of {limit:.0f} seconds",
            output=_tail(errors),
        )
        return
    except BaseException:  # This process is ending: the other one holds the device, so it must too.
        process.kill()
        process.communicate()
        raise
    seconds = round(time.time() - begin, 1)
    if process.returncode:
        write(
            phase="failed",
            name=phase.name,
            seconds=seconds,
            exit_code=process.returncode,
            error=_tail(errors),
        )
    else:
        write(phase="done", name=phase.name, seconds=seconds)


def _start(run: Run, phase: schedule.Phase) -> subprocess.Popen:
    arguments = {
        "path": str(run.writer.path),
        "started": run.writer.started,
        "kind": phase.kind,
        "name": phase.name,
        "options": phase.options,
        "tiny": run.tiny,
        "devices": run.devices,
    }
    flags = phase.flags.format(folder=run.writer.path.parent, name=phase.name.replace(" ", "-"))
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    return subprocess.Popen(
        [*run.command, json.dumps(arguments)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _tail(text: str | None) -> str:
    return (text or "").strip()[-1500:]


def _stop_on_signals() -> None:
    """Makes SIGTERM end the run like Ctrl-C, which prints the tables."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        options = parse(arguments)
        if options.show:
            print(table.format_tables(results.read(options.show)))
            return 0
        if options.list:
            print("\n".join(list_names()))
            return 0
        check_selection(options.phases)
        path = open_results(options)
        _stop_on_signals()
        writer = results.Writer(path, time.time())
        run = Run(writer, 60 * options.minutes, options.tiny, options.devices)
        try:
            run_all(run, options.phases)
        except KeyboardInterrupt:
            writer.append(phase="interrupted", name="")
        print(table.format_tables(results.read(path)))
        print(f"\nThe results are in {path}.")
        measured = any(row["phase"] in schedule.MEASURING for row in results.read(path))
        return 0 if measured else NOTHING_MEASURED
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
