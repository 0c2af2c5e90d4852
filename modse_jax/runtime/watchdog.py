"""A watchdog that ends a process which makes no progress."""

import faulthandler
import sys


def reset(minutes: float) -> None:
    """Starts the countdown again; 0 disables it.

    If `minutes` pass without another call, the stack of every thread is printed and the process
    exits with code 1. A hung collective or file system would otherwise block the run forever.
    """
    if minutes:
        # sys.__stderr__ has a file descriptor even if sys.stderr was replaced.
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=sys.__stderr__)
    else:
        cancel()


def cancel() -> None:
    """Stops the countdown."""
    faulthandler.cancel_dump_traceback_later()
