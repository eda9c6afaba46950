"""What watches over a run while it trains: goodput, stalled steps, traces of the profiler, and a line of health an hour.

The loop tells the monitor when it makes a step, waits for data, evaluates or saves. None of this changes a result.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from qlora_jax.train.goodput import Goodput
from qlora_jax.train.log import peak_memory_bytes
from qlora_jax.train.stall import StallWatch

__all__ = ["Monitor", "ProfiledSteps"]

_logger = logging.getLogger(__name__)


@dataclass
class ProfiledSteps:
    """The steps of which JAX's profiler writes a trace.

    Attributes:
        first, last: these steps and those between them.
        folder: where the trace is written.
        running: whether a trace is being made.
        done: whether it was made; a step that is done again after a rollback makes no other.
    """

    first: int
    last: int
    folder: Path
    running: bool = False
    done: bool = False

    def begin(self, step: int) -> None:
        """Start the trace before a step, if it belongs to the steps."""
        if self.first <= step <= self.last and not self.running and not self.done:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def end(self, step: int | None = None) -> None:
        """Write the trace after a step, if it is the last one; None: if a trace is being made at all."""
        if self.running and (step is None or step >= self.last):
            self.running, self.done = False, True
            jax.profiler.stop_trace()
            _logger.info("The trace of the profiler is in %s.", self.folder)


@dataclass
class Monitor:
    """What watches over a run.

    Attributes:
        goodput: the time by causes.
        stall: the watch over each step but the first one of the process, which is compiled; None: no watch.
        profile: the steps of which a trace is made; None: none.
        health_every: the seconds between two lines of health; 0: none.
    """

    goodput: Goodput = field(default_factory=Goodput)
    stall: StallWatch | None = None
    profile: ProfiledSteps | None = None
    health_every: float = 0.0
    _said: float = field(default_factory=lambda: time.monotonic())
    _steps: int = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Watch over a step."""
        name = f"step {step}" + (f" of process {jax.process_index()}" if jax.process_count() > 1 else "")
        watch = nullcontext() if self.stall is None or self._steps == 0 else self.stall.over(name)
        if self.profile is not None:
            self.profile.begin(step)
        with self.goodput.step(step), watch, jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._steps += 1
        if self.profile is not None:
            self.profile.end(step)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count the time of the block as compiling, and give a step in which it is as much time as it needs."""
        with self.goodput.phase("compiling"), nullcontext() if self.stall is None else self.stall.paused():
            yield

    def report_health(self, row: dict[str, Any], steps: int) -> None:
        """Log a line of health after a step, if one is due.

        Args:
            row: the record of the step.
            steps: the number of steps of the run.
        """
        if self.health_every == 0 or time.monotonic() - self._said < self.health_every:
            return
        self._said = time.monotonic()
        loss = f"loss {row['loss']:.4f}" if "loss" in row else "skipped"
        _logger.info(
            "Step %d of %d: %s, %s tokens/s, %s, goodput %.1f %%.",
            row["step"],
            steps,
            loss,
            f"{row['tokens_per_second']:,.0f}",
            memory(),
            100 * self.goodput.share,
        )

    def close(self) -> None:
        """End a trace that is being made, and write the goodput."""
        if self.profile is not None:
            self.profile.end()
        self.goodput.write()


def memory() -> str:
    """Return the memory that this process uses on its fullest device, where it is counted, and on the host, in words."""
    found = [statistics for device in jax.local_devices() if (statistics := device.memory_stats())]
    parts = [f"host memory {_resident_bytes() / 2**30:.2f} GiB"]
    if found:
        fullest = max(found, key=lambda statistics: statistics.get("bytes_in_use", 0))
        limit = f" of {fullest['bytes_limit'] / 2**30:.2f}" if "bytes_limit" in fullest else ""
        parts.insert(0, f"device memory {fullest.get('bytes_in_use', 0) / 2**30:.2f}{limit} GiB")
    return ", ".join(parts)


def _resident_bytes() -> int:
    """Return the resident memory of this process; where the system does not say it, the peak."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes()
