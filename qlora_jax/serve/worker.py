"""The engine in a thread of its own: requests come from any thread, events go to the listener of each request.

Another thread compiles the grammars of requests, one after another, before the engine gets them. So a grammar that takes
long delays other requests with grammars, and no others.

An error of the device ends all requests and refuses new ones: what the device holds is then unknown.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qlora_jax.errors import QLoRAError
from qlora_jax.serve.answer import Event
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.interfaces import Grammar
from qlora_jax.serve.request import Request
from qlora_jax.serve.scheduler import BusyError

__all__ = ["StoppedError", "Worker"]

_logger = logging.getLogger(__name__)
_LOADING_SECONDS = 0.005  # between two looks for an adapter that is being loaded, if there is nothing else to do
_GRAMMAR_SECONDS = 30.0  # that a request may wait for the grammars of others
Listener = Callable[[Event], None]


class StoppedError(QLoRAError):
    """The engine takes no requests any more."""


class Worker:
    """A thread that runs an engine.

    Attributes:
        engine: the engine; only its thread may call it.
        failure: the error that ended the thread; None: none did.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.failure = engine, None
        self._commands: deque[Callable[[], None]] = deque()
        self._listeners: dict[int, Listener] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping and self.failure is None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> "Future[int]":
        """Give a request to the engine; return its ticket, or the error that it is refused with, as soon as it is known.

        Args:
            request: the request.
            listener: called in the engine's thread with each event of the request; it must not wait.
        """
        future: Future[int] = Future()
        if request.grammar is None:
            self._submit(request, None, listener, future)
            return future
        latest = time.monotonic() + _GRAMMAR_SECONDS

        def compile_grammars() -> None:
            try:
                if future.cancelled() or not self.alive:
                    grammars = None
                elif time.monotonic() > latest:
                    raise BusyError("the grammars of other requests take too long: try again later")
                else:
                    self.engine.check(request)
                    grammars = self.engine.grammars(request)
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                self._submit(request, grammars, listener, future)

        self._compiler.submit(compile_grammars)
        return future

    def _submit(
        self, request: Request, grammars: Sequence[Grammar] | None, listener: Listener, future: "Future[int]"
    ) -> None:
        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                ticket = self.engine.submit(request, grammars)
            except Exception as error:
                future.set_exception(error)
            else:
                self._listeners[ticket] = listener
                future.set_result(ticket)

        if not self._command(command) and future.set_running_or_notify_cancel():
            future.set_exception(StoppedError("the server is stopping"))

    def cancel(self, ticket: int) -> None:
        """End the answers to a request; its listener gets their last events."""
        self._command(lambda: self.engine.cancel(ticket))

    def stop(self, seconds: float) -> bool:
        """Take no more requests, and end the thread as soon as all answers have ended; return whether they had time to.

        Args:
            seconds: how long the answers may take; then they are cancelled.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        deadline = time.monotonic() + seconds
        self._thread.join(seconds)
        in_time = not self._thread.is_alive() and time.monotonic() <= deadline
        if self._thread.is_alive():
            with self._wake:
                self._commands.append(self._cancel_all)  # after the requests that wait to be given to the engine
                self._wake.notify()
            self._thread.join()
        return in_time

    def _cancel_all(self) -> None:
        for ticket in list(self._listeners):
            self.engine.cancel(ticket)

    def _command(self, command: Callable[[], None]) -> bool:
        with self._wake:
            if self._stopping or self.failure is not None or not self._thread.is_alive():
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._stopping or self.engine.busy):
                        self._wake.wait()
                    commands = list(self._commands)
                    self._commands.clear()
                    if self._stopping and not commands and not self.engine.busy:
                        return
                for command in commands:
                    command()
                self._tell(self.engine.step())
                if self.engine.busy and self.engine.waits:
                    time.sleep(_LOADING_SECONDS)
        except BaseException as error:
            _logger.exception("the engine failed; no more requests are answered")
            with self._wake:
                self.failure = error
                commands = list(self._commands)
            for command in commands:  # so that every request gets a ticket or an error; none is answered
                try:
                    command()
                except Exception:
                    _logger.debug("a command after the failure", exc_info=True)
            self._tell([Event(ticket, 0, finish="error") for ticket in self._listeners])

    def _tell(self, events: Sequence[Event]) -> None:
        """Give the events of a step, in which several answers to a request may have ended, to their listeners."""
        for event in events:
            if (listener := self._listeners.get(event.ticket)) is not None:
                listener(event)
        for event in events:
            if event.finish is not None and not self.engine.running(event.ticket):
                self._listeners.pop(event.ticket, None)
