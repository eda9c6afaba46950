"""A section in a process of its own, with a limit of time.

So a section starts with an unused device, its peak of memory is its own, and a crash or an endless compilation costs its
rows only. A machine with several devices shows the process one of them.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
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


def rows_in_process(section: Section, names: Sequence[str], seconds: float, environment: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a section, which a process of its own computes; those that it does not give are made here.

    Args:
        section: the section.
        names: the names of all of its rows.
        seconds: the time after which the process is ended.
        environment: variables to set where the user has not set them.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.verification.worker", section],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, **os.environ, "PYTHONPATH": path},
        start_new_session=True,  # so that what it started ends with it
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    timer = threading.Timer(seconds, _end, (process,))
    left, over = list(names), False
    with process:
        try:
            for thread in (*readers, timer):
                thread.start()
            while (line := lines.get()) is not None:
                if line.endswith("\n"):  # else the process ended within it
                    row = Row(**json.loads(line))
                    left.remove(row.name)
                    yield row
            process.wait()
            over = not timer.is_alive()
        finally:
            timer.cancel()
            _end(process)
            for reader in readers:
                reader.join()
    last = next((line.strip() for line in reversed(errors) if line.strip()), "nothing on stderr")
    reason = (
        f"the time of this section was over after {seconds:.0f} s (--minutes gives more)"
        if over
        else f"the process ended with status {process.returncode}: {last[:300]}"
    )
    for row in without_result(left, reason, failed=not over):
        yield Row(row.name, row.status, row.text, section=section)


def _pass_on(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]") -> None:
    """End the process and all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
