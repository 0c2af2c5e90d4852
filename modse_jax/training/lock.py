"""One writer per workdir. The kernel frees the lock when its process ends, however it ends.

On network file systems that ignore flock, two machines can still get past it; there the steps of a checkpoint are the
second defence, since none is ever overwritten.
"""
import contextlib
import fcntl
import os
import pathlib
import socket
import time

from modse_jax.config import UserError

NAME = ".lock"


class Lock:
    """Held from construction to `release`. Raises UserError, naming the holder, where another process has it."""

    def __init__(self, directory: pathlib.Path):
        self._path = directory / NAME
        self._made = [p for p in (directory, *directory.parents) if not p.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since "
                         f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def _locked(self):
        while True:
            file = open(self._path, "a+")  # noqa: SIM115  (held while the run lasts)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(f"{self._path.parent.parent} is in use by {holder}; wait for it, stop it, or use "
                                "another --workdir") from None
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            file.close()    # its last holder removed the file meanwhile

    def release(self, leave_no_trace: bool = False) -> None:
        """leave_no_trace: also removes what the constructor made, where nothing has come to lie in it."""
        if leave_no_trace:
            self._path.unlink(missing_ok=True)
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        self._file.close()
