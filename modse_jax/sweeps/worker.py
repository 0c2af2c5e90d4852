"""The process that trains the runs of a sweep, one after another.

All runs share one process, so that runs of one shape share one compiled step. The process that
starts it (`runner`) writes one order per line to its standard input, and reads one reply per line
from its standard output. If the worker dies, only the run that it was training has to resume.
"""

import contextlib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator

from modse_jax.config import device_mesh
from modse_jax.config.options import Config
from modse_jax.errors import (
    DiskFullError,
    ExitCode,
    NoRoomError,
    RunError,
    UserError,
    describe_exception,
)
from modse_jax.runtime import compilation_cache, console_encoding, files, signals
from modse_jax.runtime.lock import Lock, LockHeldError
from modse_jax.sweeps import orders, results
from modse_jax.sweeps.orders import Order, Reply
from modse_jax.training import loop
from modse_jax.training.programs import Programs, SharedPrograms

MAX_REASON_LENGTH = 500


def main() -> None:
    """Executes the orders of standard input, and exits when it ends."""
    console_encoding.escape_unprintable()
    signals.exit_on_stop_signals()
    compilation_cache.enable()
    programs = SharedPrograms()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as replies:
        for line in sys.stdin:
            reply = train_run(orders.decode_order(line), programs)
            replies.write(orders.encode_reply(reply))
            if reply.kind == orders.STOPPED:
                sys.exit(ExitCode.STOPPED)
            # A signal must end this process while it waits for the next order.
            signals.exit_on_stop_signals()


def train_run(order: Order, programs: Programs) -> Reply:
    """Trains a run to its end and writes its result. Does nothing if it has a result.

    Args:
        order: the run.
        programs: compiles the programs of the run.
    """
    directory, identity, config = order
    try:
        lock = Lock(directory.run(identity.id) / ".lock", "the run is in use")
    except LockHeldError as error:
        return Reply(orders.BUSY, str(error))
    except OSError as error:
        return _reply_to_os_error(error)
    try:
        if results.read_result(directory, identity.id) is not None:
            return Reply(orders.ENDED, "")
        with _output_in(directory.run(identity.id) / "output.txt"):
            state, reason = _train(config, directory.training(identity.id), programs)
        if state == orders.STOPPED:
            return Reply(orders.STOPPED, "")
        results.write_result(directory, identity, state, reason)
        return Reply(orders.ENDED, "")
    except (DiskFullError, NoRoomError) as error:
        return Reply(orders.DISK_FULL, str(error))
    except OSError as error:
        return _reply_to_os_error(error)
    finally:
        lock.release()


def _reply_to_os_error(error: OSError) -> Reply:
    """Returns the reply to a full disk; raises every other error again."""
    if error.errno not in files.DISK_FULL:
        raise error
    return Reply(orders.DISK_FULL, f"cannot write {error.filename or 'a file'}: {error.strerror}")


def _train(config: Config, workdir: pathlib.Path, programs: Programs) -> tuple[str, str]:
    """Trains until the end. Returns the state of the run, or STOPPED, and the reason."""
    try:
        device_mesh.request_determinism(config)  # before the first use of a device
        code = loop.train(config, str(workdir), programs)
    except (DiskFullError, NoRoomError):
        raise
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return results.FAILED, _one_line(error)
    except OSError as error:
        if error.errno in files.DISK_FULL:
            raise
        traceback.print_exc()
        return results.FAILED, _one_line(f"{type(error).__name__}: {error}")
    except Exception as error:  # such as an error of XLA; the other arms go on
        traceback.print_exc()
        return results.FAILED, _one_line(f"{type(error).__name__}: {describe_exception(error)}")
    if code == ExitCode.STOPPED:
        return orders.STOPPED, ""
    return (results.DIVERGED if code == ExitCode.DIVERGED else results.FINISHED), ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:MAX_REASON_LENGTH]


@contextlib.contextmanager
def _output_in(path: pathlib.Path) -> Iterator[None]:
    """Appends everything that is printed to a file, also by libraries that are not in Python."""
    saved = [os.dup(number) for number in (1, 2)]
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}\n")
        file.flush()
        _flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk is full
            _flush()
        for number, original in zip((1, 2), saved):
            os.dup2(original, number)
            os.close(original)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    main()
