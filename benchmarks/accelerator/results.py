"""The results file of a run: one JSON object per line, synced to disk as soon as it is known.

A run that is interrupted at any point leaves a file that `read` and table.format_tables accept.
"""

import json
import os
import pathlib
import time

from modse_jax.errors import UserError


class Writer:
    """Appends results to a file, and prints them."""

    def __init__(self, path: str | os.PathLike, started: float, **common):
        """Prepares to append.

        Args:
            path: of the file.
            started: time.time() when the run began.
            common: fields of every line.
        """
        self.path = pathlib.Path(path)
        self.started = started
        self.common = common

    def append(self, **fields) -> None:
        """Writes one line and waits until it is on disk."""
        row = {"at": round(time.time() - self.started, 1), **self.common, **fields}
        line = json.dumps(row)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)


def read(path: str | os.PathLike) -> list[dict]:
    """Returns the lines of a results file. An incomplete last line is left out.

    Raises:
        UserError: the file cannot be read or contains something else.
    """
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the results file {path} cannot be read: {error}; give a file that "
            "`python -m benchmarks.accelerator` wrote"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "phase" in row:
            rows.append(row)
        elif number < len(lines) or number == 1:
            raise UserError(
                f"line {number} of {path} is not a result; give a file that "
                "`python -m benchmarks.accelerator` wrote"
            )
    return rows
