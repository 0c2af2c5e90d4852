"""Expert kernels and the 300Mx8 step, compiled for GPUs that are not attached.

`python -m benchmarks.gpu_report` compiles every backend, shape and GPU.
"""

import pathlib
import platform

import pytest

from benchmarks import gpu_report
from modse_jax.errors import UserError
from modse_jax.planning import gpu_compiler

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the CUDA compiler is tested on Linux on x86-64, where its packages are installed",
)

ROUTED_TOKENS = 16 * 4096 * 2


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        gpu_compiler.find_compiler()
    except UserError as error:
        pytest.fail(f"{error} (make test does)")


def compile_case(tmp_path: pathlib.Path, *words: str) -> dict:
    """Returns the row of benchmarks.gpu_report for a case."""
    row = gpu_report.compile_case(gpu_report.Case(*words), tmp_path)
    assert "error" not in row, row["error"]
    return row


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# The kernels compile in the same way for both models' widths: each backend is tested with one of
# them on an H100, and the A100's, which has the smallest tiles, with the other. Mosaic needs four
# seconds for each kernel.
@pytest.mark.parametrize(
    "kind, backend, gpu, model, matmul, num_kernels",
    [
        slow("kernels-once", "pallas_gpu", "h100", "300Mx8", "wgmma", 4),
        ("kernels", "pallas_triton", "h100", "700Mx8", "wgmma", 6),
        slow("kernels", "pallas_gpu", "h100", "300Mx8", "wgmma", 6),
        slow("kernels", "pallas_gpu", "h100", "700Mx8", "wgmma", 6),
        slow("kernels", "pallas_triton", "h100", "300Mx8", "wgmma", 6),
        slow("kernels", "pallas_triton", "a100", "300Mx8", "mma.sync", 6),
    ],
)
def test_kernels_compile_without_spills(tmp_path, kind, backend, gpu, model, matmul, num_kernels):
    row = compile_case(tmp_path, kind, backend, gpu, model)
    kernels = row["kernels"]
    assert len(kernels) == num_kernels
    for kernel in kernels:
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["shared_memory_bytes"] <= (227 if gpu == "h100" else 163) * 1024, kernel
        assert any(name.startswith(matmul) for name in kernel["matmuls"]), kernel
        loads = kernel["tensor_loads"] if backend == "pallas_gpu" else kernel["async_copies"]
        assert loads > 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pallas_triton", "pallas_gpu"])
def test_kernels_of_narrow_experts_compile_without_spills(tmp_path, backend):
    """An arm of Slicing and Dicing: 256 experts of width 42, padded to 64, at model width 336."""
    row = compile_case(tmp_path, "kernels", backend, "h100", "80M_n256_k32")
    assert len(row["kernels"]) == 6
    for kernel in row["kernels"]:
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["shared_memory_bytes"] <= 227 * 1024, kernel
        assert any(name.startswith("wgmma") for name in kernel["matmuls"]), kernel


@pytest.mark.slow
def test_the_step_of_the_auto_backend_never_waits_for_the_device(tmp_path):
    """Deterministic 300Mx8, batch 16 x 4,096, cuDNN attention; memory and sorts are bounded.

    test_gpu_plan.py has the same test for a small step.
    """
    row = compile_case(tmp_path, "step", "auto", "h100", "300Mx8", "cudnn")
    launches = row["launches"]
    assert launches["open_loops"] == 0
    assert launches["host_waits"] == 0
    assert launches["graphs"] <= 100
    assert row["largest_sort"] <= ROUTED_TOKENS
    assert row["temporary_gib"] <= 21
    assert any(kernel["name"].startswith("expert_") for kernel in row["kernels"])
