"""benchmarks/gpu_report reads what the compiler dumped."""

import pathlib
import shutil

import pytest

from benchmarks import gpu_report
from modse_jax.errors import UserError

# Dumps of real compilations, shortened.
DUMPS = pathlib.Path(__file__).parents[1] / "fixtures" / "gpu_dump"


def test_mosaic_kernels_are_read_from_their_dump():
    assert gpu_report.kernel_facts(DUMPS / "mosaic") == [
        gpu_report.KernelFacts(
            name="body_0",
            target="sm_90a",
            registers=254,
            spill_bytes=0,
            stack_bytes=0,
            shared_memory_bytes=131_113,  # dynamic and static
            matmuls={"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16": 2},
            tensor_loads=2,
            tensor_stores=1,
            async_copies=0,
        )
    ]


def test_triton_kernels_are_read_from_xlas_dump_and_log():
    assert gpu_report.kernel_facts(DUMPS / "triton") == [
        gpu_report.KernelFacts(
            name="expert_gate_up",
            target="sm_80",
            registers=255,
            spill_bytes=52,
            stack_bytes=32,
            shared_memory_bytes=147_456,
            matmuls={"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 1},
            tensor_loads=0,
            tensor_stores=0,
            async_copies=1,
        )
    ]


def test_numbers_that_a_dump_does_not_contain_are_none(tmp_path):
    """A missing report must never read as zero spills."""
    shutil.copy(DUMPS / "triton" / "module_0001.jit_run.13.ptx", tmp_path)
    (facts,) = gpu_report.kernel_facts(tmp_path)
    assert facts.spill_bytes is facts.registers is facts.shared_memory_bytes is None


def test_the_largest_sort_of_a_program_is_found():
    hlo = """
  %sort.1 = (s32[16,4]{1,0}, f32[16,4]{1,0}) sort(%a, %b), dimensions={1}
  ROOT %sort.2 = s32[100]{0} sort(%c), dimensions={0}
  %fusion = f32[4096,4096]{1,0} fusion(%sort.1), kind=kLoop
"""
    assert gpu_report.largest_sort(hlo) == 100
    assert gpu_report.largest_sort("%a = f32[8]{0} add(%b, %c)") == 0


def test_cases_name_backends_that_take_the_gpu():
    names = {case.name for case in gpu_report.list_cases()}
    assert {"kernels pallas_gpu h100 300Mx8", "step blocked a100 300Mx8 cudnn"} <= names
    assert not any("pallas_tpu" in name or "pallas_gpu a100" in name for name in names)
    chosen = gpu_report.select_cases(
        gpu_report.list_cases(), "step blocked b200,kernels pallas_gpu h100,step b200 cudnn blocked"
    )
    assert [case.name for case in chosen] == [
        "step blocked b200 300Mx8 cudnn",
        "step blocked b200 300Mx8 blocks",
        "kernels pallas_gpu h100 300Mx8",
        "kernels pallas_gpu h100 700Mx8",
        "kernels pallas_gpu h100 80M_n256_k32",
    ]
    assert gpu_report.LAYERS["80M_n256_k32"] == (336, (42,) * 256)
    with pytest.raises(UserError, match="selects nothing.*kernels pallas_gpu h100 300Mx8"):
        gpu_report.select_cases(gpu_report.list_cases(), "kernels tpu")


def test_the_table_has_a_line_for_each_kernel_step_and_error():
    case = gpu_report.Case("kernels", "pallas_gpu", "h100", "300Mx8")
    kernel = gpu_report.KernelFacts(
        "body_0", "sm_90a", 254, 0, 0, 131_113, {"wgmma": 16}, 15, 24, 0
    )
    sizes = dict(
        compile_seconds=9.0, argument_gib=1.0, temporary_gib=2.0, peak_gib=3.0, largest_sort=8
    )
    launches = dict(kernels=2260.0, graphs=36.0, host_waits=0.0)
    step = gpu_report.Case("step", "blocked", "h100", "300Mx8", "cudnn")
    text = gpu_report.format_table(
        [
            case._asdict() | sizes | {"kernels": [kernel._asdict()]},
            step._asdict() | sizes | {"kernels": [], "launches": launches},
            case._replace(model="700Mx8")._asdict() | {"error": "no ptxas"},
        ]
    )
    assert "body_0" in text and "254 registers, 0 bytes spilled, 131113 bytes" in text
    assert "2260 kernels, 36 graph launches, 0 host waits, largest sort 8" in text
    assert text.endswith("kernels pallas_gpu h100 700Mx8: no ptxas")


def test_bad_cases_are_one_sentence(capsys):
    assert gpu_report.main(["--cases=steps h100"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: --cases='steps h100' selects nothing") and error.count("\n") == 1
    )
