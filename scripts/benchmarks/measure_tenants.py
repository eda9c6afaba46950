"""Measure tenants that train together against the same runs one after another, and say where the time goes.

    python scripts/benchmarks/measure_tenants.py                       8 tenants of 1 x 256 and of 4 x 256 on SmolLM2-135M
    python scripts/benchmarks/measure_tenants.py --rows 1 --parts      and the parts of a step, with the products' floor

Each figure is of processes: `train_many.py` with all tenants, and `train.py` with one, each with few and with more steps.

    time(steps) = start + steps * step          start: imports, loading, compiling, saving
    steady      = step together / (tenants * step alone)
    with start  = time together / (tenants * time alone)        at the larger number of steps

Times are CPU seconds of the process and its children, which other programs on the machine disturb less than wall times; wall
times are in the JSON of the last line. --parts compiles the parts of a step as programs of their own: the products with the
base forward and backward, the dequantisation of each matrix for both, the head with its loss, the adapters' products, and
the update. What they leave of the whole step is attention, norms, activations and everything else. The floor is the
floating-point operations of all products of the step at the rate at which this machine multiplies by the base's largest
matrix.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax import cli
from scripts.benchmarks.tenant_parts import step_parts

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure tenants together and apart."""

    model: str | None = None
    """Path or hub id of the base; None: the default model, SmolLM2-135M."""
    tenants: int = 8
    """How many tenants."""
    rows: tuple[int, ...] = (1, 4)
    """Rows of a step of each tenant."""
    length: int = 256
    """Tokens of a row."""
    steps: tuple[int, int] = (2, 8)
    """The few and the more steps."""
    parts: bool = False
    """Measure the parts of a step too."""
    processes: bool = True
    """Measure whole processes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print the figures, and as the last line all of them as JSON."""
    import jax

    found: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "device": str(jax.devices()[0]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "jaxlib")}},
        "tenants": arguments.tenants,
        "length": arguments.length,
    }
    print(f"{found['machine']}, {found['device']}, {found['versions']}", flush=True)
    for rows in arguments.rows if arguments.processes else ():
        found[f"rows {rows}"] = compared(arguments, rows)
    if arguments.parts:
        found["parts"] = step_parts(arguments.tenants, arguments.length)
    print(json.dumps(found))


def compared(arguments: Arguments, rows: int) -> dict[str, Any]:
    """Return the figures of tenants with so many rows each."""
    few, more = arguments.steps
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = [_data(folder / f"{number}.jsonl", number) for number in range(arguments.tenants)]
        for steps in (few, more):
            many, own = (
                _tenants_file(arguments, folder, data, rows, steps),
                _own_file(arguments, folder, data[0], rows, steps),
            )
            times["together"].append(_timed("train_many.py", str(many)))
            times["alone"].append(_timed("train.py", "--config", str(own)))
    found: dict[str, Any] = {"times": times}
    for kind, index in (("CPU", 0), ("wall", 1)):
        step = {side: (values[1][index] - values[0][index]) / (more - few) for side, values in times.items()}
        whole = {side: values[1][index] for side, values in times.items()}
        steady = step["together"] / (arguments.tenants * step["alone"])
        with_start = whole["together"] / (arguments.tenants * whole["alone"])
        found[kind] = {"step": step, "whole": whole, "steady": steady, "with_start": with_start}
        print(
            f"{arguments.tenants} tenants of {rows} x {arguments.length}, {kind} seconds: a step alone {step['alone']:.2f}, "
            f"together {step['together']:.2f}: {steady:.2f} of one after another in steady state; {more} steps with start: "
            f"alone {whole['alone']:.1f}, together {whole['together']:.1f}: {with_start:.2f}",
            flush=True,
        )
    return found


def _data(path: Path, seed: int) -> Path:
    """Write questions and answers of random words, which are packed to full rows."""
    draws = np.random.default_rng(seed)
    words = ["red", "green", "the", "house", "river", "seven", "blue", "walks", "and", "stone", "light", "under"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            question, answer = (" ".join(draws.choice(words, count)) for count in (12, 40))
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return path


def _options(arguments: Arguments, rows: int, steps: int) -> str:
    model = f'[model]\nmodel = "{arguments.model}"\n' if arguments.model else ""
    return (
        f"{model}[data]\nmax_length = {arguments.length}\npacking = true\nheld_out = 0.0\n[lora]\nrank = 16\n"
        f"[run]\nbatch_size = {rows}\nmax_steps = {steps}\nsave_every = 0\neval_every = 0\nsamples = 0\n"
    )


def _tenants_file(arguments: Arguments, folder: Path, data: Sequence[Path], rows: int, steps: int) -> Path:
    path = folder / f"tenants-{rows}-{steps}.toml"
    tables = "".join(f'[tenants.t{number}.data]\ndata = "{file}"\n' for number, file in enumerate(data))
    head = f'output = "{folder}/many-{rows}-{steps}"\nrows = {min(arguments.tenants * rows, 8)}\n'
    path.write_text(head + _options(arguments, rows, steps) + tables, encoding="utf-8")
    return path


def _own_file(arguments: Arguments, folder: Path, data: Path, rows: int, steps: int) -> Path:
    path = folder / f"own-{rows}-{steps}.toml"
    options = _options(arguments, rows, steps).replace("[data]\n", f'[data]\ndata = "{data}"\n')
    path.write_text(
        options.replace("[run]\n", f'[run]\noutput = "{folder}/own-{rows}-{steps}"\nmemory_check = false\n'),
        encoding="utf-8",
    )
    return path


def _timed(script: str, *words: str) -> tuple[float, float]:
    """Run a script; return its (CPU seconds, wall seconds)."""
    before, start = _children(), time.perf_counter()
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return _children() - before, time.perf_counter() - start


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
