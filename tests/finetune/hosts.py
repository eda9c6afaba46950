"""Trains a tiny model in one process and in several processes over loopback, and compares.

    python tests/finetune/hosts.py --processes 2 4 --steps 20
    python tests/finetune/hosts.py --processes 2 --steps 20 --stop 1    stopped at half in 2 processes, ends in 1
    python tests/finetune/hosts.py --kill                               a process is killed in mid-run, or stops to answer

Every run has 4 virtual devices of a CPU in all (`--devices`), the same options and the same data. One process is the
reference. Reported are, for each number of processes and each mesh:

    start      whether the part of every device of the loaded weights and of the initial adapter has the same bytes
    rows       whether the devices of all processes together have the rows of an epoch's batches as one process has them,
               and each row of the data exactly once
    loss       the largest relative difference of a loss, over all steps and evaluations
    adapter    the norm of the difference of the saved adapters, divided by the norm of the adapter

With `--stop N` the run is stopped at half by SIGTERM to one process, and the same command ends it in N processes. The last
line is JSON; the exit code is 1 if the parts or rows differ, or a loss or an adapter by more than 1e-5. Each process is a
fork of this one, which has imported everything and has not started JAX yet.
"""

import argparse
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
FOLDER = Path(tempfile.mkdtemp(prefix="hosts-"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER / "compiled"))  # read when JAX is imported
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
os.environ["JAX_PLATFORMS"] = "cpu"

import datasets  # noqa: E402, F401
import jax  # noqa: E402
import transformers  # noqa: E402, F401
from safetensors.numpy import load_file  # noqa: E402
from tiny_models import write_tiny_llama  # noqa: E402

from qlora_jax.checkpoint.load import load_model  # noqa: E402
from qlora_jax.checkpoint.open import open_checkpoint  # noqa: E402
from qlora_jax.cluster import HostOptions, join  # noqa: E402
from qlora_jax.commands import train  # noqa: E402
from qlora_jax.data import Example, batches  # noqa: E402
from qlora_jax.nn import MeshShape, data_mesh, put_rows  # noqa: E402
from qlora_jax.peft import LoRA  # noqa: E402
from qlora_jax.train import split  # noqa: E402

EXAMPLES, TIMEOUT = 10, 600.0
MESHES = ("fsdp=4", "data=2,tensor=2")


@dataclasses.dataclass
class Process:
    """A fork of this program.

    Attributes:
        pid: its number.
        log: the file of all that it prints.
        code: its exit code, negative for a signal; None while it runs.
    """

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


def start(function: Callable[[Sequence[str]], int], processes: int, folder: Path, devices: int) -> list[Process]:
    """Call a function with the flags of `train.py` that join the processes, in so many forks, and return these."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    started = []
    for number in range(processes):
        flags = ["--coordinator-address", address, "--num-processes", str(processes), "--process-id", str(number)]
        log = folder / f"log-{processes}-{number}"
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _run(function, flags if processes > 1 else [], devices // processes, log)
        started.append(Process(pid, log))
    return started


def _run(function: Callable[[Sequence[str]], int], flags: Sequence[str], devices: int, log: Path) -> None:
    code = 70
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        code = function(flags)
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # as JAX does at the exit
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(started: Sequence[Process], timeout: float = TIMEOUT) -> list[int]:
    """Wait for processes and return their exit codes; those that still run after the timeout are killed."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        time.sleep(0.05)
    for process in started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            while process.poll() is None:
                time.sleep(0.05)
    return [process.code or 0 for process in started]


def finished(started: Sequence[Process]) -> None:
    """Wait for processes; raise AssertionError with what they printed if one fails."""
    codes = wait(started)
    assert not any(codes), "\n".join([str(codes), *(process.log.read_text(errors="replace")[-3000:] for process in started)])


def arguments_of(model: Path, data: Path, steps: int, mesh: str) -> list[str]:
    """Return the options of a run, without its folder. Short ones hold nothing out."""
    values = {
        "model": model,
        "data": data,
        "max-length": 64,
        "rank": 4,
        "learning-rate": 1e-3,
        "held-out": 0.2 if steps >= 10 else 0,
        "eval-every": 10,
        "save-every": 5,
        "batch-size": 1,
        "samples": 0,
        "max-steps": steps,
        "mesh": mesh,
    }
    return ["--no-memory-check", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def write_data(path: Path) -> Path:
    """Write 40 questions with answers of several lengths."""
    colours = ("red", "green", "blue", "black", "white")
    rows = [{"question": f"{number}?", "answer": colours[number % 5] * (1 + number % 3)} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parts(flags: Sequence[str], model: Path, mesh_text: str, folder: Path) -> int:
    """Write what the devices of this process have of the loaded model, and of the batches of an epoch of 10 rows."""
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    if given:
        join(HostOptions("auto", flags[1], int(flags[3]), int(flags[5])))
    mesh = data_mesh(MeshShape.parse(mesh_text))
    assert mesh is not None
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    loaded = load_model(open_checkpoint(str(model)), method=LoRA(rank=4), mesh=mesh, progress=False)
    _, adapter, frozen = split(loaded)
    found: dict[str, Any] = {"parts": {}, "rows": {}}
    for path, leaf in jax.tree_util.tree_leaves_with_path((adapter, frozen)):
        for shard in leaf.addressable_shards:
            name = f"{jax.tree_util.keystr(path)} of {places[shard.device]}"
            found["parts"][name] = zlib.crc32(np.ascontiguousarray(shard.data).tobytes())
    mask = np.ones(4, np.uint8)
    examples = [Example(np.array([number, 1, 2, 3], np.int32), mask) for number in range(EXAMPLES)]
    for step, batch in enumerate(batches(examples, batch_size=4, length=8, pad_id=-1, epochs=1)):
        inputs = put_rows(mesh, batch["inputs"])
        for shard in inputs.addressable_shards:
            found["rows"][f"{step} of {places[shard.device]}"] = np.asarray(shard.data)[:, 0].tolist()
    (folder / f"parts-{given.get('--process-id', 'one')}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def parts_of(model: Path, mesh: str, processes: int, folder: Path, devices: int) -> dict[str, Any]:
    """Return the parts of all devices, as so many processes have them together."""
    finished(start(lambda flags: write_parts(flags, model, mesh, folder), processes, folder, devices))
    found: dict[str, Any] = {"parts": {}, "rows": {}}
    for path in sorted(folder.glob("parts-*.json")):
        for kind, values in json.loads(path.read_text(encoding="utf-8")).items():
            assert not values.keys() & found[kind].keys(), "two processes have the same device"
            found[kind] |= values
    return found


def each_row_once(rows: dict[str, list[int]], mesh: str) -> bool:
    """Return whether the devices have each row of the data once, or once for each device of a tensor axis; padding aside."""
    seen = sorted(row for part in rows.values() for row in part if row >= 0)
    return seen == sorted([*range(EXAMPLES)] * MeshShape.parse(mesh).tensor)


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


def run(arguments: Sequence[str], processes: int, output: Path, devices: int) -> list[Process]:
    """Start `train.py` in so many processes."""
    whole = [*arguments, "--output", str(output)]
    return start(lambda flags: train.main([*whole, *flags]), processes, output.parent / f"{output.name}-logs", devices)


def after_step(step: int, started: Sequence[Process], output: Path, act: Callable[[Process], None]) -> None:
    """Do something to the last process as soon as a step is in the log."""
    while all(process.poll() is None for process in started):
        if (output / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows_of(output)):
            act(started[-1])
            return
        time.sleep(0.02)


def stop(process: Process) -> None:
    """Ask a process to stop."""
    os.kill(process.pid, signal.SIGTERM)


def lines(process: Process) -> list[str]:
    """Return the lines that a process printed, without bars and what the collectives of CPUs say."""
    text = process.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip() and "Gloo] Rank" not in line]


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Print and return the differences of every mesh and number of processes from one process."""
    model, data, found = write_tiny_llama(FOLDER / "model"), write_data(FOLDER / "data.jsonl"), {}
    for mesh in given.meshes:
        place = FOLDER / mesh
        arguments = arguments_of(model, data, given.steps, mesh)
        expected = parts_of(model, mesh, 1, place / "parts-1", given.devices)
        finished(run(arguments, 1, place / "one", given.devices))
        for count in given.processes:
            parts, output = parts_of(model, mesh, count, place / f"parts-{count}", given.devices), place / f"run-{count}"
            row = {"start": parts["parts"] == expected["parts"]}
            row["rows"] = parts["rows"] == expected["rows"] and each_row_once(parts["rows"], mesh)
            started = run(arguments, count, output, given.devices)
            if given.stop:
                after_step(given.steps // 2, started, output, stop)
                row["stopped"] = wait(started)
                row["saved"] = max(int(path.name) for path in (output / "checkpoints").glob("[0-9]*"))
                started = run(arguments, given.stop, output, given.devices)
            finished(started)
            found[f"{mesh} in {count}"] = row = row | differences(place / "one", output)
            print(f"{mesh:18} {count} processes  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return found


def kill(given: argparse.Namespace) -> dict[str, Any]:
    """Print and return how the other processes end when the last one is killed, or no longer answers."""
    model, data, found = write_tiny_llama(FOLDER / "model"), write_data(FOLDER / "data.jsonl"), {}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        output = FOLDER / name
        flags = ("--heartbeat-timeout", str(given.heartbeat))
        arguments = [*arguments_of(model, data, 100_000, f"fsdp={given.devices}"), *flags]
        started = run(arguments, given.processes[0], output, given.devices)
        after_step(2, started, output, lambda process, number=number: os.kill(process.pid, number))
        begun = time.monotonic()
        codes = wait(started[:-1], 60 + 3 * given.heartbeat)
        seconds = time.monotonic() - begun
        os.kill(started[-1].pid, signal.SIGKILL)
        wait(started[-1:])
        found[name] = {"codes": codes, "seconds": round(seconds, 1), "last line": lines(started[0])[-1][:200]}
        print(f"{name:8} " + "  ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    return found


def main() -> int:
    """Run the comparison and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2], choices=(2, 4))
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--stop", type=int, default=0, help="processes that end the run that was stopped; 0: none is stopped"
    )
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--heartbeat", type=int, default=10)
    given = parser.parse_args()
    found = kill(given) if given.kill else compare(given)
    print(json.dumps(found))
    if given.kill:
        return 0 if all(all(code not in (0, -signal.SIGKILL) for code in row["codes"]) for row in found.values()) else 1
    right = all(row["start"] and row["rows"] and max(row["loss"], row["adapter"]) <= 1e-5 for row in found.values())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
