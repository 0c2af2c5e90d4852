"""Measures how a training step scales with the number of devices, at a fixed batch per device.

    python -m benchmarks.scaling [--json=FILE] [--topologies=v5p:2x2x4,v5p:4x4x4,v5p:4x8x8,...]

Part one runs the same small model on 1, 2, 4 and 8 virtual CPU devices, and reports the seconds of
a step and the bytes that a device sends. The devices share the same few cores, so a step takes
longer with more of them.

Part two compiles the 300Mx8 step, with pairs of experts on 4 shards, for TPU topologies that are
not attached (modse_jax/planning). Only the all-reduce of gradients over `data` may grow with the
number of devices n, as (n - 1) / n.
"""

import json
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags

from benchmarks import timing
from configs import modse_300m_x8
from modse_jax.config import device_mesh, loading
from modse_jax.config.options import Config
from modse_jax.planning import hlo_collectives, planner, step_plan
from modse_jax.runtime import sharding
from modse_jax.training import train_step

TOPOLOGIES = flags.DEFINE_list(
    "topologies",
    ["v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16"],
    "TPU topologies to compile for.",
)

SEQUENCES = 2  # per device

# Sizes of the axes (data, fsdp, expert) by number of CPU devices.
MESHES = {1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 1, 4), 8: (2, 1, 4)}


def small_config(devices: int) -> Config:
    """Returns the model of part one, on a number of devices."""
    values = loading.default_config()
    values.model.update(dim=128, num_layers=2, num_heads=2, vocab_size=512, context_length=256)
    values.moe.update(width=320, widths=(576, 64, 512, 128, 384, 256, 320, 320), pairs=True)
    values.data.sequence_length = 256
    values.training.batch_size = SEQUENCES * devices
    values.evaluation.batch_size = devices
    values.mesh.update(dict(zip(sharding.AXES, MESHES[devices])))
    return loading.from_dict(values.to_dict())


class Step:
    """A compiled step on random tokens. Its state is donated from call to call."""

    def __init__(self, config: Config):
        num_devices = math.prod(getattr(config.mesh, axis) for axis in sharding.AXES)
        mesh = device_mesh.build_mesh(config, jax.devices()[:num_devices])
        shape = (config.training.batch_size, config.data.sequence_length + 1)
        rng = np.random.default_rng(0)
        tokens = rng.integers(4, config.model.vocab_size, shape, dtype=np.int32)
        rows = {"tokens": tokens, "segments": np.ones(shape, np.int32)}
        self.batch = sharding.shard_batch(mesh, rows, shape[0])
        self.state = train_step.init_sharded_state(config, mesh)
        self.compiled = train_step.compile_train_step(config, mesh)

    def __call__(self) -> train_step.Metrics:
        """Runs one step and returns its metrics."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def measure_on_cpu(counts: Sequence[int] = tuple(MESHES), repeats: int = 9) -> list[dict]:
    """Returns a row of results for each number of virtual devices."""
    steps = {count: Step(small_config(count)) for count in counts}
    cases = {count: timing.Case(step, ()) for count, step in steps.items()}
    seconds = timing.time_interleaved(cases, repeats)
    rows = []
    for count, step in steps.items():
        collectives = hlo_collectives.list_collectives(step.compiled.as_text())
        rows.append(
            {
                "devices": count,
                "mesh": dict(zip(sharding.AXES, MESHES[count])),
                "step_seconds": float(np.median(seconds[count])),
                "over_one_device": timing.median_ratio(seconds[count], seconds[1]),
                "collective_bytes_by_kind": hlo_collectives.bytes_by_kind(collectives),
            }
        )
    return rows


def plan_on_tpu(topology: str) -> step_plan.StepPlan:
    """Returns the plan of 300Mx8 with pairs on 4 shards and one micro-batch."""
    num_chips = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    values = modse_300m_x8.get_config()
    values.mesh.expert = 4
    values.training.gradient_accumulation = 1
    values.training.batch_size = SEQUENCES * num_chips
    values.evaluation.batch_size = values.training.batch_size
    return planner.plan_step(loading.from_dict(values.to_dict()), topology)


def format_traffic(bytes_by_kind: Mapping[str, float]) -> str:
    """Returns what a device sends in a step, in MiB."""
    text = f"{_mebibytes(sum(bytes_by_kind.values()))} MiB sent per device"
    kinds = ", ".join(f"{kind} {_mebibytes(sent)}" for kind, sent in bytes_by_kind.items())
    return f"{text} ({kinds})" if kinds else text


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def main(_: Sequence[str]) -> None:
    """Prints a line for each number of devices, and writes --json."""
    planner.prepare_environment([*TOPOLOGIES.value, f"cpu:{max(MESHES)}"])
    cpu_rows = measure_on_cpu(repeats=timing.REPEATS.value)
    for row in cpu_rows:
        print(
            f"{row['devices']} CPU devices: {row['step_seconds']:.3f} s per step, "
            f"{row['over_one_device']:.2f} times that of one device; "
            f"{format_traffic(row['collective_bytes_by_kind'])}",
            flush=True,
        )
    tpu_rows = []
    for topology in TOPOLOGIES.value:
        plan = plan_on_tpu(topology)
        tpu_rows.append(step_plan.to_dict(plan))
        print(
            f"{topology}, {plan.devices} chips: "
            f"{format_traffic(plan.collective_bytes_by_kind or {})}; "
            f"peak {(plan.peak_bytes_per_device or 0) / 2**30:.1f} GiB, "
            f"compiled in {plan.compile_seconds:.0f} s",
            flush=True,
        )
    results = {"machine": timing.describe_machine(), "cpu": cpu_rows, "tpu": tpu_rows}
    if timing.JSON.value:
        with open(timing.JSON.value, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    timing.run(main)
