"""Several processes that train together: starting them, agreeing on values, and ending them.

If one process fails, none of the others must wait for it forever. The processes are described by
flags, or by environment variables that Slurm, Open MPI, Kubernetes and TPU pods set and that
`jax.distributed` reads. With a single process every function here returns its input unchanged or
does nothing. Process 0 is the main process: it alone prints and writes files.
"""

import faulthandler
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modse_jax.errors import UserError, describe_exception

# Timeouts in seconds.
START_TIMEOUT = 100  # for all processes to connect
HEARTBEAT_TIMEOUT = 60  # without a heartbeat, a process counts as dead
END_TIMEOUT = 30  # for all processes to disconnect
BARRIER_TIMEOUT = 3600  # at a barrier: one process may be preparing data or compiling

# Longest text that processes exchange, in bytes. The longest in use is about 3 kB: a hash of every
# option of a config.
MESSAGE_BYTES = 16384

# Environment variables of launchers that start several processes: {variable with the number of
# processes: variable that is present only in these processes}. In a Slurm batch script,
# SLURM_NTASKS alone says nothing, because only srun starts the processes.
COUNTS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_SIZE"}

Result = TypeVar("Result")


def start(coordinator: str = "", count: int = 0, index: int = -1, detect: bool = False) -> None:
    """Connects the processes of this run, if there are several.

    Must be called before the first use of a device.

    Args:
      coordinator: HOST:PORT of process 0, or "" to read everything from the environment.
      count: number of processes; 0 if not given.
      index: index of this process; -1 if not given.
      detect: let jax detect the processes even if no known launcher is found in the environment
        (TPU pods, Kubernetes).

    Raises:
      UserError: the arguments are incomplete, or the processes did not connect in time.
    """
    given = (bool(coordinator), count > 0, index >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator=HOST:PORT, --process_count and --process_index go together")
    if not (all(given) or detect or _launcher_found()):
        return
    # The training loop handles SIGTERM itself, so jax must not.
    jax.config.update("jax_enable_preemption_service", False)
    # If another process dies, jax prints one line about it and aborts. A stack trace of every
    # thread would hide that line.
    faulthandler.disable()
    name = str(index) if index >= 0 else "(index from the environment)"
    address = f" at {coordinator}" if coordinator else ""
    print(
        f"process {name}: waiting up to {START_TIMEOUT} s for all processes of this run{address}",
        file=sys.stderr,
    )
    try:
        jax.distributed.initialize(
            coordinator or None,
            count or None,
            index if index >= 0 else None,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=END_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = describe_exception(error).splitlines()[0]
        raise UserError(
            f"the processes of this run did not connect within {START_TIMEOUT} s: "
            f"{reason}; start all of them, with the same --coordinator and "
            "--process_count, and with each --process_index once"
        ) from None


def _launcher_found() -> bool:
    launched = any(
        present in os.environ and int(os.environ.get(count, "1")) > 1
        for count, present in COUNTS.items()
    )
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return launched or pod or "JAX_COORDINATOR_ADDRESS" in os.environ


def index() -> int:
    """Returns the index of this process."""
    return jax.process_index()


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def is_main_process() -> bool:
    """Returns True on process 0, which alone prints and writes."""
    return index() == 0


def is_multi_process() -> bool:
    """Returns True if this run has several processes.

    Unlike jax.process_count(), it may be called before the first use of a device.
    """
    return jax.distributed.is_initialized()


def on_all_processes(function: Callable[[], Result], *, first_alone: bool = False) -> Result:
    """Calls a function on every process and returns its result.

    Args:
      function: the function. It may raise UserError on some of the processes.
      first_alone: process 0 finishes its call before the other processes begin theirs, so that they
        find the files that it has written.

    Raises:
      UserError: on every process, if the function raised one on any of them.
    """
    if not is_multi_process():
        return function()
    rounds = [is_main_process(), not is_main_process()] if first_alone else [True]
    results: list[Result] = []
    my_error = ""
    for is_my_round in rounds:
        if is_my_round:
            try:
                results.append(function())
            except UserError as error:
                my_error = str(error)
        for process, error_text in enumerate(gather(my_error)):
            if error_text:
                raise UserError(my_error or f"process {process}: {error_text}")
    return results[0]


def broadcast_from_main(function: Callable[[], Result]) -> Result:
    """Calls a function on process 0 only and returns its result on every process.

    Args:
      function: returns plain values that JSON can represent.

    Raises:
      UserError: on every process, if the function raised one.
    """
    if not is_multi_process():
        return function()
    value = on_all_processes(lambda: function() if is_main_process() else None)
    return json.loads(gather(json.dumps(value))[0])


def assert_same(facts: dict[str, str]) -> None:
    """Checks that every process has the same values.

    Args:
      facts: {name used in the error message: value}.

    Raises:
      UserError: on every process, if a value of any process differs from that of process 0.
    """
    digests = {
        name: hashlib.sha256(_encode(value)).hexdigest()[:16] for name, value in facts.items()
    }
    all_digests = [json.loads(text) for text in gather(json.dumps(digests))]
    for name in facts:
        differing = [
            str(process)
            for process, digests in enumerate(all_digests)
            if digests[name] != all_digests[0][name]
        ]
        if differing:
            raise UserError(
                f"{name} of process {', '.join(differing)} differs from that of process 0; start "
                "all processes with the same options and code, from one file system"
            )


def _encode(text: str) -> bytes:
    """Returns a text as UTF-8; surrogates stand for the bytes of a path that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, each truncated to `MESSAGE_BYTES`, on every process."""
    if not is_multi_process():
        return [text]
    wait_for_all()
    data = _encode(text)[:MESSAGE_BYTES]
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    message[: len(data)] = np.frombuffer(data, np.uint8)
    messages = np.asarray(multihost_utils.process_allgather(message)).reshape(-1, MESSAGE_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in messages]


def broadcast(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns process 0's arrays on every process.

    Args:
      arrays: on process 0, the arrays; on the other processes, any arrays of the same names, shapes
        and dtypes, such as zeros.
    """
    wait_for_all()
    received = multihost_utils.broadcast_one_to_all(arrays, is_source=is_main_process())
    return {name: np.asarray(array) for name, array in received.items()}


_barrier_numbers = itertools.count()


def wait_for_all() -> None:
    """Blocks until every process has called this function.

    Called before a collective for which some processes may be late: collectives on CPU fail after
    30 s, while this barrier waits for up to `BARRIER_TIMEOUT` seconds.
    """
    if not is_multi_process():
        return
    # Imported here because it is slow to import and a single process does not need it. Orbax's
    # barrier accepts a timeout.
    from orbax.checkpoint import multihost

    synchronize = multihost.get_barrier_sync_fn()
    synchronize(key=f"modse-{next(_barrier_numbers)}", timeout_ms=BARRIER_TIMEOUT * 1000)


def any_of(flag: bool, mesh: Mesh) -> jax.Array:
    """Computes whether a flag is True on any process.

    Args:
      flag: the flag of this process.
      mesh: the devices of all processes.

    Returns:
      A scalar bool array on every device of the mesh. Reading it blocks until all processes have
      called this function.
    """
    flags_sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local_flags = np.full(len(mesh.local_devices), flag)
    flags = jax.make_array_from_process_local_data(flags_sharding, local_flags, (mesh.size,))
    return _compiled_any(mesh)(flags)


@functools.cache
def _compiled_any(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))


def source_digest() -> str:
    """Returns a hash of this package's source code.

    Processes compare it when they start, because different code would make them wait forever for
    collectives that the others do not run.
    """
    package = pathlib.Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def exit_now(code: int) -> None:
    """Ends this process at once if the run has several; returns if it is the only one.

    For errors that may have occurred on this process only. The others are waiting for it in a
    collective, so it must not wait for them in an orderly shutdown. They fail when its connections
    close.
    """
    if is_multi_process():
        os._exit(code)
