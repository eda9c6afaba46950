"""Trains a tiny model in one process and in several processes over loopback, and compares.

    python tests/finetune/hosts.py --processes 2 4 --steps 20

Every run has 4 virtual devices of a CPU in all, the same options and the same data. One process is the reference. Reported
are, for each number of processes and each mesh:

    start      whether the first checkpoint's adapter, before any step has changed it much, is that of the reference (step 1)
    loss       the largest relative difference of a loss, over all steps and evaluations
    adapter    the norm of the difference of the saved adapters, divided by the norm of the adapter
    rows       whether each row of an epoch was on the devices of exactly one process for each part of the mesh, and the
               global batches were those of the reference
    resumed    the same for a run that is stopped at half by SIGTERM to one process, and goes on in `--then` processes

The last line is JSON; the exit code is 1 if a loss or an adapter differs by more than 1e-5.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4
TIMEOUT = 600


def environment(devices: int, **more: str) -> dict[str, str]:
    """Return the environment of a process with so many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    """Return a port of this machine that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(arguments: Sequence[str], processes: int, *, devices: int = DEVICES, hosts: Sequence[str] = ()) -> list[Any]:
    """Start `train.py` in so many processes, which share the devices, and return them."""
    address, started = f"127.0.0.1:{free_port()}", []
    for number in range(processes):
        flags = ["--coordinator-address", address, "--num-processes", str(processes), "--process-id", str(number), *hosts]
        started.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "scripts/train.py"), *arguments, *(flags if processes > 1 else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(devices // processes),
            )
        )
    return started


def ended(started: Sequence[Any], timeout: float = TIMEOUT) -> list[tuple[int, str]]:
    """Wait for processes and return their exit codes and what they printed; they are killed after the timeout."""
    end, found = time.monotonic() + timeout, []
    for process in started:
        try:
            text, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"{process.communicate()[0]}\nkilled after {timeout} s"
        found.append((process.returncode, text))
    return found


def write_data(folder: Path) -> str:
    """Write 40 questions with answers of several lengths."""
    path, colours = folder / "colours.jsonl", ("red", "green", "blue", "black", "white")
    rows = [{"question": f"{number}?", "answer": colours[number % 5] * (1 + number % 3)} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments_of(model: Path, data: str, steps: int, mesh: str) -> list[str]:
    """Return the options of a run, without its folder."""
    run = ["--model", str(model), "--data", data, "--max-length", "64", "--rank", "4", "--learning-rate", "1e-3"]
    return [*run, "--max-steps", str(steps), "--eval-every", "10", "--save-every", "5", "--mesh", mesh, "--batch-size", "1"]


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Return the rows of the log of a run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(one: Path, other: Path) -> dict[str, float]:
    """Return the largest relative difference of the losses of two runs, and that of their adapters."""
    rows = [rows_of(one), rows_of(other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]], "the logs have other steps"
    losses = [np.array([row[name] for row in found for name in ("loss", "eval_loss") if name in row]) for found in rows]
    a, b = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (one, other))
    assert a.keys() == b.keys()
    distance = sum(np.square(a[name] - b[name], dtype=np.float64).sum() for name in a)
    norm = sum(np.square(value, dtype=np.float64).sum() for value in a.values())
    return {"loss": float(np.abs(losses[1] / losses[0] - 1).max()), "adapter": float(np.sqrt(distance / norm))}


def train(arguments: Sequence[str], output: Path, processes: int) -> None:
    """Run to the end; raise AssertionError with the output if a process fails."""
    found = ended(launch([*arguments, "--output", str(output)], processes))
    assert all(code == 0 for code, _ in found), "\n".join(text for _, text in found)


def stop_at_half(arguments: Sequence[str], output: Path, processes: int, steps: int) -> list[int]:
    """Run until half the steps are done, send SIGTERM to the last process, and return the exit codes of all."""
    started = launch([*arguments, "--output", str(output)], processes)
    while all(process.poll() is None for process in started):
        if (output / "metrics.jsonl").exists() and any(row["step"] >= steps // 2 for row in rows_of(output)):
            started[-1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    return [code for code, _ in ended(started)]
