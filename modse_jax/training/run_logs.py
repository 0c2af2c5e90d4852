"""The logs of a run: metrics.jsonl, routing.jsonl, events.jsonl and TensorBoard."""

import json
import pathlib
import shutil
from collections.abc import Iterable

from modse_jax.errors import DiskFullError, RunError
from modse_jax.runtime import files

# Free space below which the run stops. TensorBoard's writer is a thread that ends silently when the
# disk is full, and closing it would then wait for that thread forever.
BOARD_ROOM = 512 * 1024  # bytes

LOGS = ("metrics", "routing", "events")

# The routing statistics of each layer that TensorBoard shows, and those of each of several pools.
LAYER_SCALARS = ("max_over_mean", "entropy", "count_weighted_width")
POOL_SCALARS = ("max_over_mean", "entropy", "dropped")


class RunLogWriter:
    """Appends to the logs of a workdir."""

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        """Opens the logs.

        If an earlier process wrote lines for steps after its last checkpoint, these steps are run
        again. Their lines are moved to *.discarded.jsonl, so that no step is in a log twice.

        Args:
          workdir: the directory of the run.
          step: the step from which the run resumes; 0 for a new run.
        """
        self._workdir = workdir
        self._files = {}
        for name in LOGS:
            path = workdir / f"{name}.jsonl"
            _discard_after(path, step)
            self._files[name] = path.open("a", buffering=1, encoding="utf-8")
        # Imported here: if torch is installed, tensorboardX imports all of it, which takes 5 s that
        # the error for a mistyped option should not wait for.
        import tensorboardX

        # With a full queue, a call would wait for the thread that empties it, which may have ended
        # because the disk is full. So the queue is made large enough never to fill up.
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, max_queue=1_000_000
        )

    def write(self, row: dict, layers: list[dict]) -> None:
        """Logs the metrics of a training step or a validation, and its routing statistics.

        Args:
          row: the metrics, with "step" and "split"; a line of metrics.jsonl.
          layers: the routing statistics of each layer; see `metrics.routing_by_layer`.

        Raises:
          RunError: the disk is full.
        """
        step = row["step"]
        split = row["split"]
        self._append("metrics", row)
        for layer in layers:
            self._append("routing", {"step": step, "split": split, **layer})
            tag = f"layer_{layer['layer']}"
            for name in LAYER_SCALARS:
                self._board.add_scalar(f"{split}/router/{name}/{tag}", layer[name], step)
            for index, pool in enumerate(layer["pools"] if len(layer["pools"]) > 1 else ()):
                for name in POOL_SCALARS:
                    self._board.add_scalar(f"{split}/pool_{index}/{name}/{tag}", pool[name], step)
            for name, factor in layer["straggler"].items():
                self._board.add_scalar(f"{split}/straggler/{name}/{tag}", factor, step)
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(f"{split}/{name}", value, step)
        for name, result in row.get("sets", {}).items():
            self._board.add_scalar(f"{split}/sets/{name}/loss", result["loss"], step)

    def event(self, event: dict) -> None:
        """Logs an unusual event, such as a skipped step, as a line of events.jsonl.

        Raises:
          RunError: the disk is full.
        """
        self._append("events", event)

    def _append(self, log: str, values: dict) -> None:
        file = self._files[log]
        try:
            file.write(files.format_json(values) + "\n")
        except OSError as error:
            raise write_error_class(error)(
                f"cannot write {file.name}: {error.strerror}; checkpoints are untouched: make room "
                "and run the same command again"
            ) from None
        if shutil.disk_usage(self._workdir).free < BOARD_ROOM:
            raise DiskFullError(
                f"{self._workdir} has less than {BOARD_ROOM >> 10} KiB free; checkpoints are "
                "untouched: make room and run the same command again"
            )

    def close(self) -> None:
        """Closes the logs."""
        for file in self._files.values():
            file.close()
        self._board.close()


def write_error_class(error: OSError) -> type[RunError]:
    """Returns the class of the error that reports a failed write."""
    return DiskFullError if error.errno in files.DISK_FULL else RunError


class NullWriter:
    """Has the methods of `RunLogWriter` but writes nothing; for all processes but the main one."""

    def write(self, row: dict, layers: list[dict]) -> None:
        """Does nothing."""

    def event(self, event: dict) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_log(path: pathlib.Path) -> list[dict]:
    """Returns the lines of a .jsonl log as dictionaries; see `parse_log`."""
    return parse_log(path.read_text(encoding="utf-8").splitlines())


def parse_log(lines: Iterable[str]) -> list[dict]:
    """Returns lines of a .jsonl log as dictionaries.

    Lines that are not valid JSON are skipped: a run that was killed may leave one incomplete.
    """
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _discard_after(path: pathlib.Path, step: int) -> None:
    """Moves the lines of a log for steps after `step` to *.discarded.jsonl."""
    if not path.exists():
        return
    kept = []
    discarded = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        target = kept if _is_up_to(line, step) else discarded
        target.append(line)
    if not discarded:
        return
    with open(path.with_suffix(".discarded.jsonl"), "a", encoding="utf-8") as file:
        file.writelines(line if line.endswith("\n") else line + "\n" for line in discarded)
    files.write_atomically(path, "".join(kept))


def _is_up_to(line: str, step: int) -> bool:
    """Returns True if a line is for `step` or an earlier step, False also if it is incomplete."""
    try:
        return json.loads(line)["step"] <= step
    except ValueError:
        return False
