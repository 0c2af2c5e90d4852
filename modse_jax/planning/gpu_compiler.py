"""Compiles programs for NVIDIA GPUs that are not attached to this machine.

XLA's CUDA plugin compiles down to machine code without a GPU, a driver or a CUDA
installation, given a description of the GPU (a "target config"). This module finds the
plugin, describes the GPUs, and reads what the compiled program launches.

    devices = gpu_compiler.describe_topology("h100", hosts=1, devices_per_host=8)
    ... build a mesh of these devices and lower a function that is sharded over it ...
    compiled = lowered.compile(compiler_options=gpu_compiler.compile_options(dump_to=folder))
    launches = gpu_compiler.read_launches(folder)

The plugin packages are installed in a folder beside the environment (`install_command`),
because an environment that holds them tries to start a GPU in every process. Only a process
that calls `load_compiler` puts that folder on its path.
"""

import collections
import contextlib
import functools
import importlib
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from modse_jax.errors import UserError

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")  # they must have the version of jax

# ptxas and libdevice, which the compiler calls and reads: NVIDIA's packages, or a CUDA toolkit.
TOOL_PACKAGES = ("nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*")

TOOLS = ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc")

FOLDER = "gpu-compiler"  # inside sys.prefix

CUDA_VERSION = "13.0.0"  # assumed driver and runtime; XLA makes no CUDA graphs without both

CUDNN_VERSION = (9, 28, 1)  # assumed; see `assume_cudnn`


class GpuTarget(NamedTuple):
    """The properties of a GPU that change what XLA compiles for it."""

    device_kind: str
    compute_capability: tuple[int, int]
    accelerated: bool  # has the architecture-specific instructions (sm_90a: wgmma, TMA)
    multiprocessors: int
    shared_memory_per_block: int  # bytes, opt-in limit
    shared_memory_per_multiprocessor: int
    memory_bytes: int
    memory_bandwidth: int  # bytes per second
    l2_cache_bytes: int
    clock_ghz: float
    float32_lanes: int  # float32 operations per multiprocessor and clock cycle
    nvlinks: int  # number of NVLink connections


# From NVIDIA's data sheets and the table of compute capabilities in the CUDA programming guide. On
# a real GPU, XLA writes these values to a file if --xla_dump_to is set. The peak rates from which
# lower bounds of step times are computed are in chips.CHIPS.
GPU_TARGETS = {
    "a100": GpuTarget(
        device_kind="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        accelerated=False,
        multiprocessors=108,
        shared_memory_per_block=166_912,
        shared_memory_per_multiprocessor=167_936,
        memory_bytes=85_100_068_864,
        memory_bandwidth=2_039_040_000_000,
        l2_cache_bytes=41_943_040,
        clock_ghz=1.41,
        float32_lanes=64,
        nvlinks=12,
    ),
    "b200": GpuTarget(
        device_kind="NVIDIA B200",
        compute_capability=(10, 0),
        accelerated=True,
        multiprocessors=148,
        shared_memory_per_block=232_448,
        shared_memory_per_multiprocessor=233_472,
        memory_bytes=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        l2_cache_bytes=132_644_864,
        clock_ghz=1.965,
        float32_lanes=128,
        nvlinks=18,
    ),
    "h100": GpuTarget(
        device_kind="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        accelerated=True,
        multiprocessors=132,
        shared_memory_per_block=232_448,
        shared_memory_per_multiprocessor=233_472,
        memory_bytes=84_942_979_072,
        memory_bandwidth=3_352_320_000_000,
        l2_cache_bytes=52_428_800,
        clock_ghz=1.98,
        float32_lanes=128,
        nvlinks=18,
    ),
    "h200": GpuTarget(
        device_kind="NVIDIA H200",
        compute_capability=(9, 0),
        accelerated=True,
        multiprocessors=132,
        shared_memory_per_block=232_448,
        shared_memory_per_multiprocessor=233_472,
        memory_bytes=151_397_597_184,
        memory_bandwidth=4_800_000_000_000,
        l2_cache_bytes=52_428_800,
        clock_ghz=1.98,
        float32_lanes=128,
        nvlinks=18,
    ),
}


# The text of an XLA GpuTargetConfigProto. It must not have a `cub_version`: XLA would then compile
# sorts as calls of CUB and ask CUDA for a device. Without `feature_extension`, Mosaic kernels
# cannot be assembled. Without the driver and runtime versions, XLA makes no CUDA graphs.
_TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_memory_per_block}
  shared_memory_per_core: {target.shared_memory_per_multiprocessor}
  threads_per_core_limit: 2048
  core_count: {target.multiprocessors}
  fpus_per_core: {target.float32_lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {target.memory_bandwidth}
  l2_cache_size: {target.l2_cache_bytes}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_interconnect_info {{ active_links: {target.nvlinks} }}
  name: "{target.device_kind}"
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{cudnn[0]}.{cudnn[1]}.{cudnn[2]}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{target.device_kind}"
"""


def compiler_folder() -> pathlib.Path:
    """Returns the folder inside the Python environment where the compiler is installed.

    Packages in it are not importable unless `load_compiler` is called.
    """
    return pathlib.Path(sys.prefix) / FOLDER


def install_command(folder: pathlib.Path | None) -> str:
    """Returns the command that installs the compiler for this version of jax, for error messages.

    Args:
        folder: the folder to install into; None for the environment itself.
    """
    pins = [f"{package}=={jax.__version__}" for package in PACKAGES]
    packages = " ".join([*pins, *(f"'{package}'" for package in TOOL_PACKAGES)])
    options = f"--no-deps --target={folder} " if folder else ""
    return f"pip install {options}{packages}"


def find_compiler() -> pathlib.Path | None:
    """Finds the compiler's packages, and checks that they are complete.

    Returns:
        The folder of the packages; None if they are installed in the environment itself.

    Raises:
        UserError: a package is missing or has another version than jax.
    """
    in_environment = {package: _version(package, sys.path) for package in PACKAGES}
    folder = None if any(in_environment.values()) else compiler_folder()
    found = in_environment
    if folder is not None:
        found = {package: _version(package, [str(folder)]) for package in PACKAGES}
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise UserError(
            "compiling for a GPU needs XLA's CUDA compiler, which exists for Linux on x86_64 and "
            f"aarch64, and this is {platform.system()} on {platform.machine()}; plan on such a "
            "machine"
        )
    for package, version in found.items():
        if version is None:
            raise UserError(
                f"compiling for a GPU needs XLA's CUDA compiler, and {package} is neither in the "
                f"environment nor in {compiler_folder()}; install it with: "
                f"{install_command(folder)}"
            )
        if version != jax.__version__:
            raise UserError(
                f"{package} has version {version} and jax has {jax.__version__}, and they must be "
                f"the same; install it with: {install_command(folder)}"
            )
    find_cuda_tools(folder)
    return folder


def find_cuda_tools(folder: pathlib.Path | None) -> pathlib.Path:
    """Returns the directory of ptxas and libdevice, which the compiler needs.

    They are looked for beside the compiler, and then in an installed CUDA toolkit.

    Args:
        folder: the folder of the compiler; None for the environment.

    Raises:
        UserError: they are not found.
    """
    paths = [str(folder)] if folder else sys.path
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [pathlib.Path(path) / "nvidia" / "cu13" for path in paths]
    candidates += [pathlib.Path(path) for path in toolkits if path]
    for candidate in candidates:
        if all((candidate / tool).is_file() for tool in TOOLS):
            return candidate
    raise UserError(
        f"compiling for a GPU needs ptxas and libdevice, and there is no {' with '.join(TOOLS)} in "
        f"{', '.join(map(str, candidates))}; install them with: {install_command(folder)}"
    )


def _version(package: str, path: Sequence[str]) -> str | None:
    for distribution in importlib.metadata.distributions(name=package, path=list(path)):
        return distribution.version
    return None


@functools.cache
def load_compiler() -> None:
    """Makes XLA's CUDA compiler known to jax, without starting a GPU.

    jax must be set to another platform in this process (JAX_PLATFORMS=cpu); otherwise it would try
    to start a GPU.

    Raises:
        UserError: the compiler is missing or has another version than jax.
    """
    folder = find_compiler()
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not platforms or "cuda" in platforms:
        raise UserError(
            f"jax_platforms={platforms!r} while compiling for a GPU that is not "
            "attached; set JAX_PLATFORMS=cpu"
        )
    if folder is not None:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    # Mosaic sets these two variables when it is imported, and reads them when it compiles. So it is
    # imported first, and they are set afterwards.
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    tools = str(find_cuda_tools(folder))
    os.environ.update(CUDA_ROOT=tools, MOSAIC_GPU_CUDA_ROOT=tools)
    plugin = importlib.import_module("jax_cuda13_plugin")
    # Mosaic looks for its runtime library when it is imported, which may have been earlier.
    runtime = pathlib.Path(plugin.__path__[0]) / "libmosaic_gpu_runtime.so"
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    _register_with_jax()


def _register_with_jax() -> None:
    """Registers the CUDA plugin and its Triton compiler with jax, by jax's internals (0.10-0.12).

    jax itself looks for plugins only once, at the first use of a device. If a device has been used
    already, the plugin's own `initialize` is called, and then the callbacks that jax runs for each
    plugin. jaxlib.gpu_triton looks for the plugin only when it is imported, so it is reloaded.
    """
    import jaxlib.gpu_triton
    from jax._src import xla_bridge

    if not hasattr(jaxlib.gpu_triton, "TritonKernelCall"):
        importlib.reload(jaxlib.gpu_triton)
    xla_bridge._discover_and_register_pjrt_plugins()
    if "cuda" in xla_bridge._backend_factories:
        return
    importlib.import_module("jax_plugins.xla_cuda13").initialize()
    for callback in xla_bridge._plugin_callbacks:
        callback(c_api=xla_bridge._backend_factories["cuda"].c_api)


def target_config(gpu: str) -> str:
    """Returns the description of a GPU that XLA needs to compile for it, as text.

    Args:
        gpu: a name in GPU_TARGETS.
    """
    target = GPU_TARGETS[gpu]
    major, minor = target.compute_capability
    extension = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    return _TARGET_CONFIG.format(
        target=target,
        major=major,
        minor=minor,
        extension=extension,
        cuda=CUDA_VERSION,
        cudnn=CUDNN_VERSION,
    )


def describe_topology(gpu: str, hosts: int = 1, devices_per_host: int = 1) -> list[jax.Device]:
    """Returns jax devices that describe GPUs to compile for. Nothing can run on them.

    Devices are numbered host by host, and the `process_index` of a device is its host.

    Args:
        gpu: a name in GPU_TARGETS.
        hosts: number of hosts.
        devices_per_host: number of GPUs of each host.

    Raises:
        UserError: the GPU is not known, or the compiler is missing.
    """
    if gpu not in GPU_TARGETS:
        raise UserError(f"gpu={gpu!r} is not known; choose one of {', '.join(GPU_TARGETS)}")
    load_compiler()
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology=f"1x{hosts}x{devices_per_host}"
    )
    return list(topology.devices)


def compile_options(deterministic: bool = False, dump_to: str | pathlib.Path = "") -> dict:
    """Returns XLA options with which the compiled program is close to that for a real GPU.

    On a real GPU, XLA times several tile sizes of Triton's matmuls. Without one, it would choose
    tiles of 16 for all of them. So Triton is turned off, and XLA calls cuBLAS, as it mostly does on
    a real GPU, too.

    Args:
        deterministic: whether operations must be deterministic; training.deterministic.
        dump_to: a folder into which XLA writes the program and the list of what it launches; "" for
            none.
    """
    options = {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_deterministic_ops": deterministic,
        "xla_gpu_cuda_data_dir": str(find_cuda_tools(find_compiler())),
    }
    if dump_to:
        options |= {"xla_dump_to": str(dump_to), "xla_dump_hlo_as_text": True}
    return options


@contextlib.contextmanager
def assume_cudnn() -> Iterator[None]:
    """Lets model.attention=cudnn be lowered on a machine without cuDNN.

    jax asks for the version of the installed cuDNN when it traces attention, although the compiled
    program does not depend on it. There is no public way to state a version, so the private
    function that asks is replaced inside this context by one that returns CUDNN_VERSION.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    asks = fused_attention_stablehlo.check_cudnn_version
    major, minor, patch = CUDNN_VERSION
    fused_attention_stablehlo.check_cudnn_version = lambda: 10_000 * major + 100 * minor + patch
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asks


class Launches(NamedTuple):
    """Numbers of launches in one run of a compiled program, per GPU."""

    kernels: float  # kernels, library calls and copies, inside and outside CUDA graphs
    collectives: float  # all-gathers, all-reduces and so on
    graphs: float  # CUDA graphs
    host_waits: float  # how often the host waits for a number from the device
    open_loops: int  # number of loops outside CUDA graphs whose trip count depends on data
    iterations: float  # the number of iterations that was assumed for each such loop


# A thunk is one step of a compiled GPU program, such as a kernel launch or a loop. These kinds
# launch nothing themselves; every other kind but collectives is counted as a kernel.
_CONTAINERS = {
    "kSequential", "kCommandBuffer", "kWhile", "kConditional", "kDynamicSliceFusion",
    "kAsyncStart", "kAsyncDone", "kPartitionId", "kReplicaId", "kWaitForStreams",
}  # fmt: skip

_COLLECTIVES = {
    "kAllGather", "kAllReduce", "kReduceScatter", "kAllToAll", "kRaggedAllToAll",
    "kCollectivePermute", "kCollectiveBroadcast", "kCollectiveGroup",
}  # fmt: skip


# A thunk in XLA's list, indented below the thunk that contains it:
#     003: kCopy         [source        | sink        ] kCopy
_THUNK_LINE = re.compile(r"( *)(\d+): (k\w+)")

# A loop in the HLO program, and its trip count if XLA knows it:
#   %while.658 = (s32[], f32[4]{0}) while(%t), ..., backend_config={"known_trip_count":{"n":"3"}}
_LOOP_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .* while\((.*)", re.MULTILINE)
_KNOWN_TRIP_COUNT = re.compile(r'known_trip_count":\s*\{"n":\s*"(\d+)"')

# The metadata of a thunk, on several lines:
#   thunk_metadata {
#     thunk_info { profile_annotation: "while.658" thunk_id: 66 }
#     thunk_kind: "kWhile"
#   }
_METADATA_BLOCK = re.compile(r"thunk_metadata \{(.*?)\n\}", re.DOTALL)
_ANNOTATION = re.compile(r'profile_annotation: "([^"]*)"')
_THUNK_ID = re.compile(r"thunk_id: (\d+)")


class _Thunk(NamedTuple):
    kind: str
    number: int
    indent: int
    condition: list["_Thunk"]
    children: list["_Thunk"]


def read_launches(folder: str | pathlib.Path, iterations: float = 1.0) -> Launches:
    """Counts what one run of a compiled program launches, from files that XLA has written.

    A loop with a known trip count is counted with it. Other trip counts depend on data: the host
    reads the condition before every iteration, unless the entire loop is in a CUDA graph.

    Args:
        folder: the `dump_to` folder of `compile_options`.
        iterations: the number of iterations to assume for each loop whose trip count depends on
            data, nested loops included.

    Raises:
        FileNotFoundError: a file is missing.
    """
    folder = pathlib.Path(folder)
    thunks = _read_largest(folder, "*.thunk_sequence_after_thunk_passes.txt")
    metadata = _read_largest(folder, "*.thunk_metadata.txt")
    hlo = _read_largest(folder, "*gpu_after_optimizations.txt")
    return count_launches(thunks, metadata, hlo, iterations)


def _read_largest(folder: pathlib.Path, pattern: str) -> str:
    """Returns the text of the largest file that matches; others are of small helper programs."""
    matches = sorted(folder.glob(pattern), key=lambda file: file.stat().st_size)
    if not matches:
        raise FileNotFoundError(f"XLA wrote no {pattern} into {folder}")
    return matches[-1].read_text(encoding="utf-8")


def count_launches(thunks: str, metadata: str, hlo: str, iterations: float = 1.0) -> Launches:
    """Counts launches like `read_launches`, from the texts of XLA's files.

    Args:
        thunks: XLA's list of thunks, the steps of the compiled program.
        metadata: the metadata of the thunks, which names the loop in `hlo` of each.
        hlo: the optimized HLO program.
        iterations: see `read_launches`.
    """
    trip_counts = _read_trip_counts(metadata, hlo)
    total: dict[str, float] = collections.defaultdict(float)

    def visit(thunk: _Thunk, times: float, in_graph: bool) -> None:
        if thunk.kind == "kWhile":
            known = trip_counts.get(thunk.number)
            runs = iterations if known is None else known
            if known is None and not in_graph:
                total["open_loops"] += 1
                total["host_waits"] += times * (runs + 1)
            for child in thunk.condition:
                visit(child, times * (runs + 1), in_graph)
            for child in thunk.children:
                visit(child, times * runs, in_graph)
            return
        if thunk.kind == "kCommandBuffer":
            total["graphs"] += 0 if in_graph else times
            in_graph = True
        elif thunk.kind == "kConditional":
            total["host_waits"] += 0 if in_graph else times
        elif thunk.kind in _COLLECTIVES:
            total["collectives"] += times
        elif thunk.kind not in _CONTAINERS:
            total["kernels"] += times
        for child in thunk.children:
            visit(child, times, in_graph)

    for thunk in _parse_thunks(thunks):
        visit(thunk, 1.0, False)
    return Launches(
        kernels=total["kernels"],
        collectives=total["collectives"],
        graphs=total["graphs"],
        host_waits=total["host_waits"],
        open_loops=int(total["open_loops"]),
        iterations=iterations,
    )


def _parse_thunks(text: str) -> list[_Thunk]:
    """Parses XLA's list of thunks (steps of a compiled program); returns the outermost ones.

    A thunk contains the thunks that are indented below it. Those of a loop are in two lists: its
    condition, after a line `condition:` that is not indented, and its body, after `body:`.
    """
    root = _Thunk("root", -1, -1, [], [])
    stack = [root]
    in_condition = False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            in_condition = line.strip() == "condition:"
            continue
        match = _THUNK_LINE.match(line)
        if not match:
            continue
        thunk = _Thunk(match.group(3), int(match.group(2)), len(match.group(1)), [], [])
        while stack[-1].indent >= thunk.indent:
            stack.pop()
        parent = stack[-1]
        of_condition = parent.kind == "kWhile" and in_condition
        (parent.condition if of_condition else parent.children).append(thunk)
        stack.append(thunk)
    return root.children


def _read_trip_counts(metadata: str, hlo: str) -> dict[int, int]:
    """Returns {number of a loop's thunk: trip count}, for loops whose trip count XLA knows."""
    known = {}
    for name, rest in _LOOP_LINE.findall(hlo):
        count = _KNOWN_TRIP_COUNT.search(rest)
        if count:
            known[name] = int(count.group(1))
    counts = {}
    for block in _METADATA_BLOCK.findall(metadata):
        name = _ANNOTATION.search(block)
        number = _THUNK_ID.search(block)
        if "kWhile" in block and name and number and name.group(1) in known:
            counts[int(number.group(1))] = known[name.group(1)]
    return counts
