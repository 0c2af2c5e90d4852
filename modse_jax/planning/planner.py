"""What a training step needs of hardware that is not there: the real step, compiled for a topology, and counted.

    python train.py --config=configs/modse_300m_x8.py --plan=v5e:4x4,v5p:2x2x4 [--plan_json=FILE] [--config....]

`v5e:4x4` is compiled by libtpu for that many chips; `cpu:8` for as many virtual CPU devices; `gpu:h200x8` is an
estimate: compiled for CPU devices, which hold bfloat16 products in float32 and gather tokens where a GPU would send
rows (moe.exchange), and priced with the GPU's rates.
"""

import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from modse_jax.config import device_mesh
from modse_jax.config.options import Config
from modse_jax.errors import UserError
from modse_jax.model import accounting, kernel_selection
from modse_jax.moe import expert_placement
from modse_jax.planning import hlo_collectives
from modse_jax.runtime import chips, memory_usage, sharding
from modse_jax.training import train_step

KNOWN = (
    "v4:2x2x1 ... v4:8x8x16, v5e:1x1 ... v5e:16x16, v5p:2x2x1 ... v5p:16x16x16, v6e:1x1 ... v6e:16x16, cpu:N, "
    "gpu:a100xN, gpu:b200xN, gpu:h100xN, gpu:h200xN"
)


FIELDS = (
    "topology",
    "devices",
    "mesh",
    "parameter_bytes_per_device",
    "optimizer_bytes_per_device",
    "activation_bytes_per_device",
    "peak_bytes_per_device",
    "fits",
    "flops_per_device",
    "flops_max_over_mean",
    "collective_bytes_by_kind",
    "roofline_step_seconds",
    "roofline_bound_by",
    "compile_seconds",
)


def prepare_environment(topologies: Sequence[str]) -> None:
    """Must run before the first use of a device: no accelerator is touched, CPU devices are as many as asked for."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
        JAX_PLATFORMS="cpu",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_STDERR_LOG_LEVEL="3",
    )
    jax.config.update("jax_platforms", "cpu")
    parsed = [parse(name) for name in topologies]
    jax.config.update(
        "jax_num_cpu_devices", max([count for _, _, count in parsed if count], default=1)
    )


def check(topologies: Sequence[str], path: str) -> None:
    """Raises UserError for a topology that cannot be, or a file that cannot be written, before minutes are spent."""
    for name in topologies:
        parse(name)
    folder = pathlib.Path(path).expanduser().absolute().parent
    if path and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"--plan_json={path} cannot be written: {folder} is not a directory that may be written"
        )


def parse(name: str) -> tuple[str, str, int]:
    """(chip, topology for libtpu or "", number of CPU devices or 0). Raises UserError for names of another form."""
    tpu = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)", name)
    if tpu:
        return tpu.group(1), name, 0
    cpu, gpu = (
        re.fullmatch(r"cpu:([1-9]\d*)", name),
        re.fullmatch(r"gpu:(a100|b200|h100|h200)x([1-9]\d*)", name),
    )
    if cpu:
        return "cpu", "", int(cpu.group(1))
    if gpu:
        return gpu.group(1), "", int(gpu.group(2))
    raise UserError(f"--plan={name!r} is not a topology; known: {KNOWN}")


def plan(config: Config, name: str) -> dict:
    """The row of one topology: FIELDS, as README explains them. Raises UserError where the config's mesh does not fit
    the topology."""
    chip, topology, count = parse(name)
    devices = _tpu_devices(topology) if topology else jax.devices()[:count]
    mesh = device_mesh.build_mesh(config, devices)
    kernel_selection.select_kernels(
        config, mesh, fused=True
    )  # whether XLA's product is, only the device can say
    state = train_step.state_shapes(config, mesh)
    row = dict.fromkeys(FIELDS)
    row.update(
        topology=name,
        devices=mesh.size,
        mesh={a: mesh.shape[a] for a in sharding.AXES},
        parameter_bytes_per_device=_bytes(state.params),
        optimizer_bytes_per_device=_bytes(state.opt_state),
        **_flops(config, mesh),
    )
    start = time.monotonic()
    compiled, text, needed = _compile(config, mesh)
    row["compile_seconds"] = round(time.monotonic() - start, 1)
    if compiled is None:
        row.update(fits=False, peak_bytes_per_device=needed)
        return row
    peak = memory_usage.peak_bytes(compiled)
    sent = hlo_collectives.bytes_by_kind(hlo_collectives.collectives(text))
    capacity = (
        chips.CHIPS[chip].gigabytes * 2**30
        if chip in chips.CHIPS
        else memory_usage.host_memory_bytes() / mesh.size
    )
    row.update(
        activation_bytes_per_device=compiled.memory_analysis().temp_size_in_bytes,
        peak_bytes_per_device=peak,
        fits=bool(peak <= capacity),
        collective_bytes_by_kind=sent,
        **_roofline(config, chip, row, sent),
    )
    return row


def table(rows: Sequence[dict]) -> str:
    """A line per field, a column per topology; under it what to change where it does not fit."""

    def gib(value):
        return (
            "?"
            if value is None
            else f"{value / 2**30:,.2f} GiB"
            if value >= 2**30
            else f"{value / 2**20:,.1f} MiB"
        )

    def one(row):
        sent = row["collective_bytes_by_kind"]
        seconds = row["roofline_step_seconds"]
        return {
            "topology": row["topology"],
            "devices": str(row["devices"]),
            "mesh": " ".join(f"{a}={n}" for a, n in row["mesh"].items()),
            "parameters, per device": gib(row["parameter_bytes_per_device"]),
            "optimiser": gib(row["optimizer_bytes_per_device"]),
            "activations and buffers": gib(row["activation_bytes_per_device"]),
            "peak": gib(row["peak_bytes_per_device"]),
            "fits": "yes" if row["fits"] else "NO",
            "model FLOPs a step": f"{row['flops_per_device']:.3e}",
            "busiest over mean device": f"{row['flops_max_over_mean']:.3f}",
            **{
                f"{kind}, sent": "?" if sent is None else gib(sent.get(kind, 0))
                for kind in hlo_collectives.KINDS
                if any((r["collective_bytes_by_kind"] or {}).get(kind) for r in rows)
            },
            "a step takes at least": "?"
            if seconds is None
            else f"{seconds:.3f} s, {row['roofline_bound_by']}",
            "compiled in": f"{row['compile_seconds']:.0f} s",
        }

    columns = [one(row) for row in rows]
    width = max(len(value) for c in columns for value in c.values()) + 2
    lines = [f"{name:26}" + "".join(f"{c[name]:>{width}}" for c in columns) for name in columns[0]]
    return "\n".join(
        lines + [f"{row['topology']}: {advice(row)}" for row in rows if not row["fits"]]
    )


def advice(row: dict) -> str:
    """What to change in a config whose step does not fit."""
    state = row["parameter_bytes_per_device"] + row["optimizer_bytes_per_device"]
    if row["peak_bytes_per_device"] and state < row["peak_bytes_per_device"] / 2:
        return (
            "most of it is activations: raise training.gradient_accumulation; model.remat=full, and a smaller "
            "training.loss_chunk and moe.saved_activations, help too where they are not set yet"
        )
    return (
        "most of it is parameters and optimiser state: raise mesh.fsdp or mesh.expert, which share them, or take "
        "more devices"
    )


def write_json(rows: Sequence[dict], path: str) -> None:
    """The rows, as a list."""
    pathlib.Path(path).expanduser().write_text(json.dumps(list(rows), indent=2) + "\n")


def _tpu_devices(topology):
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu has no error of its own for this
        text = str(error).splitlines()[0][:200]
        hint = "pip install libtpu" if "libtpu" in text and "open" in text else f"known: {KNOWN}"
        raise UserError(
            f"--plan={topology}: libtpu knows no such topology ({text}); {hint}"
        ) from None


def _bytes(tree):
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


def _flops(config, mesh):
    """Of the model, forward and backward, without recomputation, every expert getting as many tokens as the next."""
    tokens = config.training.batch_size * config.data.sequence_length / mesh.size
    width = accounting.nominal_width(config)
    every = accounting.train_flops_per_token(config, config.data.sequence_length, width) * tokens
    experts = 6 * accounting.active_experts(config, width) * tokens
    busiest = expert_placement.straggler_factor(
        [1] * len(config.widths), device_mesh.place_experts_on_mesh(config, mesh)
    )
    return {"flops_per_device": every, "flops_max_over_mean": 1 + experts * (busiest - 1) / every}


def _compile(config, mesh):
    """(compiled step, its HLO, None), or (None, "", bytes it would have needed) where the compiler finds too little
    memory."""
    try:
        if mesh.devices.flat[0].platform == "cpu":
            compiled = train_step.compile_train_step(config, mesh)
            return compiled, compiled.as_text(), None
        # jaxlib cannot read back all that libtpu writes, so libtpu itself prints what it made.
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = train_step.compile_train_step(config, mesh, options)
            (file,) = pathlib.Path(folder).glob("*.jit_step.*after_optimizations.txt")
            return compiled, file.read_text(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])", str(error))
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        return None, "", float(used.group(1)) * units[used.group(2)] if used else None


def _roofline(config, chip, row, sent):
    """The longest of three times that no step can beat: products at the peak rate; what is sent at the rate of all
    links together; the state read and written once, and the weights read thrice per micro-batch."""
    if chip not in chips.CHIPS:
        return {"roofline_step_seconds": None, "roofline_bound_by": None}
    rates = chips.CHIPS[chip]
    weights = row["parameter_bytes_per_device"] * (0.5 if config.model.dtype == "bfloat16" else 1)
    moved = (
        2 * (row["parameter_bytes_per_device"] + row["optimizer_bytes_per_device"])
        + 3 * config.training.gradient_accumulation * weights
    )
    seconds = {
        "products": row["flops_per_device"] * row["flops_max_over_mean"] / (rates.teraflops * 1e12),
        "collectives": sum(sent.values()) / (rates.link_terabytes * 1e12),
        "memory": moved / (rates.terabytes * 1e12),
    }
    bound = max(seconds, key=seconds.get)
    return {"roofline_step_seconds": seconds[bound], "roofline_bound_by": bound}
