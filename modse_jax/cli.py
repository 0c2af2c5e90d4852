"""Flags to a Config, and errors to one line and exit code 2, for train.py and eval.py."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from modse_jax.errors import RunError, UserError

BAD_INPUT, FAILED, STOPPED, INTERRUPTED = 2, 1, 75, 130


COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "Where several processes train as one and no launcher tells: HOST:PORT of process 0.",
)


COUNT = flags.DEFINE_integer("process_count", 0, "How many processes there are.", lower_bound=0)


INDEX = flags.DEFINE_integer("process_index", -1, "Which of them this is, from 0.", lower_bound=-1)


DETECT = flags.DEFINE_bool(
    "distributed", False, "Ask the machine (TPU pod, Kubernetes) for the other processes."
)


# On Linux CPUs: large pages for arrays, kept from step to step rather than returned and faulted in again: steps are 1.1
# to 1.5 times as fast (LOG.md). glibc alone reads it, once, when a process starts.
LARGE_PAGES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=8589934592"
)


def use_large_pages() -> None:
    """Starts this process anew with LARGE_PAGES, unless GLIBC_TUNABLES says something already."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = LARGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[[], int]) -> None:
    """main() under absl: its return value is the exit code; bad flags, values and files end in one line and exit code
    2."""
    use_large_pages()
    logging.set_verbosity(logging.ERROR)  # orbax tells of every step it takes
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # libraries that draw bars into a log; read when tqdm is imported
    app.run(lambda _: _exit_code(main), flags_parser=_parse)


def leave_on_signals() -> None:
    """For a run that has not begun and so has nothing to save: a signal ends it with "run me again". The training loop
    puts its own handlers in the place of these."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: os._exit(STOPPED))


def config_values(flag) -> dict:
    """The plain values of a config flag; UserError where its file cannot be loaded."""
    try:
        return flag.value.to_dict()
    except OSError as error:
        file = flags.FLAGS[flag.name].config_filename or "(none)"
        raise UserError(
            f"--config={file} cannot be loaded: {str(error).splitlines()[-1].strip()}; the configs are in "
            f"configs/"
        ) from None


def _exit_code(main):
    from modse_jax.runtime import (
        processes,  # here: jax takes a second that a mistyped flag need not wait for
    )

    try:
        processes.start(COORDINATOR.value, COUNT.value, INDEX.value, DETECT.value)
        return main()
    except UserError as error:
        return _complain(error)
    except RunError as error:
        _complain(error)
        sys.stdout.flush()
        os._exit(FAILED)  # no thread that waits for a full disk may hold the process
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _complain(
            f"cannot write {error.filename or 'a file'}: {error.strerror}; make room and run the same command "
            "again"
        )
        processes.exit_now(FAILED)
        return FAILED
    except KeyboardInterrupt:
        processes.exit_now(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        if processes.is_multi_process():
            traceback.print_exc()
            _complain(
                f"process {processes.index()} of {processes.count()} stopped: {type(error).__name__}: "
                f"{str(error)[:300]}; if another process has ended, its own output says why. Start all of them "
                "again: the run goes on from its last checkpoint"
            )
            processes.exit_now(FAILED)
        raise


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        UserError,
    ) as error:
        sys.exit(_complain(error.args[0] if isinstance(error, KeyError) and error.args else error))
    if len(rest) > 1:
        sys.exit(_complain(f"unexpected argument {rest[1]!r}; options are written --name=value"))
    return rest


def _complain(error):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
