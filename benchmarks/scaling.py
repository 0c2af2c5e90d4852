"""How a training step grows with the number of devices, at a fixed batch per device.

    python -m benchmarks.scaling [--json=FILE] [--topologies=v5p:2x2x4,v5p:4x4x4,v5p:4x8x8,v5p:8x8x16]

Part one: the same small model on 1, 2, 4 and 8 virtual CPU devices: seconds a step (on the same few cores, so their
work grows with the devices), and the bytes that a device sends. Part two: the 300Mx8 step with pairs on 4 shards,
compiled for TPU topologies that are not there (training/plan.py): only the gradients' sums over `data` may grow, as
(n - 1) / n.
"""

import json

import jax
import numpy as np
from absl import flags

from benchmarks import timing
from configs import modse_300m_x8
from modse_jax.config import device_mesh, loading, options
from modse_jax.planning import hlo_collectives, planner
from modse_jax.runtime import sharding
from modse_jax.training import train_step

TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16"], "TPU topologies"
)


SEQUENCES = 2  # per device


SHARDS = {
    1: (1, 1, 1),
    2: (1, 1, 2),
    4: (1, 1, 4),
    8: (2, 1, 4),
}  # data, fsdp, expert of so many CPU devices


def small(devices: int) -> options.Config:
    """The model of part one, on so many devices."""
    values = loading.default_config()
    values.model.update(dim=128, num_layers=2, num_heads=2, vocab_size=512, context_length=256)
    values.moe.update(width=320, widths=(576, 64, 512, 128, 384, 256, 320, 320), pairs=True)
    values.data.sequence_length = 256
    values.training.batch_size = SEQUENCES * devices
    values.evaluation.batch_size = devices
    values.mesh.update(dict(zip(sharding.AXES, SHARDS[devices])))
    return loading.from_dict(values.to_dict())


class Step:
    """A compiled step on random tokens, its state donated from call to call."""

    def __init__(self, config: options.Config):
        mesh = device_mesh.build_mesh(
            config, jax.devices()[: np.prod([getattr(config.mesh, a) for a in sharding.AXES])]
        )
        shape = (config.training.batch_size, config.data.sequence_length + 1)
        tokens = np.random.default_rng(0).integers(
            4, config.model.vocab_size, shape, dtype=np.int32
        )
        self.batch = sharding.shard_batch(
            mesh, {"tokens": tokens, "segments": np.ones(shape, np.int32)}, shape[0]
        )
        self.state, self.compiled = (
            train_step.init_sharded_state(config, mesh),
            train_step.compile_train_step(config, mesh),
        )

    def __call__(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def on_cpu(counts=tuple(SHARDS), repeats: int = 9) -> list[dict]:
    """A row per number of virtual devices."""
    cases = {n: {"compiled": Step(small(n)), "arguments": ()} for n in counts}
    seconds = timing.interleaved(cases, repeats)
    rows = []
    for n in counts:
        found = hlo_collectives.collectives(cases[n]["compiled"].compiled.as_text())
        rows.append(
            {
                "devices": n,
                "mesh": dict(zip(sharding.AXES, SHARDS[n])),
                "step_seconds": float(np.median(seconds[n])),
                "over_one_device": timing.ratio(seconds[n], seconds[1]),
                "collective_bytes_by_kind": hlo_collectives.bytes_by_kind(found),
            }
        )
    return rows


def on_tpu(topology: str) -> dict:
    """The plan of 300Mx8, pairs on 4 shards, SEQUENCES per chip and one micro-batch."""
    values = modse_300m_x8.get_config()
    values.mesh.expert = 4
    values.training.gradient_accumulation = 1
    values.training.batch_size = SEQUENCES * int(
        np.prod([int(n) for n in topology.partition(":")[2].split("x")])
    )
    values.evaluation.batch_size = values.training.batch_size
    return planner.plan(loading.from_dict(values.to_dict()), topology)


def sent(row: dict) -> str:
    """What a device sends in a step, in MiB."""
    kinds = row["collective_bytes_by_kind"]
    each = ", ".join(f"{kind} {n / 2**20:,.1f}" for kind, n in kinds.items())
    return f"{sum(kinds.values()) / 2**20:,.1f} MiB sent per device" + (
        f" ({each})" if each else ""
    )


def main(_):
    planner.prepare_environment([*TOPOLOGIES.value, f"cpu:{max(SHARDS)}"])
    rows = {"machine": timing.machine(), "cpu": on_cpu(repeats=timing.REPEATS.value), "tpu": []}
    for row in rows["cpu"]:
        print(
            f"{row['devices']} CPU devices: {row['step_seconds']:.3f} s a step, {row['over_one_device']:.2f} of one "
            f"device's; {sent(row)}",
            flush=True,
        )
    for topology in TOPOLOGIES.value:
        rows["tpu"].append(row := on_tpu(topology))
        print(
            f"{topology}, {row['devices']} chips: {sent(row)}; peak {row['peak_bytes_per_device'] / 2**30:.1f} GiB, "
            f"compiled in {row['compile_seconds']:.0f} s",
            flush=True,
        )
    if timing.JSON.value:
        with open(timing.JSON.value, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    timing.run(main)
