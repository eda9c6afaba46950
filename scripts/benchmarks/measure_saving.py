"""Measure what saving checkpoints costs a run: the time in which no step is made, and the time that steps take longer.

    python scripts/benchmarks/measure_saving.py                              480 MiB, steps of 0.4 s
    python scripts/benchmarks/measure_saving.py --mebibytes 64 --step-seconds 0.1 --folder /mnt/disk

Method. A step changes a state of float32 arrays, whose buffers it donates as the step of training does, and then pauses, as
the host does while an accelerator works. Rounds of `--save-every` steps follow one another in turn: without a checkpoint;
with one that is written during the steps (`StateStore.save`), as a run does; with one that is waited for. The first round of
each kind is not counted. Reported are medians:

    step        the time of a step in the rounds without a checkpoint
    blocked     the time in `save` (for the last kind also in `wait`), and its share of a round without a checkpoint
    cpu         the processor time of the thread in `save`, which other programs on the machine do not lengthen
    slower      the time of a whole round, compared with those without a checkpoint

The last line is JSON. The exit code is 1 if a run is blocked for more than 1 % of its time.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import cli
from qlora_jax.train.state_store import StateStore

KINDS = ("none", "written during steps", "waited for")
LEAVES = 64
MOST = 0.01  # the largest share of the time that passes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the cost of saving."""

    mebibytes: int = 480
    """Size of the state: 480 for the adapter and the moments of Llama-3-8B with rank 16."""
    step_seconds: float = 0.4
    """Time of a step."""
    save_every: int = 50
    """Steps of a round."""
    rounds: int = 3
    """Rounds of each kind that are counted."""
    folder: Path | None = None
    """Folder for the checkpoints, on the disk to measure; a temporary one if not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Measure, print the report and return 0 if the criterion holds, else 1."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(arguments, Path(folder))
    for name, value in report.items():
        print(f"{name:28} {value}")
    print(json.dumps(report))
    return 0 if report["blocked, written during steps"] <= MOST else 1


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Return the report."""
    width = arguments.mebibytes * 2**20 // (4 * LEAVES)
    state = {f"leaf_{number}": jnp.full(width, float(number)) for number in range(LEAVES)}
    step = _step_of(arguments.step_seconds)
    store = StateStore(folder / "checkpoints", keep=2)
    steps: list[float] = []
    blocked: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for order, kind in enumerate(KINDS):
            start, cpu = time.perf_counter(), time.thread_time()
            if kind != "none":
                store.save(number * len(KINDS) + order, state, {"batch": number})
            busy = time.thread_time() - cpu
            if kind == "waited for":
                store.wait()
            after = time.perf_counter()
            for _ in range(arguments.save_every):
                began = time.perf_counter()
                state = step(state)
                if kind == "none" and number:
                    steps.append(time.perf_counter() - began)
            if number:
                blocked[kind].append(after - start)
                processor[kind].append(busy)
                times[kind].append(time.perf_counter() - start)
            store.wait()
    store.close()
    whole = {kind: statistics.median(values) for kind, values in times.items()}
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "mebibytes": arguments.mebibytes,
        "save every": arguments.save_every,
        "step": statistics.median(steps),
    }
    for kind in KINDS[1:]:
        seconds = statistics.median(blocked[kind])
        report[f"blocked seconds, {kind}"] = seconds
        report[f"blocked, {kind}"] = seconds / (arguments.save_every * report["step"])
        report[f"cpu seconds, {kind}"] = statistics.median(processor[kind])
        report[f"slower, {kind}"] = whole[kind] / whole["none"] - 1
    return report


def _step_of(seconds: float) -> Any:
    """Return a step on a state, which takes so many seconds."""
    change = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)

    def step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        end = time.perf_counter() + seconds
        state = jax.block_until_ready(change(state))
        time.sleep(max(0.0, end - time.perf_counter()))
        return state

    return step


if __name__ == "__main__":
    sys.exit(main())
