"""A step that takes too long: the stacks of all threads are written down once, so that one can see what it waits for.

A step of a compiled program can hang for ever, for example in a collective operation that one host does not join, or in a
read of a dead file system. A thread waits beside the step. When the time is over, it writes the stacks to stderr and to a
file, and says in which line the step is. If no thread of Python can run, since the step holds the interpreter's lock, a
timer of `faulthandler` in C writes them to stderr a little later.
"""

import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["STALLED_EXIT_CODE", "StallWatch"]

STALLED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
_GRACE = 5.0  # seconds until the timer in C
_logger = logging.getLogger(__name__)


class StallWatch:
    """Watches over blocks of code, one at a time, which the main thread runs."""

    def __init__(self, seconds: float, path: Path, *, exits: bool = False) -> None:
        """Make a watch.

        Args:
            seconds: the time that a block may take; 0: any time.
            path: the file to which the stacks are appended. It is made when they are.
            exits: whether the process then ends, with STALLED_EXIT_CODE; without Python, with exit code 1.
        """
        self._seconds, self._path, self._exits = seconds, path, exits
        self._name: str | None = None  # of the block that is watched
        self._timer: threading.Timer | None = None

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Watch over the block, which is called `name` in messages."""
        if self._seconds == 0:
            yield
            return
        self._start(name)
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch over the block, which is within another; the time of that one begins anew afterwards."""
        name = self._name
        self._stop()
        try:
            yield
        finally:
            if name is not None:
                self._start(name)

    def _start(self, name: str) -> None:
        self._name = name
        self._timer = threading.Timer(self._seconds, self._report, (name, threading.get_ident()))
        self._timer.daemon = True
        self._timer.start()
        if stderr := _stderr():
            faulthandler.dump_traceback_later(self._seconds + _GRACE, file=stderr, exit=self._exits)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
        self._name = self._timer = None

    def _report(self, name: str, thread: int) -> None:
        """Write the stacks, and say where the thread is that runs the block."""
        faulthandler.cancel_dump_traceback_later()
        frame = sys._current_frames().get(thread)
        place = "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
        stacks = f"the stacks of all threads are in {self._path}"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name} has taken {self._seconds:g} s\n")
                file.flush()
                faulthandler.dump_traceback(file)
                file.write("\n")
        except OSError as error:
            stacks = f"{self._path} cannot be written ({error.strerror})"
        if stderr := _stderr():
            faulthandler.dump_traceback(stderr)
        end = f"; the process ends with exit code {STALLED_EXIT_CODE}" if self._exits else ""
        _logger.warning("%s has taken more than %g s and is in %s; %s%s.", name, self._seconds, place, stacks, end)
        if self._exits:
            os._exit(STALLED_EXIT_CODE)


def _stderr() -> TextIO | None:
    """Return the standard error output if it is a file; in a notebook it may be none."""
    for stream in (sys.stderr, sys.__stderr__):
        with contextlib.suppress(AttributeError, ValueError, io.UnsupportedOperation):
            stream.fileno()  # pyright: ignore[reportOptionalMemberAccess]
            return stream
    return None
