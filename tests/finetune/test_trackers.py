"""Trackers: what they are given, read back from their own files; and a W&B of our own making where that is not installed.

TensorBoard's files are read as the format says (a length, a checksum, an Event, a checksum), with TensorBoard's rule for
runs that resume: a START event makes void what was before it from its step on.
"""

import json
import os
import struct
import sys
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.finetune.reporting import trackers
from qlora_jax.finetune.reporting.trackers import check_trackers, open_trackers

OPTIONS = {"lora": {"rank": 4}, "data": {"data": ["a.jsonl"]}}
ROWS = [
    {"step": 0, "eval_loss": 4.0, "mmlu_accuracy": 0.25},
    {"step": 1, "loss": 3.0, "learning_rate": 0.5},
    {"step": 2, "loss": 2.0, "eval_loss": 2.5},
    {"step": 3, "loss": 1.0},
]


def send(names: Any, output: Path, rows: list[dict[str, Any]], *, resume_at: int = 0, reached: int = -1) -> None:
    with ExitStack() as stack:
        listeners = open_trackers(names, output, OPTIONS, resume_at=resume_at, reached=reached, open_files=stack)
        assert len(listeners) == len(names)
        for row in rows:
            for listen in listeners:
                listen(row)


def events_of(folder: Path) -> Iterator[Any]:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.name.split(".")[3], path.suffix)):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            found = {name: [point for point in points if point[0] < event.step] for name, points in found.items()}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    send(["tensorboard"], tmp_path, ROWS)
    assert scalars_of(tmp_path / "tensorboard") == {
        "eval/loss": [(0, 4.0), (2, 2.5)],
        "mmlu/accuracy": [(0, 0.25)],
        "train/loss": [(1, 3.0), (2, 2.0), (3, 1.0)],
        "train/learning_rate": [(1, 0.5)],
    }
    (text,) = [
        value for event in events_of(tmp_path / "tensorboard") for value in event.summary.value if value.HasField("tensor")
    ]
    assert json.loads(text.tensor.string_val[0].decode().strip("`").removeprefix("json")) == OPTIONS


def test_tensorboard_of_a_run_that_resumes(tmp_path: Path) -> None:
    """From a checkpoint after step 2, and then from the start, as after a kill before any checkpoint."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    send(["tensorboard"], tmp_path, ROWS)
    send(["tensorboard"], tmp_path, [ROWS[3], {"step": 4, "loss": 0.5}], resume_at=2, reached=3)
    expected = [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert scalars_of(tmp_path / "tensorboard")["train/loss"] == expected
    send(["tensorboard"], tmp_path, ROWS[:2], reached=4)
    assert scalars_of(tmp_path / "tensorboard")["train/loss"] == expected[:1]


def test_tensorboard_itself_reads_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    send(["tensorboard"], tmp_path, ROWS)
    send(["tensorboard"], tmp_path, [ROWS[3], {"step": 4, "loss": 0.5}], resume_at=2, reached=3)
    loaded = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    loaded.Reload()
    assert [(point.step, point.value) for point in loaded.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]


class Run:
    """What is used of W&B's run, by its documentation: the history only grows."""

    def __init__(self, resumed: bool, step: int) -> None:
        self.resumed, self.step = resumed, step
        self.history: dict[int, dict[str, float]] = {}
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "W&B drops it, with a warning"
        self.step = step
        self.history[step] = values

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module in W&B's place: `calls` are those of init, `runs` what it returns, `logged_in` what login finds."""
    module = types.ModuleType("wandb")
    state = types.SimpleNamespace(calls=[], runs=[], next=lambda: Run(False, 0), logged_in=True)
    module.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]

    def init(**arguments: Any) -> Run:
        state.calls.append(arguments)
        if state.next is None:
            raise module.Error("no network")  # type: ignore[attr-defined]
        state.runs.append(state.next())
        return state.runs[-1]

    module.init = init  # type: ignore[attr-defined]
    module.login = lambda: state.logged_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return state


def test_wandb(wandb: Any, tmp_path: Path) -> None:
    send(["wandb"], tmp_path, ROWS)
    (call,), (run,) = wandb.calls, wandb.runs
    assert call == {
        "project": "qlora_jax",
        "name": tmp_path.name,
        "id": (tmp_path / "wandb" / "run_id").read_text(),
        "resume": "allow",
        "dir": str(tmp_path),
        "config": OPTIONS,
    }
    assert run.history == {
        0: {"eval/loss": 4.0, "mmlu/accuracy": 0.25},
        1: {"train/loss": 3.0, "train/learning_rate": 0.5},
        2: {"train/loss": 2.0, "eval/loss": 2.5},
        3: {"train/loss": 1.0},
    }
    assert run.finished


@pytest.mark.parametrize("online", [True, False])
def test_wandb_of_a_run_that_resumes(wandb: Any, tmp_path: Path, online: bool) -> None:
    """The same run; steps that it has are not sent again. Offline what it has is what the records reached."""
    send(["wandb"], tmp_path, ROWS)
    wandb.next = lambda: Run(True, 3) if online else Run(False, 0)  # online the last row was lost with the kill
    send(["wandb"], tmp_path, [*ROWS[2:], {"step": 4, "loss": 0.5}], resume_at=1, reached=3)
    assert wandb.calls[0]["id"] == wandb.calls[1]["id"]
    assert sorted(wandb.runs[1].history) == ([3, 4] if online else [4])


def test_wandb_that_is_new_to_a_run(wandb: Any, tmp_path: Path) -> None:
    send(["wandb"], tmp_path, ROWS[2:], resume_at=1, reached=3)
    assert sorted(wandb.runs[0].history) == [2, 3]


def test_what_is_wrong_with_trackers(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["wandb"])
    wandb.logged_in = False
    with pytest.raises(ValueError, match="report_to wandb: expected to be logged in, found no API key; run `wandb login`"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    wandb.next = None
    with pytest.raises(ConnectionError, match="report_to wandb: the run could not be opened: no network"):
        send(["wandb"], tmp_path, [])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        message = rf"report_to {name}: expected the package {package}, found it not installed; pip install {package}"
        with pytest.raises(ValueError, match=message):
            check_trackers([name])


def wandb_records(path: Path) -> Iterator[bytes]:
    """Those of a LevelDB log after a header of 7 bytes: blocks of 32 KiB of pieces (checksum, length, kind, content)."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:  # no room for a header: padding
            place += -place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # still being written
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last piece
            yield record
            record = b""


def offline_runs(folder: Path) -> tuple[set[str], list[tuple[int, float | None]], list[Any]]:
    """Of all files: the runs' names, the steps with their losses, and the options for LoRA of each."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    ids, history, configs = set(), [], {}
    for path in sorted(folder.glob("offline-run-*/run-*.wandb"), key=os.path.getmtime):
        for data in wandb_records(path):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                configs[path] = {item.key: json.loads(item.value_json) for item in record.run.config.update}["lora"]
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append((record.history.step.num, items.get("train/loss")))
    return ids, sorted(history, key=lambda row: row[0]), [*configs.values()]


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of one run in W&B's own files: each step once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    send(["wandb"], tmp_path, ROWS)
    send(["wandb"], tmp_path, [ROWS[3], {"step": 4, "loss": 0.5}], resume_at=2, reached=3)
    deadline = time.monotonic() + 60
    while len((found := offline_runs(tmp_path / "wandb"))[1]) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # W&B's own process may write the end of a file after the run is finished
    ids, history, configs = found
    assert configs == [OPTIONS["lora"]] * 2
    assert ids == {(tmp_path / "wandb" / "run_id").read_text()}
    assert history == [(0, None), (1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
