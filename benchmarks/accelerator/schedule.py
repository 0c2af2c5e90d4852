"""The phases of a run, most informative first, because early results decide what comes later."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from modse_jax.runtime import chips

# Without it XLA times Triton's matmuls while it compiles, which takes a minute or more, and for
# matmuls of our sizes chooses cuBLAS mostly. One phase runs with it on (`autotuned`).
NO_TRITON_MATMULS = "--xla_gpu_enable_triton_gemm=false"

# Loops with data-dependent trip counts are recorded in CUDA graphs, so that the host does not wait
# for each of their conditions; or they are not.
LOOPS_IN_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE"

LOOPS_BY_HOST = "--xla_gpu_enable_command_buffer=-WHILE"

CUDNN_RAGGED_DOT = "--xla_gpu_experimental_use_ragged_dot_fusion=true"

# The phases of which a result is a measurement.
MEASURING = ("kernels", "layer", "ragged_dot", "step")

DUMP_AUTOTUNING = "--xla_gpu_dump_autotune_results_to={folder}/autotuning-{name}.pbtxt"


class Phase(NamedTuple):
    """A separate process that runs one function of phases.py."""

    name: str
    kind: str  # the function's name in phases.PHASES
    options: dict[str, str | bool]  # its arguments
    flags: str = ""  # added to XLA_FLAGS
    expected_seconds: float = 60  # it is skipped if less time is left
    limit_seconds: float = 150  # it is stopped after that


def facts() -> Phase:
    """Returns the first phase, whose results decide which of the others can run."""
    return Phase("facts", "facts", {}, expected_seconds=5, limit_seconds=60)


def kernel_phases(chip: str, backends: Sequence[str], tiny: bool = False) -> list[Phase]:
    """Returns the checks of all kernels, then the timings of one layer."""
    flags = NO_TRITON_MATMULS if _is_gpu(chip) else ""
    checks = [
        Phase(f"kernels {backend}", "kernels", {"backend": backend}, flags, 30, 120)
        for backend in backends
    ]
    # `reference` compiles the fastest.
    timed = ["reference"] if tiny else backends
    return checks + [_layer(backend, flags) for backend in timed]


def step_phases(chip: str, backends: Sequence[str], tiny: bool = False) -> list[Phase]:
    """Returns the timings of training steps, and the reference lines.

    Args:
        chip: a name in chips.CHIPS, "gpu" or "cpu".
        backends: kernel backends with correct kernels, fastest first.
    """
    if tiny:
        return [_step(chip, "reference", "blocks"), _ragged_dot(chip)]
    if _is_gpu(chip):
        return _gpu_step_phases(chip, backends)
    best = [*backends, "blocked"][0]
    phases = [
        _step(chip, best, "splash"),
        _step(chip, best, "splash", equal_widths=True),
        _step(chip, best, "blocks"),
        _ragged_dot(chip),
        *[_step(chip, backend, "splash") for backend in backends[1:]],
    ]
    # XLA for TPU needs minutes to compile `blocked`.
    blocked = [_layer("blocked", ""), _step(chip, "blocked", "splash")]
    slow = [phase._replace(expected_seconds=180, limit_seconds=400) for phase in blocked]
    return _without_repeats(phases + slow)


def _gpu_step_phases(chip: str, backends: Sequence[str]) -> list[Phase]:
    best = [*backends, "blocked"][0]
    phases = [
        *[_step(chip, backend, "cudnn") for backend in backends],
        _step(chip, "blocked", "cudnn"),
        _step(chip, best, "cudnn", deterministic=True),
        _step(chip, best, "cudnn", equal_widths=True),
        _step(chip, "blocked", "cudnn", graphs=False),
        _layer("blocked", f"{NO_TRITON_MATMULS} {LOOPS_IN_GRAPHS}"),
        _ragged_dot(chip),
        _step(chip, best, "blocks"),
        _step(chip, best, "cudnn", graphs=False),
        _step(chip, best, "cudnn", autotuned=True),
    ]
    rest = [
        _step(chip, backend, attention, deterministic=deterministic, graphs=graphs)
        for attention, deterministic, graphs, backend in itertools.product(
            ("cudnn", "blocks"), (False, True), (True, False), [*backends, "blocked"]
        )
    ]
    return _without_repeats(phases + rest)


def all_names(kernel_backends: Sequence[str]) -> list[str]:
    """Returns the name of every phase that exists on some chip."""
    phases = [facts()]
    for chip in ("v5e", "h100", "cpu"):
        for tiny in (False, True):
            phases += kernel_phases(chip, kernel_backends, tiny)
            for order in itertools.permutations(kernel_backends):
                phases += step_phases(chip, order, tiny)
    return sorted({phase.name for phase in phases})


def _layer(backend: str, flags: str) -> Phase:
    return Phase(f"layer {backend}", "layer", {"backend": backend}, flags, 50, 150)


def _ragged_dot(chip: str) -> Phase:
    flags = f"{NO_TRITON_MATMULS} {CUDNN_RAGGED_DOT}" if _is_gpu(chip) else ""
    return Phase("ragged_dot", "ragged_dot", {}, flags, 25, 60)


def _step(
    chip: str,
    backend: str,
    attention: str,
    deterministic: bool = False,
    graphs: bool = True,
    autotuned: bool = False,
    equal_widths: bool = False,
) -> Phase:
    words = {
        "deterministic": deterministic,
        "no-graphs": not graphs,
        "autotuned": autotuned,
        "equal": equal_widths,
    }
    name = " ".join(["step", backend, attention, *(word for word, on in words.items() if on)])
    flags = []
    if _is_gpu(chip):
        flags += [DUMP_AUTOTUNING] if autotuned else [NO_TRITON_MATMULS]
        flags += [LOOPS_IN_GRAPHS if graphs else LOOPS_BY_HOST]
    options = {
        "backend": backend,
        "attention": attention,
        "deterministic": deterministic,
        "equal_widths": equal_widths,
    }
    expected = 120 if autotuned else 80
    return Phase(name, "step", options, " ".join(flags), expected, 2 * expected)


def _is_gpu(chip: str) -> bool:
    return chip == "gpu" or chip in chips.GPUS


def _without_repeats(phases: Sequence[Phase]) -> list[Phase]:
    """Returns the first of the phases with the same name."""
    unique: dict[str, Phase] = {}
    for phase in phases:
        unique.setdefault(phase.name, phase)
    return list(unique.values())
