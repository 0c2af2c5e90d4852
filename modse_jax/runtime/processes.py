"""Several processes that train as one: their start, what they must agree on, and an end in which none waits for ever.

Who they are is read from flags, or from what Slurm, Open MPI, Kubernetes and TPU pods leave in the environment, which
jax.distributed knows. A single process passes through every function here unchanged.
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

from modse_jax.errors import UserError

# Seconds: to find each other, to be taken for dead, to end together.
START_TIMEOUT, HEARTBEAT_TIMEOUT, END_TIMEOUT = 100, 60, 30


PATIENCE = 3600  # seconds for which processes wait where one of them prepares data or compiles


MESSAGE_BYTES = 16384  # 67 options take 2.7 kB (agree)


# Variables that count the processes of a launcher.
COUNTS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_SIZE"}


Result = TypeVar("Result")


def start(coordinator: str = "", count: int = 0, index: int = -1, detect: bool = False) -> None:
    """Joins the processes of this run; must run before the first use of a device.

    Args: coordinator: HOST:PORT of process 0, with the count of processes and this one's index; "": from the
    environment, where it tells of several. detect: ask jax for them where nothing here tells of any (TPU pods,
    Kubernetes). Raises UserError where they do not find each other in time.
    """
    given = (bool(coordinator), count > 0, index >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator=HOST:PORT, --process_count and --process_index go together")
    if not (all(given) or detect or _told()):
        return
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # the loop has its own answer to SIGTERM
    faulthandler.disable()  # jax aborts a process whose peer died, after a line that says so: let it stand out
    print(
        f"process {index if index >= 0 else '(index from the environment)'}: waiting up to {START_TIMEOUT} s for all "
        f"processes of this run{f' at {coordinator}' if coordinator else ''}",
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
        raise UserError(
            f"the processes of this run did not find each other within {START_TIMEOUT} s: "
            f"{str(error).splitlines()[0]}; all of them must be started, with one --coordinator, one "
            f"--process_count, and every --process_index once"
        ) from None


def _told():
    several = any(
        present in os.environ and int(os.environ.get(count, "1")) > 1
        for count, present in COUNTS.items()
    )
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return several or pod or "JAX_COORDINATOR_ADDRESS" in os.environ


def index() -> int:
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return index() == 0


def is_multi_process() -> bool:
    """Whether other processes wait for this one; does not touch a device."""
    return jax.distributed.is_initialized()


def on_all_processes(function: Callable[[], Result], *, first_alone: bool = False) -> Result:
    """function() on every process. Raises UserError on all of them where it raises on one.

    Args: first_alone: the others start when process 0 is done, and so find what it has written.
    """
    if not is_multi_process():
        return function()
    result, trouble = None, ""
    for my_turn in (is_main_process(), not is_main_process()) if first_alone else (True,):
        try:
            result = function() if my_turn else result
        except UserError as error:
            trouble = str(error)
        for process, text in enumerate(gather(trouble)):
            if text:
                raise UserError(trouble or f"process {process}: {text}")
    return result


def broadcast_from_main(function: Callable[[], Result]) -> Result:
    """What function() returns on process 0, plain values, on every process: for what need be read only once."""
    value = on_all_processes(lambda: function() if is_main_process() else None)
    return json.loads(gather(json.dumps(value))[0]) if is_multi_process() else value


def assert_same(facts: dict[str, str]) -> None:
    """Raises UserError on every process where one of them holds another value for a name than process 0."""
    digests = {
        name: hashlib.sha256(value.encode()).hexdigest()[:16] for name, value in facts.items()
    }
    rows = [json.loads(text) for text in gather(json.dumps(digests))]
    for name in facts:
        other = [str(i) for i, row in enumerate(rows) if row[name] != rows[0][name]]
        if other:
            raise UserError(
                f"{name} of process {', '.join(other)} differs from that of process 0; start all processes "
                f"alike, from one file system"
            )


def gather(text: str) -> list[str]:
    """The text of every process, cut to MESSAGE_BYTES, on each of them."""
    if not is_multi_process():
        return [text]
    wait()
    row, data = np.zeros(MESSAGE_BYTES, np.uint8), text.encode()[:MESSAGE_BYTES]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, MESSAGE_BYTES)
    return [r.tobytes().rstrip(b"\0").decode(errors="replace") for r in rows]


def broadcast(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Process 0's arrays, on every process; the others give arrays of the same shapes and types."""
    wait()
    return {
        name: np.asarray(a)
        for name, a in multihost_utils.broadcast_one_to_all(
            arrays, is_source=is_main_process()
        ).items()
    }


_turns = itertools.count()


def wait() -> None:
    """Until every process is here. Collectives of the CPU give up on a late process after 30 s; this does not."""
    if is_multi_process():
        from orbax.checkpoint import (
            multihost,  # here: slow to import, and a single process has no use for it
        )

        multihost.get_barrier_sync_fn()(key=f"modse-{next(_turns)}", timeout_ms=PATIENCE * 1000)


def any_of(flag: bool, mesh: Mesh) -> jax.Array:
    """Whether the flag is up on any process: a bool on every device, whose reading waits for all of them."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    flags = np.full(len(mesh.local_devices), flag)
    return _any(mesh)(jax.make_array_from_process_local_data(sharding, flags, (mesh.size,)))


@functools.cache
def _any(mesh):
    return jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))


def source_digest() -> str:
    """A hash of this package's source: processes that run different code must not train together."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def exit_now(code: int) -> None:
    """Ends this process after an error that the others may not have: they are waiting for it, and it must not wait for
    them. They end with an error of their own when its connections close."""
    if is_multi_process():
        os._exit(code)
