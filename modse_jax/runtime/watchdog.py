"""A watchdog that ends a process which makes no progress."""

import faulthandler
import sys


def reset(minutes: float) -> None:
    """Ends the process if `minutes` pass without another call of this function.

    The stack of every thread is printed, and the exit code is 1. A hung collective or file system
    would otherwise block the run forever. 0 minutes disable the watchdog.
    """
    if minutes:
        # sys.__stderr__ has a file descriptor even if sys.stderr was replaced. It is None if the
        # process has no stderr at all.
        file = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=file)
    else:
        cancel()


def cancel() -> None:
    """Disables the watchdog."""
    faulthandler.cancel_dump_traceback_later()
