"""One run at a time in a folder: the run holds a lock on the file `.lock` there (`flock`).

The system releases the lock when the process ends, however it ends, so that a file `.lock` alone locks nothing.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_jax.errors import OptionError

__all__ = ["check_unlocked", "locked"]

NAME = ".lock"
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.1


def check_unlocked(folder: Path) -> None:
    """Raise OptionError where another run works in the folder. Nothing is changed."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        _try_lock(handle, folder, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def remove_abandoned_lock(folder: Path) -> None:
    """Remove the file of a run that was killed after it had ended, of which there is nothing left to do."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):  # another run holds it
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / NAME).unlink(missing_ok=True)
    os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if there is none.

    Raises:
        OptionError: another run works in the folder.
        OSError: the folder cannot be written.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    handle = _acquire(path, folder)
    try:
        with contextlib.suppress(OSError):  # a full disk, say; the lock holds nevertheless
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that can no longer be written; the file alone locks nothing
            path.unlink(missing_ok=True)
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was written into it


def _acquire(path: Path, folder: Path) -> int:
    """Return a file descriptor that holds the lock."""
    for attempt in range(_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(handle, folder, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except OptionError:  # perhaps a run that only looks, and is refused at once
            if attempt + 1 == _ATTEMPTS:
                os.close(handle)
                raise
            time.sleep(_PAUSE_SECONDS)
        os.close(handle)  # or the run before removed the file between the two calls
    raise OptionError(f"--output {folder}: other runs begin and end there; choose another folder")


def _try_lock(handle: int, folder: Path, kind: int) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise OptionError(
            f"--output {folder}: another run works there ({owner}); wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # a file system without locks
