"""Goodput: the share of a run's wall time that it spends in steps that count, and what the rest of the time goes to.

Every moment of a run belongs to one cause. `phase` enters a cause, and the cause before goes on afterwards:

    starting     options, data and checks; restoring a checkpoint; whatever has no other cause
    loading      reading and quantising the weights
    compiling    waiting for the compiler
    data         waiting for the next batch, and moving it to the devices
    useful       steps that are done for the first time
    redone       steps that were done before a kill or a rollback, and had to be done again
    skipped      steps whose update was left out
    evaluating   held-out data, samples and questions
    saving       waiting for checkpoints
    finishing    saving the adapter, and measuring it after training

The totals are in a file of the run's folder, so that they go on when the run is restarted. It is written every few seconds:
of a process that is killed, at most these are lost. The time between two processes is counted as well, but not as time of
the run, because nobody knows whether the run was meant to be at work then.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Goodput"]

USEFUL, REDONE, SKIPPED = "useful", "redone", "skipped"
_WRITE_EVERY = 5.0  # seconds
_logger = logging.getLogger(__name__)


class Goodput:
    """The time of a run by its causes, from the moment on when this is made.

    Attributes:
        seconds: seconds by cause, with those of earlier processes of the run.
        reached: the highest step that the run has done; a step up to this one is done again.
        restarts: how many times the run was started again.
        between: seconds between the processes of the run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time) -> None:
        """Start to count.

        Args:
            clock: returns seconds that never go back.
            now: returns the time of day, which is compared with that of other processes.
        """
        self.seconds: dict[str, float] = {}
        self.reached, self.restarts, self.between = 0, 0, 0.0
        self._clock, self._now = clock, now
        self._cause, self._since, self._began = "starting", clock(), now()
        self._last = USEFUL, 0.0  # cause and seconds of the last step
        self._path: Path | None = None
        self._written = clock()

    def open(self, path: Path | None, reached: int) -> None:
        """Add the totals that a file holds from earlier processes of the run, and write there from now on.

        Args:
            path: the file; a damaged one is replaced, with a warning. None: there is none, as in all processes but one.
            reached: the highest step of the records of the run.
        """
        before = None if path is None else _read(path)
        if before is not None:
            for cause, seconds in before["seconds"].items():
                self.seconds[cause] = self.seconds.get(cause, 0.0) + seconds
            self.restarts = before["restarts"] + 1
            self.between = before["between_processes_seconds"] + max(self._began - before["written"], 0.0)
            self.reached = before["reached"]
        self.reached = max(self.reached, reached)
        self._path = path
        self.write()

    @contextmanager
    def phase(self, cause: str) -> Iterator[None]:
        """Count the time of the block to a cause, but for the phases within it."""
        outer = self._switch(cause)
        try:
            yield
        finally:
            self._switch(outer)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Count the time of the block, in which a step is made, as useful or, if it was made before, as redone."""
        cause = REDONE if step <= self.reached else USEFUL
        before = self.seconds.get(cause, 0.0)
        with self.phase(cause):
            yield
        self._last = cause, self.seconds[cause] - before
        self.reached = max(self.reached, step)
        if self._clock() - self._written >= _WRITE_EVERY:
            self.write()

    def discard_step(self) -> None:
        """Count the time of the last step as skipped."""
        cause, seconds = self._last
        self.seconds[cause] -= seconds
        self.seconds[SKIPPED] = self.seconds.get(SKIPPED, 0.0) + seconds

    @property
    def share(self) -> float:
        """The share of useful steps in the time of all processes of the run, from 0 to 1."""
        self._switch(self._cause)
        return self.seconds.get(USEFUL, 0.0) / max(sum(self.seconds.values()), 1e-9)

    @property
    def is_kept(self) -> bool:
        """Whether the totals are written to a file: for a run of its own, and in its first process."""
        return self._path is not None

    def describe(self) -> str:
        """Return the goodput and where the rest of the time went, in one line."""
        share, total = self.share, sum(self.seconds.values())
        lost = sorted(((s, cause) for cause, s in self.seconds.items() if cause != USEFUL and s > 0), reverse=True)
        rest = ", ".join(f"{cause} {seconds / max(total, 1e-9):.1%}" for seconds, cause in lost)
        restarts = f"; {self.restarts} restarts, {self.between:,.0f} s between the processes" if self.restarts else ""
        return f"Goodput {share:.1%} of {total:,.1f} s" + (f" ({rest})" if rest else "") + restarts

    def write(self) -> None:
        """Write the totals. A run goes on if that is not possible."""
        if self._path is None:
            return
        share = self.share
        self._written = self._clock()
        values = {
            "goodput": share,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "between_processes_seconds": self.between,
            "reached": self.reached,
            "written": self._now(),
        }
        temporary = self._path.with_name(f".{self._path.name}.writing")
        try:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            _logger.warning("%s: cannot be written (%s); the goodput of this process is lost.", self._path, error.strerror)
            self._path = None

    def _switch(self, cause: str) -> str:
        """Count the time since the last switch, enter another cause, and return the one before."""
        now, before = self._clock(), self._cause
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._cause, self._since = cause, now
        return before


def _read(path: Path) -> dict[str, Any] | None:
    """Return the totals in a file; None if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seconds = {str(cause): float(value) for cause, value in found["seconds"].items()}
        numbers = {name: float(found[name]) for name in ("between_processes_seconds", "written")}
        return {"seconds": seconds, "restarts": int(found["restarts"]), "reached": int(found["reached"]), **numbers}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _logger.warning("%s: is damaged (%s); the goodput is counted from this process on.", path, error)
        return None
