"""Compiles kernels and training steps for GPUs that are not attached, and reports on the result.

    python -m benchmarks.gpu_report [--json=FILE] [--cases=WORDS,...] [--list]

Nothing is timed. `--cases="kernels h100,step blocked"` selects the cases whose names contain all
words of one of the items. Every case runs in a separate process, and the file is written again
after each.

It needs XLA's CUDA compiler (modse_jax/planning/gpu_compiler.py has the command that installs it),
and ptxas and libdevice, which are in a CUDA installation and in the packages nvidia-cuda-nvcc and
nvidia-nvvm.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accelerator import phases
from modse_jax.config import device_mesh
from modse_jax.errors import UserError
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import select
from modse_jax.planning import gpu_compiler
from modse_jax.study import arms
from modse_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[1]


class ExpertLayer(NamedTuple):
    """The sizes of an expert layer."""

    dim: int
    widths: tuple[int, ...]


def _paper_layer(dim: int) -> ExpertLayer:
    return ExpertLayer(dim, expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, dim))


def _study_layer(size: str, num_experts: int, granularity: Fraction) -> ExpertLayer:
    config = arms.build_mixture(size, num_experts, granularity)
    return ExpertLayer(config.model.dim, config.widths)


# The models of MoDSE, and an arm of Slicing and Dicing with narrow experts, top-32.
LAYERS = {
    "300Mx8": _paper_layer(1536),
    "700Mx8": _paper_layer(2048),
    "80M_n256_k32": _study_layer("80M", 256, Fraction(1, 32)),
}

ROUTED = 131_072  # tokens

ATTENTIONS = ("cudnn", "blocks")

LOG = "ptxas.log"  # the error output of the process that compiles a case

# XLA logs the report of ptxas on each kernel only if these source files have this log level.
LOG_LEVELS = "subprocess_compilation=5,ptx_compiler_impl=5,nvjitlink_impl=5"

VERBOSE_PTXAS = {"xla_gpu_ptx_compiler_extra_flags": "-v"}

MATMUL = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")

TENSOR_LOAD = re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.shared")

TENSOR_STORE = re.compile(r"\bcp\.async\.bulk\.tensor\.\dd\.global")

ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared")


class KernelFacts(NamedTuple):
    """Facts about one compiled kernel. None: the dump does not contain the number."""

    name: str
    target: str  # the architecture: sm_90a
    registers: int | None  # of a thread
    spill_bytes: int | None  # stores and loads, of a thread
    stack_bytes: int | None
    shared_memory_bytes: int | None  # static and dynamic, of a block
    matmuls: dict[str, int]  # matmul instructions of the PTX, with their number
    tensor_loads: int  # bulk tensor copies (TMA) into shared memory
    tensor_stores: int
    async_copies: int  # cp.async


class Case(NamedTuple):
    """One program that is compiled."""

    # "kernels": one layer's forward and backward pass; "kernels-once": the output and the gradient
    # of w_down, which need each kind of kernel; "step": a training step
    kind: str
    backend: str
    gpu: str
    model: str  # of LAYERS
    attention: str = ""  # of a step

    @property
    def name(self) -> str:
        return " ".join(word for word in self if word)


# ---- reading a dump ----


def kernel_facts(folder: str | os.PathLike) -> list[KernelFacts]:
    """Returns the kernels with matmul instructions among those dumped into a folder.

    Mosaic GPU kernels come from MOSAIC_GPU_DUMP_TO, Triton kernels from --xla_dump_to together with
    the process's error output in the file LOG (compile_kernels).
    """
    folder = pathlib.Path(folder)
    log = folder / LOG
    of_xla = read_ptxas(log.read_text(errors="replace")) if log.exists() else {}
    shared = _read_shared_memory(folder)
    facts = []
    for path in sorted(folder.glob("*.ptx"), key=_in_order_of_numbers):
        text = path.read_text()
        own_report = path.with_suffix(".ptxas")  # Mosaic GPU: a file a kernel
        resources = read_ptxas(own_report.read_text()) if own_report.exists() else of_xla
        for entry, body in _split_entries(text):
            matmuls = collections.Counter(MATMUL.findall(body))
            if not matmuls:
                continue
            name = path.stem if own_report.exists() else entry
            found = resources.get(entry, {})
            dynamic = shared.get(name)
            static = found.get("shared_memory_bytes", 0)
            facts.append(
                KernelFacts(
                    name=name,
                    target=_first(r"\.target\s+(\w+)", text) or "",
                    registers=found.get("registers"),
                    spill_bytes=found.get("spill_bytes"),
                    stack_bytes=found.get("stack_bytes"),
                    shared_memory_bytes=None if dynamic is None else dynamic + static,
                    matmuls=dict(matmuls),
                    tensor_loads=len(TENSOR_LOAD.findall(body)),
                    tensor_stores=len(TENSOR_STORE.findall(body)),
                    async_copies=len(ASYNC_COPY.findall(body)),
                )
            )
    return facts


def read_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Returns the resources of every kernel in a report of `ptxas -v`, by entry function."""
    found = {}
    pieces = re.split(r"Compiling entry function '(\w+)'", text)
    for entry, report in zip(pieces[1::2], pieces[2::2]):
        registers = _first(r"Used (\d+) registers", report)
        if registers is None:
            continue
        found[entry] = {
            "registers": int(registers),
            "stack_bytes": int(_first(r"(\d+) bytes stack frame", report) or 0),
            "spill_bytes": int(_first(r"(\d+) bytes spill stores", report) or 0)
            + int(_first(r"(\d+) bytes spill loads", report) or 0),
            "shared_memory_bytes": int(_first(r"(\d+) bytes smem", report) or 0),
        }
    return found


def largest_sort(hlo: str) -> int:
    """Returns the number of elements of the largest array that an optimized program sorts."""
    sizes = [0]
    for result in re.findall(r"= (.*?) sort\(", hlo):
        for shape in re.findall(r"\w\[([\d,]*)\]", result):
            sizes.append(int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)))
    return max(sizes)


def _read_shared_memory(folder: pathlib.Path) -> dict[str, int]:
    """Returns the dynamic shared memory of kernels, in bytes.

    XLA's list of launches has it for Triton kernels, the intermediate code for Mosaic kernels.
    """
    sizes: dict[str, int] = {}
    for path in folder.glob("*thunk_sequence*.txt"):
        for name, size in re.findall(
            r"kCustomKernel.*?\] +(\w+) grid:.*shared_memory: (\d+) bytes", path.read_text()
        ):
            sizes[name] = max(int(size), sizes.get(name, 0))
    for path in folder.glob("*.mlir-passes.log"):
        with path.open() as file:
            for line in file:  # the files are large, and the first launch suffices
                size = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", line)
                if size:
                    sizes[path.name.split(".")[0]] = int(size.group(1))
                    break
    return sizes


def _split_entries(text: str) -> Iterator[tuple[str, str]]:
    pieces = re.split(r"\.entry\s+(\w+)\s*\(", text)
    yield from zip(pieces[1::2], pieces[2::2])


def _in_order_of_numbers(path: pathlib.Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


# ---- compiling ----


def list_cases() -> list[Case]:
    """Returns every case: kernels first, then steps of 300Mx8."""
    kernels, step_cases = [], []
    for gpu in ("h100", "h200", "a100", "b200"):
        backends = [backend for backend in select.KERNELS if _takes(backend, gpu)]
        for backend in backends:
            kernels += [Case("kernels", backend, gpu, model) for model in LAYERS]
        for attention in ATTENTIONS:
            for backend in [*backends, "blocked"]:
                step_cases.append(Case("step", backend, gpu, "300Mx8", attention))
    return kernels + step_cases


def _takes(backend: str, gpu: str) -> bool:
    layer = LAYERS["300Mx8"]
    try:
        select.KERNELS[backend].tiles_for(layer.widths, layer.dim, gpu, "bfloat16")
    except ValueError:
        return False
    return True


def compile_case(case: Case, folder: str | os.PathLike, limit_seconds: float = 600) -> dict:
    """Compiles a case in a separate process, which dumps into an empty folder.

    Returns:
        The row of the report. It has the key "error" if the case did not compile.
    """
    folder = pathlib.Path(folder).absolute()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": LOG_LEVELS,
    }
    row = dict(case._asdict())
    with (folder / LOG).open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu_report", "--compile", case.name, folder],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=limit_seconds,
            )
        except subprocess.TimeoutExpired:
            return row | {"error": f"not compiled within {limit_seconds:.0f} seconds"}
    if done.returncode:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
        return row | {"error": lines[-1][:600] if lines else f"exit code {done.returncode}"}
    row |= json.loads(done.stdout.splitlines()[-1])
    row["kernels"] = [facts._asdict() for facts in kernel_facts(folder)]
    if case.kind == "step":
        row["launches"] = gpu_compiler.read_launches(folder)._asdict()
    return row


def _compile_here(case: Case, folder: str) -> dict:
    """Compiles a case in this process."""
    devices = gpu_compiler.describe_topology(case.gpu)
    options = {**gpu_compiler.compile_options(dump_to=folder), **VERBOSE_PTXAS}
    start = time.perf_counter()
    if case.kind != "step":
        compiled = _lower_kernels(case, devices).compile(compiler_options=options)
    else:
        config = phases.step_config(
            case.backend, case.attention, True, equal_widths=False, tiny=False, devices=1
        )
        mesh = device_mesh.build_mesh(config, devices)
        options["xla_gpu_deterministic_ops"] = True
        with gpu_compiler.assume_cudnn():
            compiled = train_step.compile_train_step(config, mesh, options)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "compile_seconds": round(seconds, 1),
        "argument_gib": _gib(memory.argument_size_in_bytes),
        "temporary_gib": _gib(memory.temp_size_in_bytes),
        "peak_gib": _gib(peak),
        "largest_sort": largest_sort(compiled.as_text()),
    }


def _gib(size: int) -> float:
    return round(size / 2**30, 3)


def _lower_kernels(case: Case, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Lowers one expert layer's forward and backward pass."""
    dim, widths = LAYERS[case.model]
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placement = expert_placement.place_experts(widths, 1, "whole")
    job = select.checked_tiles(case.backend, placement, (ROUTED, dim), case.gpu, "bfloat16")

    def describe(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(x_ND: jax.Array, rows_E: jax.Array, weights: tuple, dy_ND: jax.Array) -> tuple:
        def forward(x_ND: jax.Array, weights: tuple) -> jax.Array:
            return select.run_kernels(
                case.backend, x_ND, rows_E, weights, jnp.int32(0), placement, job
            )

        y_ND, pull = jax.vjp(forward, x_ND, weights)
        dx_ND, dw = pull(dy_ND)
        if case.kind == "kernels-once":
            return y_ND, dw[-1]
        return y_ND, dx_ND, dw

    hidden = sum(widths)
    weights = describe(dim, hidden), describe(dim, hidden), describe(hidden, dim)
    x_ND, rows_E = describe(ROUTED, dim), describe(len(widths), dtype="int32")
    # Pallas Triton asks which GPU it compiles for, from jax 0.11 on.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(run).lower(x_ND, rows_E, weights, describe(ROUTED, dim))


# ---- the report ----


def select_cases(cases: Sequence[Case], wanted: str | None) -> list[Case]:
    """Returns the cases whose names contain all words of an item of --cases, item by item.

    Raises:
        UserError: there are none.
    """
    if wanted is None:
        return list(cases)
    chosen: list[Case] = []
    for item in wanted.split(","):
        words = set(item.split())
        chosen += [case for case in cases if words and words <= set(case) and case not in chosen]
    if not chosen:
        raise UserError(
            f"--cases={wanted!r} selects nothing; each item is some words of one of: "
            + "; ".join(case.name for case in cases)
        )
    return chosen


def format_table(rows: Sequence[dict]) -> str:
    """Returns one line for each kernel and for each step."""
    lines = []
    for row in rows:
        case = Case(*(row[field] for field in Case._fields))
        if "error" in row:
            lines.append(f"{case.name}: {row['error']}")
            continue
        line = (
            f"{case.name}: compiled in {row['compile_seconds']} s, arguments {row['argument_gib']} "
            f"GiB, temporary {row['temporary_gib']} GiB, peak {row['peak_gib']} GiB"
        )
        if case.kind == "step":
            launches = row["launches"]
            line += (
                f", {launches['kernels']:.0f} kernels, {launches['graphs']:.0f} graph launches, "
                f"{launches['host_waits']:.0f} host waits, largest sort {row['largest_sort']:,}"
            )
        lines.append(line)
        for kernel in row["kernels"] if case.kind == "kernels" else []:
            matmuls = ", ".join(f"{count} {name}" for name, count in kernel["matmuls"].items())
            lines.append(
                f"    {kernel['name']:20} {kernel['target']}: {kernel['registers']} registers, "
                f"{kernel['spill_bytes']} bytes spilled, {kernel['shared_memory_bytes']} bytes of "
                f"shared memory, {kernel['tensor_loads']} tensor loads, {kernel['tensor_stores']} "
                f"tensor stores, {kernel['async_copies']} asynchronous copies; {matmuls}"
            )
    return "\n".join(lines)


def _write(path: str | None, rows: Sequence[dict]) -> None:
    if path is None:
        return
    note = (
        "Compiled without a GPU; nothing was timed. Compile times are of a machine that was busy. "
        "Steps: batch 16 x 4,096 tokens, deterministic, Triton matmuls off; cuDNN's workspaces are "
        "not in the memory. Loops whose end is data count as one iteration."
    )
    report = {"jax": jax.__version__, "note": note, "rows": rows}
    pathlib.Path(path).write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_report")
    parser.add_argument("--json", help="write the rows there, after every case")
    parser.add_argument("--cases", help="only these: words of their names, with commas")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--compile", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
    cases = list_cases()
    try:
        if options.list:
            print("\n".join(case.name for case in cases))
            return 0
        if options.compile:
            name, folder = options.compile
            print(json.dumps(_compile_here(Case(*name.split()), folder)))
            return 0
        chosen = select_cases(cases, options.cases)
        gpu_compiler.find_compiler()
        rows = []
        for case in chosen:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compile_case(case, folder))
            print(format_table(rows[-1:]), flush=True)
            _write(options.json, rows)
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
