"""A lock file that admits one writer at a time.

The operating system frees the lock when the process ends, however it ends. Some network file
systems ignore locks (flock), so there two machines can both obtain it. Checkpoints are still safe:
a checkpoint that exists is never overwritten.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from modse_jax.errors import UserError

POLL_SECONDS = 0.1


class LockHeldError(UserError):
    """Another process holds the lock."""


class Lock:
    """Holds a lock file from its construction until `release`."""

    def __init__(self, path: pathlib.Path, busy: str) -> None:
        """Acquires the lock, and writes into the file which process on which machine holds it.

        Args:
          path: the lock file. Missing parent directories are created.
          busy: the start of the error message if another process holds the lock, such as
            "DIRECTORY is in use".

        Raises:
          LockHeldError: another process holds the lock.
        """
        self._path = path
        self._created = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._acquire(busy)
        self._file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
        self._file.flush()

    def _acquire(self, busy: str) -> TextIO:
        while True:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open while the lock is held)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise LockHeldError(
                    f"{busy} by {holder}; wait for it, stop it, or use another directory"
                ) from None
            # The previous holder may have removed the file after it was opened here. The lock would
            # then be on a file that no other process can find, so it is opened again.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()

    def release(self, leave_no_trace: bool = False) -> None:
        """Frees the lock; does nothing if it has been freed already.

        Args:
          leave_no_trace: also removes the lock file and the directories that the constructor
            created, if they are empty.
        """
        if self._file.closed:
            return
        if leave_no_trace:
            self._path.unlink(missing_ok=True)
            for folder in self._created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._file.close()


@contextlib.contextmanager
def hold_lock(path: pathlib.Path, busy: str) -> Iterator[None]:
    """Holds a lock in a `with` block; see `Lock`.

    After a UserError in the block, the lock file and the directories that were made for it are
    removed, because bad input leaves no trace.

    Raises:
      LockHeldError: another process holds the lock.
    """
    lock = Lock(path, busy)
    try:
        yield
    except UserError:
        lock.release(leave_no_trace=True)
        raise
    finally:
        lock.release()


@contextlib.contextmanager
def wait_for_lock(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process holds a lock, then holds it in a `with` block."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(path, f"{path} is held"))
                break
            except LockHeldError:
                time.sleep(POLL_SECONDS)
        yield
