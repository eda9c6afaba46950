"""The records of a run: `metrics.jsonl`, with one line for each step, and the drawing `loss.png`.

A line is written and flushed as soon as its step is done. A run that resumes first deletes the lines of steps after its
checkpoint, so that each step is in the file once. Listeners, such as experiment trackers, receive each new row after it was
written.
"""

import json
import logging
import math
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from qlora_jax.nn.hosts import is_main, of_main
from qlora_jax.train.step import TOKENS, Unit

_logger = logging.getLogger(__name__)


class MetricsLog:
    """A file of JSON lines, such as `metrics.jsonl`, to which rows are appended; each row has a `step`.

    Attributes:
        rows: all rows so far, with those from before the run was resumed.
        reached: the highest step of any row that the file had before, deleted rows included; -1 if it had none.
        listeners: functions that are called with each row that is added.
    """

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Open the file with its rows up to step `resume_at`; a run that starts anew (0) begins with no rows.

        A last line that is incomplete, since the run was killed, is dropped. Other damaged lines are left out with a
        warning: they are records, which no later step depends on. Of several processes, process 0 alone has the file, and
        the others get its rows.
        """
        before = of_main(lambda: _read_rows(path) if path.exists() else [])
        self.rows: list[dict[str, Any]] = [row for row in before if row["step"] <= resume_at] if resume_at > 0 else []
        self.reached = max((row["step"] for row in before), default=-1)
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._path, self._file = path, None
        self._write_all()

    def _write_all(self) -> None:
        if not is_main():
            return
        # Written beside the old file and then moved to its place: no row is lost if the process is killed in between.
        temporary = self._path.with_name(f".{self._path.name}.writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        temporary.replace(self._path)
        self._file = self._path.open("ab", buffering=0)  # a buffer that cannot be written would fail once more at the exit

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Remove and return the rows of the steps after this one, which are done again. Listeners have had them already."""
        self.close()
        removed = [row for row in self.rows if row["step"] > step]
        self.rows[:] = [row for row in self.rows if row["step"] <= step]
        self._write_all()
        return removed

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file and pass it to the listeners.

        Raises:
            OSError: the file cannot be written, e.g. because the disk is full.
        """
        self.rows.append(row)
        if self._file is None:
            return
        line = (json.dumps(row) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for listener in self.listeners:
            listener(row)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines that can be read."""
    *lines, _ = path.read_bytes().split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
    if damaged:
        _logger.warning("%s: left out %d damaged lines, the first is line %d.", path, len(damaged), damaged[0])
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None if it has none: each row has a step, and the loss of an evaluation is a number."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    losses = [row[name] for name in ("loss", "eval_loss") if name in row]
    return row if all(type(loss) in (int, float) for loss in losses) else None


def best_evaluation(rows: Sequence[dict[str, Any]]) -> tuple[int | None, int]:
    """Return (the step of the lowest held-out loss so far, the number of evaluations since then).

    The evaluation before the first step does not count, since nothing is trained then. Of equal losses the first is the
    best. The step is None if no loss is a number.
    """
    best, lowest, since = None, math.inf, 0
    for row in rows:
        if "eval_loss" not in row or row["step"] == 0:
            continue
        since += 1
        if row["eval_loss"] < lowest:
            best, lowest, since = row["step"], row["eval_loss"], 0
    return best, since


def plot_losses(rows: list[dict[str, Any]], path: Path, unit: Unit = TOKENS) -> None:
    """Draw the training loss of every step, its running mean, and the held-out loss, as a PNG file."""
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    from matplotlib.figure import Figure  # its import takes a second, which only callers that draw should wait for

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, a step")
        mean, smooth = losses[0], []
        for loss in losses:
            mean = 0.9 * mean + 0.1 * loss
            smooth.append(mean)
        axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", linewidth=2, label="held out")
    axes.set(xlabel="step", ylabel=f"loss (nats, mean over {unit.name})")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.writing")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def peak_memory_bytes() -> int:
    """Return the peak memory of the first device if it is counted there, else the peak resident memory of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
