"""One writer at a time. The kernel frees the lock when its process ends, however it ends.

On network file systems that ignore flock, two machines can still get past it; there the steps of a checkpoint are the
second defence, since none is ever overwritten.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import time

from modse_jax.errors import UserError


class Lock:
    """On a file, from construction to `release`. Raises UserError where another process has it: `busy`, and who it
    is."""

    def __init__(self, path: pathlib.Path, busy: str):
        self._path, self._busy = path, busy
        self._made = [p for p in path.parents if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        self._file.flush()

    def _locked(self):
        while True:
            file = open(self._path, "a+")  # noqa: SIM115  (held while the work lasts)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(
                    f"{self._busy} by {holder}; wait for it, stop it, or use another directory"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()  # its last holder removed the file meanwhile

    def release(self, leave_no_trace: bool = False) -> None:
        """leave_no_trace: also removes what the constructor made, where nothing has come to lie in it."""
        if self._file.closed:
            return
        if leave_no_trace:
            self._path.unlink(missing_ok=True)
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._file.close()
