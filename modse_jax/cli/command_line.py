"""Runs a command: parses its flags, and reports errors as one line and an exit code."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from modse_jax.config import loading
from modse_jax.errors import ExitCode, RunError, UserError, describe_exception
from modse_jax.runtime import console_encoding, files, malloc

FLAGS = flags.FLAGS

# Errors that absl and ml_collections raise for flags that cannot be parsed.
FLAG_ERRORS = (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
    UserError,
)


def run(main: Callable[[], int], define_flags: Callable[[], None], usage: str) -> None:
    """Runs a command and exits the process with its exit code.

    Args:
      main: the command. Returns the exit code, usually an `ExitCode`. A UserError or RunError that
        it raises is printed as one line.
      define_flags: defines the flags of the command.
      usage: the text that --help prints above the flags.
    """
    console_encoding.escape_unprintable()
    malloc.use_large_pages()
    logging.set_verbosity(logging.ERROR)  # Orbax logs every step of a save
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not sys.stderr.isatty():
        # Keeps the progress bars of libraries out of log files. tqdm reads it when imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    _define_all_flags(define_flags)
    sys.modules["__main__"].__doc__ = usage  # where absl looks for it
    app.run(lambda _: _run_main(main), flags_parser=_parse_flags)


def config_values(name: str) -> dict:
    """Returns the nested dictionary of option values that a config flag and its overrides give.

    Args:
      name: the name of the flag, such as "config".

    Raises:
      UserError: the config file cannot be loaded.
    """
    flag: Any = FLAGS[name]
    try:
        return flag.value.to_dict()
    except OSError as error:
        file = flag.config_filename or "(none)"
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"--{name}={file} cannot be loaded: {reason}; the configs are in configs/"
        ) from None


def _define_all_flags(define_flags: Callable[[], None]) -> None:
    before = set(FLAGS)
    define_flags()
    # --help lists only the flags of the main module, which absl identifies by sys.argv[0].
    for name in set(FLAGS) - before:
        FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])
    _define_process_flags()


def _define_process_flags() -> None:
    """Defines the flags for runs with several processes.

    Only --helpfull lists them, because most users do not need them.
    """
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, if several processes train as one and no launcher sets it.",
    )
    flags.DEFINE_integer("process_count", 0, "The number of processes.", lower_bound=0)
    flags.DEFINE_integer("process_index", -1, "The index of this process, from 0.", lower_bound=-1)
    flags.DEFINE_bool(
        "distributed", False, "Let JAX detect the other processes (TPU pod, Kubernetes)."
    )


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = FLAGS(argv)
    except FLAG_ERRORS as error:
        sys.exit(_print_error(_explain_flag_error(argv, error)))
    if len(rest) > 1:
        sys.exit(_print_error(f"unexpected argument {rest[1]!r}; options are written --name=value"))
    return rest


def _explain_flag_error(argv: list[str], error: Exception) -> str:
    """Returns the message for an error that absl or ml_collections raised for the flags.

    Theirs do not have the name of an unknown option.
    """
    for argument in argv[1:]:
        option = re.match(r"--?(\w+)\.([\w.]+)(=|$)", argument)
        if option and _is_config_flag(option[1]):
            unknown = loading.explain_unknown(option[2])
            if unknown:
                return unknown
    return describe_exception(error)


def _is_config_flag(name: str) -> bool:
    return name in FLAGS and hasattr(type(FLAGS[name]), "config_filename")


def _run_main(main: Callable[[], int]) -> int:
    # Imported here: JAX takes a second to import, which a mistyped flag need not wait for.
    from modse_jax.runtime import compilation_cache, processes

    try:
        processes.start(
            FLAGS.coordinator, FLAGS.process_count, FLAGS.process_index, FLAGS.distributed
        )
        compilation_cache.enable()
        return main()
    except UserError as error:
        return _print_error(error)
    except RunError as error:
        _print_error(error)
        sys.stdout.flush()
        # Not sys.exit: a thread that waits for a full disk would keep the process alive.
        os._exit(ExitCode.FAILED)
    except OSError as error:
        if error.errno not in files.DISK_FULL:
            raise
        _print_error(
            f"cannot write {error.filename or 'a file'}: {error.strerror}; make room and run the "
            "same command again"
        )
        processes.exit_now(ExitCode.FAILED)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        processes.exit_now(ExitCode.INTERRUPTED)
        return ExitCode.INTERRUPTED
    except Exception as error:
        if processes.is_multi_process():
            _report_failed_process(error)
            processes.exit_now(ExitCode.FAILED)
        raise


def _report_failed_process(error: Exception) -> None:
    """Prints an error of one of several processes.

    It may be only the consequence of the failure of another process, so the message says so.
    """
    from modse_jax.runtime import processes

    traceback.print_exc()
    _print_error(
        f"process {processes.index()} of {processes.count()} stopped: "
        f"{type(error).__name__}: {describe_exception(error)[:300]}; if another process has "
        "ended, its own output gives the reason. Start all of them again: the run resumes from its "
        "last checkpoint"
    )


def _print_error(error: object) -> ExitCode:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return ExitCode.BAD_INPUT
