"""A section in a process of its own, with a limit of time.

So a section starts with an unused device, its peak of memory is its own, and a crash or an endless compilation costs its rows
only. A machine with several devices shows the process one of them.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from scripts.benchmarks.workers import ROOT
from scripts.verification.checks import Row, without_result
from scripts.verification.sections import Section

# One device: kernels are for programs of one device, and so are the plans that are compared. A TPU's variables are libtpu's.
ONE_DEVICE = {
    "gpu": {"CUDA_VISIBLE_DEVICES": "0"},
    "tpu": {
        "TPU_VISIBLE_CHIPS": "0",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    },
}


def rows_in_process(section: Section, seconds: float, environment: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a section that a process of its own computes, all of them, within the time."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.verification.worker", section],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment_of_one(environment), "PYTHONPATH": path},
        start_new_session=True,  # so that what it started ends with it
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    timer = threading.Timer(seconds, _end, (process,))
    for thread in (*readers, timer):
        thread.start()
    left: list[str] | None = None
    try:
        while (line := lines.get()) is not None:
            values: Any = json.loads(line)
            if left is None:
                left = values
            else:
                left.remove(values["name"])
                yield Row(**values)
        process.wait()
    finally:
        in_time = timer.is_alive()
        timer.cancel()
        _end(process)
        process.wait()
    readers[1].join(5)
    yield from _of_the_rest(section, left, in_time, process.returncode, errors)


def environment_of_one(more: dict[str, str]) -> dict[str, str]:
    """Return the environment of this process, with those of `more` that the user has not set."""
    return {**more, **os.environ}


def _of_the_rest(section: Section, left: list[str] | None, in_time: bool, code: int, errors: list[str]) -> Iterator[Row]:
    names = [f"all of {section}"] if left is None else left
    last = next((line.strip() for line in reversed(errors) if line.strip()), "nothing on stderr")
    reason = f"the process ended with status {code}: {last[:300]}" if in_time else "the time was over"
    for row in without_result(names, reason, failed=in_time):
        yield Row(row.name, row.status, row.text, section=section)


def _pass_on(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]") -> None:
    """End the process and all that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
