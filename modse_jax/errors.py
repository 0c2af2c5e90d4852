"""Exceptions and exit codes shared by all of the package."""

import enum


class UserError(Exception):
    """An error that the user can fix, such as a bad option or a damaged file.

    The command line prints it as one line and exits with `ExitCode.BAD_INPUT`. It is raised before
    anything has been written.
    """


class NoRoomError(UserError):
    """The disk has too little room for a run to start."""


class RunError(Exception):
    """An error that stops a run after it has begun.

    The command line prints it as one line and exits with `ExitCode.FAILED`. Checkpoints that were
    saved earlier stay valid.
    """


class DiskFullError(RunError):
    """The disk has no room. With more room, the same command resumes the run."""


def describe_exception(error: BaseException) -> str:
    """Returns the message of an exception; the name of its class if it has none.

    The `str` of a KeyError is the repr of its argument: the missing key, or a sentence if a library
    raised it.
    """
    if isinstance(error, KeyError) and error.args:
        argument = str(error.args[0])
        return argument if " " in argument else f"the key {argument} is missing"
    return str(error) or type(error).__name__


class ExitCode(enum.IntEnum):
    """Exit codes of every command."""

    FINISHED = 0
    FAILED = 1  # the run had begun and cannot continue
    BAD_INPUT = 2  # a bad option or file; nothing has been written
    DIVERGED = 3  # too many training steps in a row, or the last validation, were not finite
    STOPPED = 75  # stopped by a signal; the same command resumes (EX_TEMPFAIL, "try again later")
    INTERRUPTED = (
        130  # a second signal, or Ctrl-C outside training; nothing was saved (128 + SIGINT)
    )
