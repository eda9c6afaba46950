"""Ctrl-C and SIGTERM: one signal ends a command, with one line on stderr and the exit code 130 or 143.

    while packages are imported      the process ends at once                                       (`end_while_importing`)
    while a command works            the process ends at once, with a line that says what is saved  (`Interrupts`)
    within a block that cleans up    `Interrupted` is raised, so that temporary files are removed   (`cleaning_up`)
    within a step of training        it is finished and saved first; the next signal raises         (`deferred`)

An exception is not enough: Python drops one that is raised in a destructor or in a callback of a library, and libraries
catch every exception, as JAX does while it looks for devices. Where nothing is to be cleaned up, the process therefore ends
without one. Otherwise a thread watches, and ends the process if it still runs some seconds after the signal. The thread is
woken through a pipe (`signal.set_wakeup_fd`), also while the main thread is inside a compiler.

Nothing is installed on import: a program that uses the package as a library keeps its own handlers.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

__all__ = ["Interrupted", "Interrupts", "cleaning_up", "deferred", "end_while_importing", "plain_interrupt"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 5.0  # the time to clean up after a signal
_SHORT_SECONDS = 0.3  # the time for the main thread to end the process itself
_AFTER_DEFERRAL = 0  # beside the numbers of signals in the pipe: a block that deferred one has ended
REPEAT_SECONDS = 0.5  # signals that follow sooner count as one: a shell and a launcher may both pass on the same Ctrl-C


class Interrupted(KeyboardInterrupt):
    """A signal stopped a command.

    Attributes:
        number: the signal.
    """

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(*([text] if text else []))
        self.number = number


def end_while_importing() -> None:
    """End the process at once at Ctrl-C or SIGTERM, until `Interrupts` takes over."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    _end(number, "nothing was begun")


def _end(number: int, text: str) -> NoReturn:
    # Not through sys.stderr, whose lock the interrupted code may hold.
    with contextlib.suppress(OSError):
        os.write(2, _line(text).encode())
    os._exit(128 + number)


def _line(text: str) -> str:
    return f"\ninterrupted{f': {text}' if text else ''}\n"


class Interrupts:
    """What signals do while a command works; a context manager for the main thread.

    Attributes:
        describe: returns what is saved so far, for the message. It may be called in any thread, at any point of the work.
        at_once: whether a signal ends the process at once; otherwise it always raises `Interrupted`.
        received: the first signal; None: there was none.
        cleanups: how many blocks have to clean up.
        handled: whether a block has dealt with the last signal and goes on.
    """

    def __init__(self) -> None:
        self.describe: Callable[[], str] = str
        self.at_once = False
        self.received: int | None = None
        self.cleanups = 0
        self.handled = False
        self._ending = threading.Lock()  # never released: who holds it says that the process ends
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._raised_at = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # other threads may not set a handler
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        self._unraisable_before = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None or self.received is not None:  # the process ends; the thread sees to it that it does
            return
        for number, handler in self._before.items():
            if handler is _end_at_once:  # the command is done; the interpreter may wait for threads
                handler = self._on_late_signal
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = self._unraisable_before
        signal.set_wakeup_fd(self._wakeup_before)
        write_end, self._pipe = self._pipe[1], None
        os.close(write_end)  # ends the thread

    def say(self, interruption: BaseException) -> int:
        """Print that the command was interrupted, once, and return its exit code."""
        if isinstance(interruption, Interrupted) and self.received is None:
            self._start_grace(interruption.number)
        text = str(interruption) if isinstance(interruption, KeyboardInterrupt) else ""
        if self._ending.acquire(blocking=False):
            print(_line(text or self._description()), end="", file=sys.stderr, flush=True)
        return 128 + (self.received or signal.SIGINT)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._raised_at = number, time.monotonic()
            if not self._ends_at_once():
                raise Interrupted(number=number)
        elif time.monotonic() - self._raised_at < REPEAT_SECONDS:
            return
        with contextlib.suppress(Exception):  # the interrupted code may be writing
            sys.stdout.flush()
        self._end(number)

    def _on_late_signal(self, number: int, _: FrameType | None) -> None:
        self._end(number)

    def _ends_at_once(self) -> bool:
        return self.at_once and not self.cleanups

    def _on_unraisable(self, unraisable: Any) -> None:
        if self.received is not None and isinstance(unraisable.exc_value, Interrupted):
            self._end(self.received)  # the exception was dropped where it was raised
        self._unraisable_before(unraisable)

    def _start_grace(self, number: int) -> None:
        """Let the process end soon after a signal that a block had deferred."""
        self.received = number
        self._wake(number)

    def after_deferral(self) -> None:
        """Let the process end within `GRACE_SECONDS` from now on, as its work ends after a signal that a block deferred."""
        self._wake(_AFTER_DEFERRAL)

    def _wake(self, byte: int) -> None:
        if self._pipe is not None:
            os.write(self._pipe[1], bytes([byte]))

    def _watch(self, pipe: int) -> None:
        """End the process where a signal has not, some time after it; return when the other end of the pipe is closed."""
        count, last, deadline, number = 0, -REPEAT_SECONDS, None, int(signal.SIGINT)
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if select.select([pipe], [], [], wait)[0]:
                if not (found := os.read(pipe, 64)):
                    os.close(pipe)
                    return
                now, deferred_before = time.monotonic(), _AFTER_DEFERRAL in found
                if signals := [byte for byte in found if byte in SIGNALS]:
                    number = signals[-1]
                    count, last = count + (now - last >= REPEAT_SECONDS), now
                if signals or deferred_before:
                    at_once = self._ends_at_once() and not deferred_before
                    deadline = now + (_SHORT_SECONDS if at_once else GRACE_SECONDS)
            else:
                owner = getattr(signal.getsignal(number), "__self__", None)
                if select.select([pipe], [], [], 0)[0]:  # a block that deferred a signal has just ended
                    continue
                if not self.handled and (owner is self or (isinstance(owner, Deferral) and count > 1)):
                    self._end(number)
                if not isinstance(owner, Deferral):
                    count = 0  # other handlers make of a signal what they like
                self.handled, deadline = False, None

    def _description(self) -> str:
        try:
            return self.describe()
        except Exception:  # it reads files, and must not hide the interruption
            return ""

    def _end(self, number: int) -> NoReturn:
        if self._ending.acquire(blocking=False):
            _end(number, self._description())
        time.sleep(_SHORT_SECONDS)  # another thread is about to end the process
        os._exit(128 + number)


class Deferral:
    """A block that finishes its work before a signal stops it.

    Attributes:
        number: the signal that arrived; None: none did.
    """

    def __init__(self, note: str) -> None:
        self.number: int | None = None
        self._note, self._at = note, 0.0

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Remember the signal; raise `Interrupted` at the next one."""
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, _line(self._note).encode())
        elif time.monotonic() - self._at >= REPEAT_SECONDS:
            raise Interrupted(number=number)


@contextmanager
def deferred(note: str) -> Iterator[Deferral]:
    """Remember Ctrl-C or SIGTERM in the block instead of raising at once; a second signal raises `Interrupted`.

    The block asks `Deferral.number` and stops when it can. In a thread other than the main one, nothing is changed.

    Args:
        note: printed at the first signal.
    """
    deferral = Deferral(note)
    if threading.current_thread() is not threading.main_thread():
        yield deferral
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, deferral.on_signal)
    try:
        yield deferral
    finally:
        owner = _owner(before[signal.SIGINT])
        if owner is not None and deferral.number is not None:
            owner.after_deferral()  # before its handlers are back, so that the thread never sees them with the old time
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Let a signal in the block raise `Interrupted`, so that the block can remove what it has begun to write."""
    owner = _owner(signal.getsignal(signal.SIGINT))
    if owner is None:
        yield
        return
    owner.cleanups += 1
    try:
        yield
    finally:
        owner.cleanups -= 1


def _owner(handler: Any) -> Interrupts | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Interrupts) else None


@contextmanager
def plain_interrupt() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, which catches it and goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = _owner(signal.getsignal(signal.SIGINT))

    def on_signal(*_: object) -> NoReturn:
        if owner is not None:
            owner.handled = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
