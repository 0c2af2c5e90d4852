"""Plans a training step for hardware that is not there: compiles the real step for a topology and counts.

    python train.py --config=configs/modse_300m_x8.py --plan=v5e:4x4,gpu:h100x8 [--plan_json=FILE] [--config....]

A topology is one of

    v5e:4x4        a TPU slice, compiled by libtpu
    gpu:h100x8     one host with 8 GPUs (gpu:h100 is one GPU), compiled by XLA's CUDA plugin (modse_jax.gpu_compiler)
    gpu:h100:2x8   2 hosts with 8 GPUs each, joined by a network (chips.Chip.network_terabytes)
    cpu:8          as many virtual CPU devices
"""
import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from modse_jax import chips, gpu_compiler
from modse_jax import mesh as meshes
from modse_jax.config import Config, UserError
from modse_jax.model import accounting, transformer
from modse_jax.moe import sizing
from modse_jax.training import collectives
from modse_jax.training import step as steps

MOST_GPUS_PER_HOST = 8    # that NVLink joins in the machines of gpu_compiler.GPU_TARGETS
GPUS = ", ".join(f"gpu:{gpu}" for gpu in gpu_compiler.GPU_TARGETS)
KNOWN = ("v4:2x2x1 ... v4:8x8x16, v5e:1x1 ... v5e:16x16, v5p:2x2x1 ... v5p:16x16x16, v6e:1x1 ... v6e:16x16, cpu:N, "
         f"and {GPUS}, each alone, with xN for N devices of one host, or with :HOSTSxN (gpu:h100:2x8)")
FIELDS = ("topology", "devices", "hosts", "mesh", "moe_backend", "attention", "parameter_bytes_per_device",
          "optimizer_bytes_per_device", "activation_bytes_per_device", "peak_bytes_per_device",
          "capacity_bytes_per_device", "fits", "flops_per_device", "flops_max_over_mean", "collective_bytes_by_kind",
          "collective_bytes_between_hosts", "unknown_collectives", "kernels", "graph_launches", "host_waits",
          "open_loops", "roofline_step_seconds", "roofline_bound_by", "compile_seconds", "notes")


class Topology(NamedTuple):
    name: str
    kind: str        # "tpu", "gpu" or "cpu"
    chip: str        # its name in chips.CHIPS, or "cpu"
    hosts: int       # 1 for a TPU slice, whose links join its hosts, too
    per_host: int    # devices; 0 for a TPU slice


def prepare_environment(topologies: Sequence[str]) -> None:
    """Must run before the first use of a device: no accelerator is touched, CPU devices are as many as asked for."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true", JAX_PLATFORMS="cpu",
                      TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_STDERR_LOG_LEVEL="3")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)    # of a program found there XLA writes no text to count
    parsed = [parse(name) for name in topologies]
    jax.config.update("jax_num_cpu_devices", max([t.per_host for t in parsed if t.kind == "cpu"], default=1))
    if any(t.kind == "gpu" for t in parsed):
        # XLA warns of everything that it would do better if it had a GPU. What fails is raised as well as written.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        gpu_compiler.load_compiler()


def check(topologies: Sequence[str], path: str) -> None:
    """Raises UserError for a topology that cannot be, or a file that cannot be written, before minutes are spent."""
    if any([parse(name).kind == "gpu" for name in topologies]):
        gpu_compiler.find_compiler()
    folder = pathlib.Path(path).expanduser().absolute().parent
    if path and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--plan_json={path} cannot be written: {folder} is not a directory that may be written")


def parse(name: str) -> Topology:
    """Raises UserError for a name that the module's docstring does not have."""
    tpu = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)", name)
    if tpu:
        return Topology(name, "tpu", tpu.group(1), 1, 0)
    cpu = re.fullmatch(r"cpu:([1-9]\d*)", name)
    if cpu:
        return Topology(name, "cpu", "cpu", 1, int(cpu.group(1)))
    gpu = re.fullmatch(r"gpu:(\w+?)(?:x([1-9]\d*)|:([1-9]\d*)x([1-9]\d*))?", name)
    if not gpu or gpu.group(1) not in gpu_compiler.GPU_TARGETS:
        raise UserError(f"--plan={name!r} is not a topology; known: {KNOWN}")
    topology = Topology(name, "gpu", gpu.group(1), int(gpu.group(3) or 1), int(gpu.group(4) or gpu.group(2) or 1))
    if topology.per_host > MOST_GPUS_PER_HOST:
        raise UserError(f"--plan={name!r} has {topology.per_host} GPUs on a host, which can have at most "
                        f"{MOST_GPUS_PER_HOST}; write gpu:{topology.chip}:HOSTSxN for several hosts")
    return topology


def plan(config: Config, name: str) -> dict:
    """The row of one topology: FIELDS, as README explains them. Raises UserError where the config's mesh does not fit
    the topology."""
    topology = parse(name)
    mesh = meshes.build(config, _devices(topology))
    with gpu_compiler.assume_cudnn():    # it will be there on the GPUs that are planned for
        kernels = transformer.kernels(config, mesh)
    state = steps.abstract_state(config, mesh)
    row = dict.fromkeys(FIELDS)
    row.update(topology=name, devices=mesh.size, hosts=topology.hosts, mesh={a: mesh.shape[a] for a in meshes.AXES},
               moe_backend=kernels.experts, attention=kernels.attention,
               parameter_bytes_per_device=_bytes(state.params), optimizer_bytes_per_device=_bytes(state.opt_state),
               capacity_bytes_per_device=chips.CHIPS[topology.chip].gigabytes * 2**30 if topology.chip in chips.CHIPS
               else _host_memory() / mesh.size, **_flops(config, mesh), notes=[])
    if kernels.note:
        row["notes"].append(f"moe.backend is {kernels.experts}: {kernels.note}")
    start = time.monotonic()
    built = _compile(config, mesh, topology)
    row["compile_seconds"] = round(time.monotonic() - start, 1)
    if built.memory is None:
        row.update(fits=False, peak_bytes_per_device=built.needed)
        return row
    peak = built.memory.argument_size_in_bytes + built.memory.temp_size_in_bytes \
        + built.memory.output_size_in_bytes - built.memory.alias_size_in_bytes
    row.update(activation_bytes_per_device=built.memory.temp_size_in_bytes, peak_bytes_per_device=peak,
               fits=bool(peak <= row["capacity_bytes_per_device"]))
    found, row["unknown_collectives"] = collectives.read(built.hlo)
    row["notes"] += [f"collectives are counted too low, because one was not understood: {why}"
                     for why in row["unknown_collectives"]]
    sent = collectives.bytes_by_kind(found)
    outside = collectives.bytes_between_hosts(found, topology.per_host) if topology.hosts > 1 else 0.0
    row.update(collective_bytes_by_kind=sent, collective_bytes_between_hosts=outside,
               **_roofline(config, topology.chip, row, sum(sent.values()) - outside, outside))
    if topology.kind == "gpu":
        _add_launches(row, built.launches)
        row["notes"] += _gpu_notes(kernels, found, topology)
    return row


def _add_launches(row, launches):
    """What the host does in a step; None in all fields where it is not known."""
    if launches is None:
        row["notes"].append("kernels are not counted: XLA wrote no list of what it launches")
        return
    row.update(kernels=launches.kernels, graph_launches=launches.graphs, host_waits=launches.host_waits,
               open_loops=launches.open_loops)
    if launches.open_loops:
        row["notes"].append(
            f"the ends of {launches.open_loops} loops outside CUDA graphs are data: kernels, graph launches and host "
            f"waits are for {launches.iterations:g} iteration(s) of each, at every level of nesting")


def _gpu_notes(kernels, found, topology):
    if kernels.attention == "cudnn":
        yield "the workspace of cuDNN's attention is not in the peak: only a GPU can say how large it is"
    if any(c.kind == "ragged-all-to-all" and any(len({d // topology.per_host for d in group}) > 1
                                                 for group in c.groups) for c in found):
        yield ("a ragged all-to-all crosses hosts, which XLA may refuse when it runs; choose a mesh.expert whose "
               "devices share a host, or moe.exchange=gather")


def table(rows: Sequence[dict]) -> str:
    """A line per field, a column per topology; under it the notes, and what to change where it does not fit."""
    def gib(value):
        return "?" if value is None else f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"

    def count(value):
        return "?" if value is None else f"{value:,.0f}"

    def one(row):
        sent = row["collective_bytes_by_kind"]
        seconds = row["roofline_step_seconds"]
        cells = {
            "topology": row["topology"], "devices": str(row["devices"]),
            "mesh": " ".join(f"{a}={n}" for a, n in row["mesh"].items()),
            "moe.backend": row["moe_backend"], "attention": row["attention"],
            "parameters per device": gib(row["parameter_bytes_per_device"]),
            "optimizer state": gib(row["optimizer_bytes_per_device"]),
            "activations and buffers": gib(row["activation_bytes_per_device"]),
            "peak": gib(row["peak_bytes_per_device"]), "capacity": gib(row["capacity_bytes_per_device"]),
            "fits": "yes" if row["fits"] else "NO",
            "model FLOPs per step": f"{row['flops_per_device']:.3e}",
            "FLOPs, max/mean device": f"{row['flops_max_over_mean']:.3f}",
            **{f"{kind} bytes": "?" if sent is None else gib(sent.get(kind, 0)) for kind in collectives.KINDS
               if any((r["collective_bytes_by_kind"] or {}).get(kind) for r in rows)}}
        if any(r["hosts"] > 1 for r in rows):
            cells["bytes between hosts"] = gib(row["collective_bytes_between_hosts"])
        if any(r["unknown_collectives"] for r in rows):
            cells["collectives not counted"] = "?" if sent is None else count(len(row["unknown_collectives"]))
        if any(r["topology"].startswith("gpu:") for r in rows):
            cells |= {"kernels": count(row["kernels"]), "CUDA graph launches": count(row["graph_launches"]),
                      "host waits": count(row["host_waits"])}
        return cells | {
            "a step takes at least": "?" if seconds is None else f"{seconds:.3f} s, {row['roofline_bound_by']}",
            "compiled in": f"{row['compile_seconds']:.0f} s"}

    columns = [one(row) for row in rows]
    width = max(len(value) for c in columns for value in c.values()) + 2
    lines = [f"{name:26}" + "".join(f"{c[name]:>{width}}" for c in columns) for name in columns[0]]
    lines += [f"{row['topology']}: {note}" for row in rows for note in row["notes"]]
    return "\n".join(lines + [f"{row['topology']}: {advice(row)}" for row in rows if not row["fits"]])


def advice(row: dict) -> str:
    """What to change in a config whose step does not fit."""
    state = row["parameter_bytes_per_device"] + row["optimizer_bytes_per_device"]
    if row["peak_bytes_per_device"] and state < row["peak_bytes_per_device"] / 2:
        return ("most of it is activations: raise training.gradient_accumulation; model.remat=full, and a smaller "
                "training.loss_chunk and moe.saved_activations, help too where they are not set yet")
    return ("most of it is parameters and optimizer state: raise mesh.fsdp or mesh.expert, which share them, or take "
            "more devices")


def write_json(rows: Sequence[dict], path: str) -> None:
    """The rows, as a list."""
    pathlib.Path(path).expanduser().write_text(json.dumps(list(rows), indent=2) + "\n")


def _devices(topology):
    if topology.kind == "gpu":
        return gpu_compiler.describe_topology(topology.chip, topology.hosts, topology.per_host)
    return _tpu_devices(topology.name) if topology.kind == "tpu" else jax.devices()[:topology.per_host]


def _tpu_devices(topology):
    from jax.experimental import topologies
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:    # libtpu has no error of its own for this
        text = str(error).splitlines()[0][:200]
        hint = "pip install libtpu" if "libtpu" in text and "open" in text else f"known: {KNOWN}"
        raise UserError(f"--plan={topology}: libtpu knows no such topology ({text}); {hint}") from None


def _bytes(tree):
    return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _flops(config, mesh):
    """Of the model, forward and backward, without recomputation, every expert getting as many tokens as the next."""
    tokens = config.training.batch_size * config.data.sequence_length / mesh.size
    width = accounting.nominal_width(config)
    every = accounting.train_flops_per_token(config, config.data.sequence_length, width) * tokens
    experts = 6 * accounting.active_experts(config, width) * tokens
    busiest = sizing.straggler([1] * len(config.widths), meshes.placement(config, mesh))
    return {"flops_per_device": every, "flops_max_over_mean": 1 + experts * (busiest - 1) / every}


class _Built(NamedTuple):
    memory: object = None                              # memory_analysis(); None where too little memory was found
    hlo: str = ""
    needed: float | None = None                        # bytes, where there are too few and the compiler says how many
    launches: gpu_compiler.Launches | None = None      # on a GPU


def _compile(config, mesh, topology):
    """The compiled step, as _Built. Raises UserError where a GPU's compiler fails."""
    if topology.kind == "cpu":
        compiled = steps.compiled(config, mesh)
        return _Built(compiled.memory_analysis(), compiled.as_text())
    with tempfile.TemporaryDirectory() as folder:
        if topology.kind == "gpu":
            return _compile_for_gpu(config, mesh, topology, folder)
        return _compile_for_tpu(config, mesh, folder)


def _compile_for_gpu(config, mesh, topology, folder):
    try:
        with gpu_compiler.assume_cudnn():
            compiled = steps.compiled(config, mesh, gpu_compiler.compile_options(config.training.deterministic, folder))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--plan={topology.name}: XLA cannot compile the step ({str(error).splitlines()[0][:300]}); "
                        "choose another moe.backend or model.attention") from None
    try:
        launches = gpu_compiler.read_launches(folder)
    except FileNotFoundError:
        launches = None
    return _Built(compiled.memory_analysis(), compiled.as_text(), None, launches)


def _compile_for_tpu(config, mesh, folder):
    try:
        # jaxlib cannot read back all that libtpu writes, so libtpu itself prints what it made.
        compiled = steps.compiled(config, mesh, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])", str(error))
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        return _Built(needed=float(used.group(1)) * units[used.group(2)] if used else None)
    file, = pathlib.Path(folder).glob("*.jit_step.*after_optimizations.txt")
    return _Built(compiled.memory_analysis(), file.read_text())


def _roofline(config, chip, row, inside, outside):
    """The longest of four times that no step can beat: matmuls at the peak rate; what is sent `inside` hosts at the
    rate of all links together; what is sent `outside` at the rate of the network; the state read and written once,
    and the weights read three times per micro-batch."""
    if chip not in chips.CHIPS:
        return {"roofline_step_seconds": None, "roofline_bound_by": None}
    rates = chips.CHIPS[chip]
    weights = row["parameter_bytes_per_device"] * (0.5 if config.model.dtype == "bfloat16" else 1)
    moved = 2 * (row["parameter_bytes_per_device"] + row["optimizer_bytes_per_device"]) \
        + 3 * config.training.gradient_accumulation * weights
    seconds = {"products": row["flops_per_device"] * row["flops_max_over_mean"] / (rates.teraflops * 1e12),
               "collectives": inside / (rates.link_terabytes * 1e12),
               "memory": moved / (rates.terabytes * 1e12)}
    if outside:
        seconds["network"] = outside / (rates.network_terabytes * 1e12)
    bound = max(seconds, key=seconds.get)
    return {"roofline_step_seconds": seconds[bound], "roofline_bound_by": bound}


def _host_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
