"""What watches over a run: the accounts of its time with a made-up clock, stacks of a step that hangs, lines and traces.

One test starts a process without JAX, and another writes a trace. The module takes about 3 s.
"""

import itertools
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from qlora_jax.train import STALLED_EXIT_CODE, Goodput, Monitor, ProfiledSteps, StallWatch


class Clock:
    """A clock that a test moves."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def test_every_second_belongs_to_one_cause(tmp_path: Path) -> None:
    clock = Clock()
    goodput = Goodput(clock, Clock())
    clock.seconds += 3
    with goodput.phase("loading"):
        clock.seconds += 5
    for step in (1, 2):
        with goodput.step(step):
            with goodput.phase("data"):
                clock.seconds += 1
            clock.seconds += 10
    goodput.discard_step()
    with goodput.phase("evaluating"):
        clock.seconds += 2
    assert goodput.share == 10 / 32
    assert goodput.seconds == {"starting": 3, "loading": 5, "data": 2, "useful": 10, "skipped": 10, "evaluating": 2}
    assert goodput.describe() == (
        "Goodput 31.2% of 32.0 s (skipped 31.2%, loading 15.6%, starting 9.4%, evaluating 6.2%, data 6.2%)"
    )


def test_the_account_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Steps that the process before had done are not useful once more, and a clock that jumps back takes nothing away."""
    path, shares = tmp_path / "goodput.json", []
    for began, first, reached in ((100.0, 1, -1), (150.0, 3, 5), (20.0, 4, 4)):
        clock = Clock()
        goodput = Goodput(clock, Clock(began))
        goodput.open(path, reached)
        for step in range(first, 6):
            with goodput.step(step):
                clock.seconds += 10
        shares.append(goodput.share)
    assert goodput.reached == 5
    assert goodput.seconds == {"starting": 0, "useful": 50, "redone": 50}
    assert shares == [1.0, 50 / 80, 50 / 100]
    written = json.loads(path.read_text("utf-8"))
    assert (written["restarts"], written["between_processes_seconds"]) == (2, 50.0)
    assert "2 restarts, 50 s between the processes" in goodput.describe()


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": 3}', "{"])
def test_a_damaged_account_begins_anew(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "goodput.json").write_text(text)
    goodput = Goodput(Clock(), Clock())
    goodput.open(tmp_path / "goodput.json", 7)
    assert goodput.reached == 7
    assert "goodput.json: is damaged" in caplog.text
    assert json.loads((tmp_path / "goodput.json").read_text("utf-8"))["restarts"] == 0


def test_the_stacks_of_a_stalled_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once, to the file; a step in time and one that compiles write nothing."""
    path = tmp_path / "stalled.txt"
    watch = StallWatch(60, path)
    with watch.over("step 1"):
        pass
    assert not path.exists()
    watch = StallWatch(0.05, path)
    with watch.over("step 2"), watch.paused():
        threading.Event().wait(0.2)
    assert not path.exists()
    reported = threading.Event()
    logging.getLogger("qlora_jax.train.stall").addFilter(lambda record: reported.set() or True)
    with watch.over("step 3"):
        assert reported.wait(60)
        threading.Event().wait(0.2)
    text = path.read_text("utf-8")
    assert text.count("step 3 has taken 0.05 s") == 1
    assert "in test_the_stacks_of_a_stalled_step" in text
    assert text.count("Current thread") == 1
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("step 3 has taken more than 0.05 s and is in ")
    assert str(path) in message


def test_a_stalled_process_can_end(tmp_path: Path) -> None:
    """The module alone, which imports no JAX: the main thread hangs."""
    source = Path(sys.modules[StallWatch.__module__].__file__ or "").read_text("utf-8")
    (tmp_path / "stall.py").write_text(source)
    code = (
        "import pathlib, stall, time\n"
        f"with stall.StallWatch(0.2, pathlib.Path({str(tmp_path / 'stalled.txt')!r}), exits=True).over('step 4'):\n"
        "    time.sleep(600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == STALLED_EXIT_CODE
    assert 'File "<string>", line 3' in done.stderr
    assert f"the process ends with exit code {STALLED_EXIT_CODE}" in done.stderr
    assert (tmp_path / "stalled.txt").read_text("utf-8").count("step 4 has taken 0.2 s") == 1


def test_the_first_step_of_a_process_may_take_long(tmp_path: Path) -> None:
    monitor = Monitor(stall=StallWatch(0.05, tmp_path / "stalled.txt"))
    with monitor.step(5):
        threading.Event().wait(0.2)
    assert not (tmp_path / "stalled.txt").exists()


def test_a_line_of_health(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One an hour: steps of half an hour each."""
    times = itertools.count(0.0, 1800.0)
    monkeypatch.setattr("qlora_jax.train.monitor.time.monotonic", lambda: clock.seconds)
    clock = Clock()
    caplog.set_level(logging.INFO)
    monitor = Monitor(Goodput(clock, clock), health_every=3600)
    row: dict[str, Any] = {"loss": 1.25, "tokens_per_second": 1234.5}
    for step in range(1, 6):
        clock.seconds = next(times)
        monitor.report_health(row | {"step": step}, 9)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in said] == ["Step 3 of 9: loss 1.2500", "Step 5 of 9: loss 1.2500"]
    assert "1,234 tokens/s" in said[0]
    assert "host memory" in said[0]
    assert "goodput 0.0 %" in said[0]


def test_a_trace_of_some_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monitor = Monitor(profile=ProfiledSteps(2, 3, tmp_path / "profile"))
    running = []
    for step in (1, 2, 3, 2, 3):  # the steps are done again after a rollback
        with monitor.step(step):
            assert monitor.profile is not None
            running.append(monitor.profile.running)
            jnp.zeros(3).block_until_ready()
    monitor.close()
    assert running == [False, True, True, False, False]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert f"The trace of the profiler is in {tmp_path / 'profile'}." in caplog.text
