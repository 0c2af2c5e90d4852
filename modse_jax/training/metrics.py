"""What a run says: metrics.jsonl, routing.jsonl, TensorBoard, and a line on the console.

Legend: E experts, K top-k.
"""

import json
import math
import pathlib
import shutil

import numpy as np

from modse_jax.config.options import Config
from modse_jax.errors import RunError
from modse_jax.model import accounting
from modse_jax.moe import expert_placement
from modse_jax.moe.router import RouterStatistics

BOARD_ROOM = 512 * 1024  # bytes


def routing_by_layer(
    statistics: RouterStatistics,
    widths: tuple[int, ...],
    placement: expert_placement.Placement | None = None,
) -> list[dict]:
    """One object per layer, plain numbers, from statistics with a leading axis of layers.

    Widths are means over routed rows of the chosen expert's width, weighted by count and by gate; `entropy` is the mean
    entropy of the softmax over all experts, nats; `max_over_mean` is of tokens per expert; `straggler` is the largest
    over the mean of tokens x width over the devices of one expert axis that took the whole batch, before drops, as the
    experts might be placed, and, given the placement, as they are ("in_use").
    """
    out, placements = [], expert_placement.reference_placements(widths)
    if placement is not None:
        placements = {"in_use": placement, **placements}
    for layer in range(len(statistics.tokens)):
        counts_KE = np.asarray(statistics.counts_KE[layer], np.int64)
        gates_E = np.asarray(statistics.gates_KE[layer], np.float64).sum(axis=0)
        counts_E, tokens = counts_KE.sum(axis=0), max(int(statistics.tokens[layer]), 1)
        out.append(
            {
                "layer": layer,
                "tokens_per_expert": counts_E.tolist(),
                "tokens_per_expert_by_choice": counts_KE.tolist(),
                "mean_gate": [_ratio(g, c) for g, c in zip(gates_E, counts_E)],
                "max_over_mean": _ratio(counts_E.max(), counts_E.mean()),
                "entropy": float(statistics.entropy[layer]) / tokens,
                "count_weighted_width": _ratio(counts_E @ np.array(widths), counts_E.sum()),
                "gate_weighted_width": _ratio(gates_E @ np.array(widths), gates_E.sum()),
                "straggler": {
                    name: expert_placement.straggler_factor(counts_E.tolist(), p)
                    for name, p in placements.items()
                },
                "dropped": int(statistics.dropped[layer]),
            }
        )
    return out


def train_row(
    config: Config,
    step: int,
    metrics,
    step_seconds: float,
    bytes_per_token: float,
    peak_flops: float | None,
) -> dict:
    """The metrics.jsonl object of one training step. `peak_flops` is that of all devices together."""
    t, length = config.training, config.data.sequence_length
    tokens = t.batch_size * length
    counts_E = np.asarray(metrics.statistics.counts_KE).sum(axis=(0, 1))
    # Rows that were dropped, and those of padding, which are never routed, multiply nothing.
    multiplied = counts_E.sum() - np.asarray(metrics.statistics.dropped).sum()
    share = multiplied / (tokens * config.moe.top_k * config.model.num_layers)

    def mfu(width):
        flops = accounting.train_flops_per_token(config, length, width) * tokens
        return flops / step_seconds / peak_flops if peak_flops else None

    row = {
        "step": step,
        "split": "train",
        "tokens": step * tokens,
        "loss": float(metrics.loss),
        "bits_per_byte": float(metrics.loss) / math.log(2) / bytes_per_token,
        "balance_loss": float(metrics.balance_loss),
        "z_loss": float(metrics.z_loss),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "tokens_per_second": tokens / step_seconds,
        "mfu_nominal": mfu(accounting.nominal_width(config)),
        "mfu_realised": mfu(accounting.realized_width(config, counts_E) * share),
        "step_seconds": step_seconds,
        "skipped_steps": int(metrics.skipped),
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def console_line(row: dict, layers: list[dict], total_steps: int) -> str:
    def number(name, form):
        return "nan" if row[name] is None else format(row[name], form)

    load = max(layer["max_over_mean"] for layer in layers)
    dropped = sum(layer["dropped"] for layer in layers)
    eta = (total_steps - row["step"]) * row["step_seconds"]
    return (
        f"step {row['step']}/{total_steps}  loss {number('loss', '.4f')}  "
        f"{number('bits_per_byte', '.3f')} bits/byte  balance {number('balance_loss', '.3f')}  load {load:.2f}  "
        f"grad {number('grad_norm', '.3f')}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s  "
        + (f"mfu {row['mfu_realised']:.0%}  " if row["mfu_realised"] is not None else "")
        + (f"dropped {dropped}  " if dropped else "")
        + (f"skipped {row['skipped_steps']}  " if row["skipped_steps"] else "")
        + (f"waits for data {row['data_wait']:.0%}  " if row["data_wait"] > 0.05 else "")
        + (f"epoch {max(row['epochs'].values()):.1f}  " if max(row["epochs"].values()) > 1 else "")
        + f"eta {duration(eta)}"
    )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


class Writer:
    """Appends to a workdir's logs. Lines past `step`, left by a run that went on after its last checkpoint, move to
    *.discarded.jsonl, so that a log is one straight history."""

    def __init__(self, workdir: pathlib.Path, step: int):
        self._files, self._workdir = {}, workdir
        for name in ("metrics", "routing", "events"):
            _discard_after(workdir / f"{name}.jsonl", step)
            self._files[name] = (workdir / f"{name}.jsonl").open("a", buffering=1)
        import tensorboardX  # here: where torch is installed it imports all of it, 5 s that a mistyped option waits

        # A queue that cannot fill up: its reader is a thread, which a full disk may have ended.
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, max_queue=1_000_000
        )

    def write(self, row: dict, layers: list[dict]) -> None:
        """A row for metrics.jsonl, and its routing by layer."""
        step, split = row["step"], row["split"]
        self._line("metrics", row)
        for layer in layers:
            self._line("routing", {"step": step, "split": split, **layer})
            for name in ("max_over_mean", "entropy", "count_weighted_width"):
                self._board.add_scalar(
                    f"{split}/router/{name}/layer_{layer['layer']}", layer[name], step
                )
            for name, factor in layer["straggler"].items():
                self._board.add_scalar(
                    f"{split}/straggler/{name}/layer_{layer['layer']}", factor, step
                )
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(f"{split}/{name}", value, step)

    def event(self, event: dict) -> None:
        """Something out of the ordinary in a step, for events.jsonl."""
        self._line("events", event)

    def _line(self, name, values):
        try:
            self._files[name].write(json.dumps(values) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write {self._files[name].name}: {error.strerror}; checkpoints are untouched: make "
                "room and run the same command again"
            ) from None
        # TensorBoard's writer works in a thread that dies without a word on a full disk; whoever waits for it hangs.
        if shutil.disk_usage(self._workdir).free < BOARD_ROOM:
            raise RunError(
                f"{self._workdir} has less than {BOARD_ROOM >> 10} KiB free; checkpoints are untouched: "
                "make room and run the same command again"
            )

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()


class NoWriter:
    """For the processes that do not write."""

    def write(self, row: dict, layers: list[dict]) -> None:
        pass

    def event(self, event: dict) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: pathlib.Path) -> list[dict]:
    """The objects of a .jsonl log; a last line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _discard_after(path, step):
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    keep, discard = [], []
    for line in lines:
        try:
            (keep if json.loads(line)["step"] <= step else discard).append(line)
        except ValueError:
            discard.append(line)  # a killed run's unfinished line
    if discard:
        with open(path.with_suffix(".discarded.jsonl"), "a") as file:
            file.writelines(line if line.endswith("\n") else line + "\n" for line in discard)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(keep))
        temporary.replace(path)


def _ratio(a, b):
    return float(a) / float(b) if b else 0.0
