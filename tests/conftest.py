"""Every test runs on CPU with 8 virtual devices, and silent rank promotion is an error."""

import atexit
import functools
import gc
import os
import shutil
import signal
import tempfile

import jax
import pytest

from modse_jax.runtime import sharding
from modse_jax.training import train_step

# The variable is for the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"

# lm-evaluation-harness reads these when it is imported. Without them it waits for the network.
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
jax.config.update("jax_platforms", "cpu")

jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects, and the collector would take a fifth of the time.
gc.set_threshold(100_000, 50, 50)

# Tests compile far longer than they run. They compile without most optimizations, and equal
# programs only once, also in the processes that they start.
jax.config.update("jax_disable_most_optimizations", True)

# The first process of a test run makes the folder. The workers of pytest-xdist share it.
if "MODSE_TEST_CACHE" not in os.environ:
    os.environ["MODSE_TEST_CACHE"] = tempfile.mkdtemp(prefix="modse-compiled-")
    atexit.register(shutil.rmtree, os.environ["MODSE_TEST_CACHE"], ignore_errors=True)

CACHE = os.environ["MODSE_TEST_CACHE"]

CACHE_OPTIONS = {
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}


for name, value in CACHE_OPTIONS.items():
    jax.config.update(name, value)


# The older of XLA's two ways to emit CPU code compiles in half the time, and a program that is not
# split into parts for several threads takes a sixth less. libtpu and later versions of jax do not
# know these flags, and a process that finds an unknown flag aborts: they are set for the first use
# of a device alone.
FASTER_TO_COMPILE = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11)
    else ""
)


with pytest.MonkeyPatch.context() as patch:
    # Without blanks at the ends: XLA takes text that does not begin with a dash for a file name.
    patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {FASTER_TO_COMPILE}".strip())
    jax.devices()


@pytest.fixture(autouse=True)
def signals_restored():
    """Restores the signal handlers, because a training run installs its own."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session", autouse=True)
def equal_training_steps_are_compiled_once():
    """Shares compiled training steps between the runs of this process with equal configs.

    The cache on disk saves compilation, but not tracing and lowering, which take as long. A test
    that replaces one of the functions in the key gets programs of its own.
    `compile_train_step.__wrapped__` is the function that shares nothing.
    """
    original = train_step.compile_train_step
    programs = {}

    @functools.wraps(original)
    def compile_train_step(config, mesh, options=None):
        if mesh is None or mesh.devices.flat[0].platform != "cpu" or options:
            return original(config, mesh, options)
        is_optimized = not jax.config.read("jax_disable_most_optimizations")
        replaceable = train_step.make_train_step, train_step.lower_train_step, sharding.chip_name
        # The step is the same for all data of one length, and does not depend on what is saved.
        sections = dict(vars(config), data=config.data.sequence_length, checkpoint=None)
        key = tuple(sections.items()), mesh, is_optimized, replaceable
        if key not in programs:
            programs[key] = original(config, mesh)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "compile_train_step", compile_train_step)
        yield


@pytest.fixture
def compiled_with_care():
    """Compiles with all optimizations, as the programs of a user are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def corpus(tmp_path):
    """A folder of small text files in several scripts, one of them not UTF-8 and one empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(24):
        lines = [f"def f{i}_{j}(x):\n    return x * {i * j} + g(x, {j})\n\n" for j in range(12)]
        (folder / f"{i:02}.py").write_text(
            "".join(lines) + "# h\u00e9, \u4e16\u754c, \u041f\u0440\u0438\n"
        )
    (folder / "latin.py").write_bytes(b"caf\xe9\n")
    (folder / "none.py").write_bytes(b"")
    return folder
