"""A file that one process holds at a time."""

import os
import pathlib

from fedjax_clip.core.types import InvalidInput

try:
    import fcntl
except ImportError:  # Windows, where a run's directory cannot be locked
    fcntl = None  # type: ignore[assignment]


def check() -> None:
    """Refuses a system without such locks.

    Raises:
      InvalidInput: on Windows.
    """
    if fcntl is None:
        raise InvalidInput(
            "A run locks its directory with fcntl, which Windows lacks: run it on Linux or macOS, or in WSL."
        )


def taken(path: pathlib.Path) -> int:
    """The open lock file, once no other process has it.

    A process that ends removes the file while it still holds the lock. A waiting process must therefore open the new
    file.

    Raises:
      BlockingIOError: another process has it.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), os.lstat(path)):
                return lock
        except FileNotFoundError:  # removed in between
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
