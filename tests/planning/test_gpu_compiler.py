"""The CUDA compiler: finding it, describing GPUs to it, and reading what a program launches."""

import pathlib

import jax
import pytest

from modse_jax.errors import UserError
from modse_jax.planning import gpu_compiler, planner
from modse_jax.runtime import chips

# XLA's list of what a program launches (shortened): a loop of 3 iterations. In it are a loop in a
# CUDA graph and a loop outside, both with data-dependent trip counts, and a conditional. Before it
# is a collective.
THUNKS = """000: kCommandBuffer  [source        | next=025 (1) ]
    001: kPartitionId  [source        | next=002 (1)] kPartitionId
    002: kCustomKernel [prev=001 (1)  | sink        ] loop_fusion grid: [1, 1, 1] threads: [1, 1, 1]
    003: kCopy         [source        | sink        ] kCopy
025: kAsyncStart     [prev=000 (1)  | next=055 (10)] stream=communication_stream[0], async_id=25
    024: kAllGather [source | sink] kAllGather
054: kAsyncDone      [source        | sink         ] async_id=25
066: kWhile          [prev=000 (1)  | next=000 (1) ]
condition:
    067: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer      [source       | next=089 (1) ]
        068: kCublasLtMatmul [source       | sink        ] kCublasLtMatmul
        070: kWhile         [prev=000 (1) | next=192 (1)]
condition:
            071: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
          body:
            072: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
    172: kWhile              [prev=170 (2) | next=203 (1) ]
condition:
        173: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        000: kCommandBuffer [source       | next=181 (1)]
            174: kGemm         [source       | next=175 (1)] kGemm
            175: kDynamicSliceFusion [prev=174 (1) | sink ] params=1, results=1
                176: kCopy [source | sink] kCopy
    203: kConditional        [prev=172 (1) | sink ]
977: kCustomKernel   [prev=957 (20) | sink        ] last grid: [768, 1, 1] threads: [128, 1, 1]
"""


THUNK_METADATA = """thunk_metadata {
  thunk_info {
    profile_annotation: "while.658.clone"
    thunk_id: 66
  }
  thunk_kind: "kWhile"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "while.654"
    thunk_id: 172
  }
  thunk_kind: "kWhile"
}
"""


THUNK_HLO = """  %while.658.clone = (s32[], f32[4]{0}) while(%t), condition=%c, body=%b, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.654 = (s32[], f32[4]{0}) while(%u), condition=%d, body=%e
"""


@pytest.fixture
def dump(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as XLA writes it."""
    for name, text in (
        ("thunk_sequence_after_thunk_passes", THUNKS),
        ("thunk_metadata", THUNK_METADATA),
        ("sm_9.0a_gpu_after_optimizations", THUNK_HLO),
    ):
        (tmp_path / f"module_0001.jit_step.{name}.txt").write_text(text)
    return tmp_path


def test_launches_are_read_from_the_list_of_thunks(dump):
    once = gpu_compiler.read_launches(dump)
    # 2 + 1 outside the loop, its condition 4 times, and per iteration: a matmul, the inner loop in
    # the graph (2 conditions, a kernel) and the data-dependent loop (2 conditions, a matmul, a
    # copy).
    assert once.kernels == 3 + 4 + 3 * (1 + 3 + 4)
    assert once.graphs == 1 + 3 + 3
    assert once.collectives == 1
    assert once.host_waits == 3 * 2 + 3  # two conditions, and the conditional
    assert once.open_loops == 1


def test_data_dependent_loops_can_be_assumed_to_run_never(dump):
    never = gpu_compiler.read_launches(dump, iterations=0)
    assert never.kernels == 3 + 4 + 3 * (1 + 1 + 1)
    assert never.graphs == 4
    assert never.host_waits == 3 + 3


def test_a_missing_list_of_launches_is_reported(dump):
    (dump / "module_0001.jit_step.thunk_metadata.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no .*thunk_metadata"):
        gpu_compiler.read_launches(dump)


def install(folder: pathlib.Path, version: str, names=gpu_compiler.PACKAGES) -> None:
    """Writes the metadata of packages, without which they count as missing."""
    for name in names:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def empty_environment(tmp_path, monkeypatch) -> pathlib.Path:
    """An environment on Linux without packages. Returns its folder."""
    monkeypatch.setattr(gpu_compiler.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(gpu_compiler.sys, "path", [])
    monkeypatch.setattr(gpu_compiler.platform, "system", lambda: "Linux")
    monkeypatch.setattr(gpu_compiler.platform, "machine", lambda: "x86_64")
    return tmp_path


def install_command_pattern(environment: pathlib.Path) -> str:
    return (
        rf"pip install --no-deps --target={environment}/gpu-compiler "
        rf"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
        r"'nvidia-cuda-nvcc==13.0.\*' 'nvidia-nvvm==13.0.\*'$"
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(empty_environment):
    message = (
        "jax-cuda13-plugin is neither in the environment nor in .*; install it with: "
        + install_command_pattern(empty_environment)
    )
    with pytest.raises(UserError, match=message):
        planner.check_arguments(["v5e:1x1", "gpu:h100"], "")
    planner.check_arguments(["v5e:1x1", "cpu:2"], "")
    install(gpu_compiler.compiler_folder(), jax.__version__, gpu_compiler.PACKAGES[:1])
    with pytest.raises(UserError, match="jax-cuda13-pjrt is neither"):
        gpu_compiler.find_compiler()


def test_missing_tools_are_named_with_the_command_that_installs_them(
    empty_environment, monkeypatch
):
    folder = gpu_compiler.compiler_folder()
    install(folder, jax.__version__)
    monkeypatch.setattr(gpu_compiler, "TOOLS", ("bin/no-such-tool",))
    message = (
        "there is no bin/no-such-tool in .*gpu-compiler/nvidia/cu13, .*; install them with: "
        + install_command_pattern(empty_environment)
    )
    with pytest.raises(UserError, match=message):
        gpu_compiler.find_compiler()
    tool = folder / "nvidia" / "cu13" / "bin" / "no-such-tool"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert gpu_compiler.find_compiler() == folder


def test_a_compiler_of_another_version_in_the_environment_is_refused(empty_environment):
    """The environment comes first, because jax itself would use what is there."""
    install(gpu_compiler.compiler_folder(), jax.__version__)
    environment = empty_environment / "environment"
    install(environment, "0.3.1")
    gpu_compiler.sys.path.append(str(environment))
    message = (
        f"has version 0.3.1 and jax has {jax.__version__}, and they must be the same; "
        "install it with: pip install jax-cuda13-plugin=="
    )
    with pytest.raises(UserError, match=message):
        gpu_compiler.find_compiler()


def test_other_operating_systems_are_refused(empty_environment, monkeypatch):
    monkeypatch.setattr(gpu_compiler.platform, "system", lambda: "Darwin")
    with pytest.raises(UserError, match="exists for Linux .* and this is Darwin"):
        gpu_compiler.find_compiler()


def test_every_known_gpu_has_a_target():
    assert set(gpu_compiler.GPU_TARGETS) == set(chips.GPUS)
    with pytest.raises(
        UserError, match="gpu='v100' is not known; choose one of a100, b200, h100, h200"
    ):
        gpu_compiler.describe_topology("v100")


@pytest.mark.parametrize("gpu", gpu_compiler.GPU_TARGETS)
def test_target_configs_avoid_what_xla_cannot_do_without_a_gpu(gpu):
    target = gpu_compiler.GPU_TARGETS[gpu]
    text = gpu_compiler.target_config(gpu)
    assert "cub_version" not in text
    assert "driver_version" in text and "runtime_version" in text
    assert ("ACCELERATED_FEATURES" in text) == (target.compute_capability >= (9, 0))


@pytest.mark.parametrize("gpu", gpu_compiler.GPU_TARGETS)
def test_targets_agree_with_the_table_of_chips(gpu):
    target = gpu_compiler.GPU_TARGETS[gpu]
    chip = chips.CHIPS[gpu]
    assert any(kind in target.device_kind for kind in chip.kinds)
    assert target.memory_bytes / 2**30 == pytest.approx(chip.gigabytes, rel=0.02)
    assert target.memory_bandwidth / 1e12 == pytest.approx(chip.terabytes, rel=0.05)
