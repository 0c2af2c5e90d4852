"""The measurements: one function for each phase, which runs in a separate process.

    python -m benchmarks.accelerator.phases '{"kind": ..., "name": ..., ...}'

is how __main__.py starts one. This module imports only jax, flax, optax, orbax-checkpoint,
ml-collections and their dependencies.

Legend: N routed tokens, D model width, H hidden units of all experts, W hidden units of one expert.
"""

import functools
import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import expert_ffn, timing
from benchmarks.accelerator import reference, results
from modse_jax.config import device_mesh, loading, options
from modse_jax.model import accounting
from modse_jax.moe import expert_placement, expert_widths
from modse_jax.moe.experts import block_sizes, select
from modse_jax.runtime import chips, sharding
from modse_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[2]

DTYPE = "bfloat16"

TOP_KERNELS = 12  # of a profile

# The backends whose kernels jax interprets on a CPU with interpret=True, for --tiny: (the chip
# whose tiles they use, its interpret argument).
INTERPRETED = {"pallas_tpu": "v5e", "pallas_triton": "h100"}


class Layer(NamedTuple):
    """The sizes of an expert layer and of a routing."""

    dim: int
    widths: tuple[int, ...]
    rows: tuple[int, ...]  # routed tokens of each expert

    @property
    def forward_flops(self) -> float:
        """FLOPs of the three matmuls; the backward pass has twice as many."""
        return 6.0 * self.dim * float(np.dot(self.rows, self.widths))


# Unequal widths and an empty expert; experts that begin and end inside row tiles of up to 512.
SMALL = Layer(256, (768, 256, 512, 512, 256, 768, 256, 512), (0, 7, 1413, 512, 1, 129, 64, 300))


TINY_PAIRS = ((3.0, 1.0), (2.0, 2.0))  # of --tiny: fewer different widths, fewer loops to compile


TINY = Layer(128, (256, 128, 128), (30, 0, 523))


def measure_facts(write: Callable, tiny: bool, devices: int) -> None:
    """Records the machine, the versions of packages, and the kernel backends that support it."""
    device = jax.devices()[0]
    chip = chips.chip_name(device)
    widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)
    backends, refused = [], {}
    for backend, module in select.KERNELS.items():
        try:
            module.tiles_for(widths, 1536, chip, DTYPE)
            backends.append(backend)
        except ValueError as error:
            refused[backend] = str(error)
    if tiny and not backends:
        backends = [backend for backend in INTERPRETED if backend in select.KERNELS]
    smi = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,clocks.mem,power.limit"
    write(
        chip=chip,
        device_kind=device.device_kind,
        devices=len(jax.devices()),
        cores=getattr(device, "core_count", None),
        memory_gib=_gib((device.memory_stats() or {}).get("bytes_limit")),
        platform_version=device.client.platform_version,
        backends=backends,
        refused=refused,
        nvidia_smi=_run(["nvidia-smi", f"--query-gpu={smi}", "--format=csv"]),
        host_cores=os.cpu_count(),
        python=sys.version.split()[0],
        versions=_versions("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin")
        | _versions("jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
        revision=_run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        modified_files=_run(["git", "-C", str(ROOT), "status", "--porcelain"]),
        source_digest=digest_source(),
    )


def digest_source() -> str:
    """Returns a digest of the measured code, which identifies it if git is not available."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "configs", "modse_jax"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _round(number: float) -> float:
    return float(f"{number:.4g}")


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


def check_kernels(write: Callable, tiny: bool, devices: int, backend: str) -> None:
    """Compares a backend's outputs and gradients with float64 numpy, and two runs bit by bit.

    Padding rows hold NaN, in the inputs and in the output's gradient. If an array is wrong, the
    result names the expert, and the rows and columns in its part of the array.
    """
    cases = {"tiny": TINY}
    if not tiny:
        rows = (530, 7, 0, 700, *range(1, 5))  # the widest expert has more than a row tile
        widths = expert_widths.widths_from_ratio_pairs(expert_widths.PAPER_PAIRS, 1536)
        cases = {"small": SMALL, "300Mx8 widths": Layer(1536, widths, rows)}
    for case, layer in cases.items():
        start = time.perf_counter()
        wrong, errors, same_bits = compare_with_reference(backend, layer)
        write(
            backend=backend,
            case=case,
            correct=not wrong,
            same_bits=same_bits,
            errors=errors,
            wrong=wrong,
            seconds=round(time.perf_counter() - start, 1),
        )
    if not tiny:
        # The check that a training run makes before its first step.
        placement = expert_placement.place_experts(cases["300Mx8 widths"].widths, 1, "whole")
        try:
            select.self_test_kernels(backend, placement, 1536, sharding.chip_name(None), DTYPE)
            write(backend=backend, case="check of a training run", correct=True)
        except RuntimeError as error:
            write(backend=backend, case="check of a training run", correct=False, wrong=str(error))


def compare_with_reference(backend: str, layer: Layer) -> tuple[list[dict], dict, bool]:
    """Runs a backend's kernels twice on random tokens of a layer.

    Returns:
        The faults by array and expert (see reference.find_faults), the relative error of each
        array, and whether both runs gave the same bits.
    """
    inputs = reference.random_inputs(layer.dim, layer.widths, layer.rows, DTYPE)
    placement = expert_placement.place_experts(layer.widths, 1, "whole")
    interpret = jax.devices()[0].platform == "cpu"
    chip = INTERPRETED[backend] if interpret else sharding.chip_name(None)
    shape = (sum(layer.rows), layer.dim)
    job = select.checked_tiles(backend, placement, shape, chip, DTYPE)

    @jax.jit
    def run(x_ND, weights, dy_ND):
        def forward(x_ND, weights):
            rows = jnp.asarray(layer.rows, jnp.int32)
            return select.run_kernels(
                backend, x_ND, rows, weights, jnp.int32(0), placement, job, interpret
            )

        y_ND, pull = jax.vjp(forward, x_ND, weights)
        dx_ND, gradients = pull(dy_ND)
        return dict(zip(reference.ARRAYS, (y_ND, dx_ND, *gradients)))

    first, second = (jax.device_get(run(*inputs)) for _ in range(2))
    same_bits = all(a.tobytes() == b.tobytes() for a, b in zip(first.values(), second.values()))
    wanted = reference.run_layer(*inputs, layer.widths, layer.rows)
    faults = reference.find_faults(first, wanted, layer.widths, layer.rows)
    return faults, reference.relative_errors(first, wanted), same_bits


def time_layer(write: Callable, tiny: bool, devices: int, backend: str) -> None:
    """Times one expert layer, beside dense matmuls of the same FLOPs.

    The cases are MoDSE's widths and equal widths of the same sum, with the same routing.
    """
    dim, routed, pairs = (
        (32, 256, TINY_PAIRS) if tiny else (1536, 131_072, expert_widths.PAPER_PAIRS)
    )
    widths = expert_widths.widths_from_ratio_pairs(pairs, dim)
    experts = len(widths)
    rows = np.random.default_rng(0).multinomial(routed, np.full(experts, 1 / experts))
    modse = Layer(dim, widths, tuple(rows))
    equal = modse._replace(widths=expert_widths.equal_widths(experts, sum(widths) // experts))
    values = importlib.import_module("configs.modse_300m_x8").get_config().advanced
    blocks = block_sizes.Blocks(values.block_rows, values.tail_rows, values.saved_activations)
    if tiny:
        blocks = blocks._replace(body=64, tail=64)
    repeats = 2 if tiny else 10
    for case, layer in (("modse", modse), ("equal", equal)):
        inputs = expert_ffn.random_inputs(dim, layer.widths, rows, DTYPE)
        jobs = _layer_jobs(layer, backend, blocks)
        for what, (function, passes) in jobs.items():
            flops = passes * layer.forward_flops
            fields = {"backend": backend, "case": case, "what": what}
            compiled = _time(write, function, inputs, flops, repeats, **fields)
            if compiled and case == "modse" and what == "forward_backward":
                _profile(write, compiled, *inputs, backend=backend)
    width = max(64, round(modse.forward_flops / (6 * dim * routed) / 64) * 64)  # H / 8, nearly
    x_ND, _, weights, _ = inputs
    roof = x_ND, weights.w_gate[:, :width]
    _time(
        write,
        lambda x_ND, w_DW: x_ND @ w_DW,
        roof,
        2.0 * routed * dim * width,
        repeats,
        backend="dense",
        case="one matmul",
        what="forward",
    )
    # As many tokens through one expert of the mean width.
    dense = expert_ffn.random_inputs(dim, (width,), [routed], DTYPE)
    for what, (function, passes) in _layer_jobs(modse, "dense", blocks).items():
        flops = passes * 6.0 * routed * dim * width
        _time(write, function, dense, flops, repeats, backend="dense", case="SwiGLU", what=what)


def _layer_jobs(
    layer: Layer, backend: str, blocks: block_sizes.Blocks
) -> dict[str, tuple[Callable, int]]:
    """Returns the forward pass, and both passes, with their FLOPs relative to the forward pass."""
    forward = expert_ffn.make_passes(
        layer.widths, backend, sharding.chip_name(None), blocks
    ).forward

    def forward_backward(x_ND, rows_E, weights, dy_ND):
        run = functools.partial(_call_with_rows, forward, rows_E)
        y_ND, pull = jax.vjp(run, x_ND, weights)
        return y_ND, pull(dy_ND)

    return {"forward": (forward, 1), "forward_backward": (forward_backward, 3)}


def _call_with_rows(forward: Callable, rows_E: jax.Array, x_ND: jax.Array, weights):
    return forward(x_ND, rows_E, weights, None)


def _time(
    write: Callable, function: Callable, inputs: tuple, flops: float, repeats: int, **fields
) -> Callable | None:
    """Compiles and times a function and writes the result, or the error.

    Returns:
        The compiled function; None after an error.
    """
    try:
        compiled = timing.compile_all({"": (function, inputs)})
        seconds = timing.time_interleaved(compiled, repeats)[""]
    except Exception as error:  # The remaining functions can still be measured.
        write(**fields, error=_message(error))
        return None
    median = float(np.median(seconds))
    write(
        **fields,
        milliseconds=round(1e3 * median, 4),
        fastest_milliseconds=round(1e3 * min(seconds), 4),
        teraflops_per_second=_round(flops / median / 1e12),
        compile_seconds=round(compiled[""].compile_seconds, 1),
        compiled_peak_gib=_gib(compiled[""].peak_bytes),
    )
    return compiled[""].compiled


def time_ragged_dot(write: Callable, tiny: bool, devices: int) -> None:
    """Times lax.ragged_dot, forward and both gradients, for 40 equal experts: a reference line."""
    routed, dim, experts, width = (256, 128, 4, 128) if tiny else (131_072, 1536, 40, 768)
    keys = jax.random.split(jax.random.key(0), 3)
    x_ND = jax.random.normal(keys[0], (routed, dim), DTYPE)
    w_EDW = 0.03 * jax.random.normal(keys[1], (experts, dim, width), DTYPE)
    dy_NW = jax.random.normal(keys[2], (routed, width), DTYPE)
    rows_E = jnp.full((experts,), routed // experts, jnp.int32)

    def forward(x_ND, w_EDW, dy_NW):
        return jax.lax.ragged_dot(x_ND, w_EDW, rows_E)

    jobs = {
        "forward": forward,
        "dx": lambda x, w, dy: jax.vjp(lambda x: forward(x, w, dy), x)[1](dy),
        "dw": lambda x, w, dy: jax.vjp(lambda w: forward(x, w, dy), w)[1](dy),
    }
    flops = 2.0 * int(rows_E.sum()) * dim * width
    for what, function in jobs.items():
        try:
            text = jax.jit(function).lower(x_ND, w_EDW, dy_NW).compile().as_text()
        except Exception as error:
            write(what=what, error=_message(error))
            continue
        by_cudnn = "__cudnn$fusion" in text
        _time(write, function, (x_ND, w_EDW, dy_NW), flops, 3, what=what, by_cudnn=by_cudnn)


def step_config(
    backend: str,
    attention: str,
    deterministic: bool,
    equal_widths: bool,
    tiny: bool,
    devices: int,
) -> options.Config:
    """Returns 300Mx8 with 16 sequences of 4,096 tokens per device, fully sharded."""
    name = "baseline_300m_x8" if equal_widths else "modse_300m_x8"
    values = importlib.import_module(f"configs.{name}").get_config()
    values.training.update(batch_size=16 * devices, gradient_accumulation=1)
    values.evaluation.batch_size = devices
    values.evaluation.sample_tokens = 16
    if tiny:
        widths = expert_widths.widths_from_ratio_pairs(TINY_PAIRS, 32)
        values.model.update(dim=32, num_layers=1, num_heads=2, context_length=64, vocab_size=300)
        values.model.update(dtype="float32", remat="none")
        values.moe.update(num_experts=4, width=64, widths=() if equal_widths else widths)
        values.data.sequence_length = 64
        values.training.update(batch_size=2 * devices)
        values.advanced.update(block_rows=64, tail_rows=64, loss_chunk=64)
    values.training.deterministic = deterministic
    values.model.attention = attention
    values.moe.backend = backend
    values.mesh.update(data=1, fsdp=devices, expert=1)
    return loading.from_dict(values.to_dict())


def time_step(
    write: Callable,
    tiny: bool,
    devices: int,
    backend: str,
    attention: str,
    deterministic: bool,
    equal_widths: bool,
) -> None:
    """Times training steps on random tokens, which are the same in every phase."""
    c = step_config(backend, attention, deterministic, equal_widths, tiny, devices)
    device_mesh.request_determinism(c)
    mesh = device_mesh.build_mesh(c, jax.devices()[:devices])
    what = {
        "backend": backend,
        "attention": attention,
        "deterministic": deterministic,
        "equal_widths": equal_widths,
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    start = time.perf_counter()
    compiled = train_step.compile_train_step(c, mesh)
    what["compile_seconds"] = round(time.perf_counter() - start, 1)
    memory = compiled.memory_analysis()
    if memory is not None:
        what["argument_gib"] = _gib(memory.argument_size_in_bytes)
        what["temporary_gib"] = _gib(memory.temp_size_in_bytes)
    shape = c.training.batch_size, c.data.sequence_length + 1
    tokens = np.random.default_rng(0).integers(4, c.model.vocab_size, shape, dtype=np.int32)
    rows = {"tokens": tokens, "segments": np.ones(shape, np.int32)}
    batch = sharding.shard_batch(mesh, rows, shape[0])
    state = train_step.init_sharded_state(c, mesh)
    seconds, losses, counts = [], [], []
    for index in range(4 if tiny else 12):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics.loss))  # waits for the step
        seconds.append(time.perf_counter() - start)
        counts.append(np.asarray(metrics.statistics.counts_KE).sum(axis=0))
        if index == 2 and seconds[-1] > 8:
            break
    write(**what, **_step_row(c, mesh, seconds[2:], losses, counts))
    _profile(write, lambda: compiled(state, batch), backend=backend, attention=attention)


def _step_row(
    c: options.Config,
    mesh,
    seconds: list[float],
    losses: list[float],
    counts: list[np.ndarray],
) -> dict:
    """Returns the numbers of a step: rates, model FLOPs utilization, memory and losses.

    Args:
        c: the config.
        mesh: the mesh of the step.
        seconds: duration of every timed step.
        losses: loss of every step.
        counts: tokens per expert of every step, [K, E], summed over layers.
    """
    tokens = c.training.batch_size * c.data.sequence_length
    length = c.data.sequence_length
    nominal = tokens * accounting.nominal_flops_per_token(c, length)
    rows_KE = np.sum(counts, axis=0)
    width = accounting.realized_width(c, rows_KE)
    realised = tokens * accounting.realized_flops_per_token(
        c, length, rows_KE, len(counts) * tokens
    )
    median = float(np.median(seconds))
    chip = chips.CHIPS.get(sharding.chip_name(mesh))
    peak = chip and chip.teraflops * 1e12 * mesh.size
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    return {
        "step_seconds": round(median, 5),
        "fastest_step_seconds": round(min(seconds), 5),
        "tokens_per_second": round(tokens / median),
        "teraflops_per_second": _round(realised / median / 1e12),
        "mfu_nominal": peak and round(nominal / median / peak, 4),
        "mfu_realised": peak and round(realised / median / peak, 4),
        "realised_width": round(width, 1),
        "peak_gib": _gib(max(s.get("peak_bytes_in_use", 0) for s in stats)) or None,
        "losses": [round(loss, 5) for loss in losses],
        "finite": bool(np.isfinite(losses).all()),
    }


def _profile(write: Callable, function: Callable, *inputs, **fields) -> None:
    """Writes the kernels that use most of the device's time in one call of a function."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(function(*inputs))
            total, kernels = read_profile(folder)
    except Exception as error:  # Timings are valid without a profile.
        write(**fields, what="profile", error=_message(error))
        return
    write(**fields, what="profile", busy_milliseconds=round(total, 3), kernels=kernels)


def read_profile(folder: str | os.PathLike) -> tuple[float, list[dict]]:
    """Returns the milliseconds of all kernels of a trace, and its longest kernels."""
    milliseconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                if not _has_kernels(plane.name, line.name):
                    continue
                for event in line.events:
                    milliseconds[event.name] = (
                        milliseconds.get(event.name, 0.0) + event.duration_ns / 1e6
                    )
                    calls[event.name] = calls.get(event.name, 0) + 1
    longest = sorted(milliseconds, key=lambda name: -milliseconds[name])[:TOP_KERNELS]
    kernels = [
        {"name": name[:100], "calls": calls[name], "milliseconds": round(milliseconds[name], 3)}
        for name in longest
    ]
    return sum(milliseconds.values()), kernels


def _has_kernels(plane: str, line: str) -> bool:
    """Returns whether a line of a trace lists kernels.

    A trace has a line for every stream of a GPU, for the operations of a TPU, and for every thread
    of a CPU.
    """
    if plane.startswith("/device:"):
        return line.startswith("Stream") or line == "XLA Ops"
    return plane == "/host:CPU" and line.startswith("tf_XLAPjRtCpuClient")


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"


PHASES = {
    "facts": measure_facts,
    "kernels": check_kernels,
    "layer": time_layer,
    "ragged_dot": time_ragged_dot,
    "step": time_step,
}


def main(arguments: dict) -> None:
    """Runs one phase. `arguments` is the JSON object that __main__.py passes."""
    writer = results.Writer(
        arguments["path"],
        arguments["started"],
        phase=arguments["kind"],
        name=arguments["name"],
    )
    run = PHASES[arguments["kind"]]
    run(writer.append, arguments["tiny"], arguments["devices"], **arguments["options"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
