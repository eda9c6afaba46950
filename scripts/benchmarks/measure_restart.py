"""Compare a warm restart of a run with a cold one: the time until its first step is done.

    python scripts/benchmarks/measure_restart.py                              SmolLM2-135M on its default data
    python scripts/benchmarks/measure_restart.py --model FOLDER --repeats 3

Method. A run without held-out data is stopped after three steps, each of which it saves. Then it is started again in a new
process, which restores a checkpoint and makes the next step: with an empty cache of compiled programs (cold), and with that
of the start before (warm). The process ends as soon as the record of that step is written. The figures are the seconds on
the clock and the seconds of all cores, from the start of the process on, and the same of the import of JAX and the package
alone, which no cache makes shorter. The last line of the output is the report as JSON, with the minima over all repeats.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_jax import cli

IMPORT = "from qlora_jax.commands.train import main"
RUN = """
import os, sys
steps = int(sys.argv.pop(1))
from qlora_jax.commands.train import main
from qlora_jax.train import MetricsLog
add = MetricsLog.add
def add_and_end(log, row):
    add(log, row)
    global steps
    steps -= "loss" in row
    if steps == 0:
        os._exit(0)
MetricsLog.add = add_and_end
sys.exit(main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare a warm restart with a cold one."""

    model: str | None = None
    """Folder or hub id of the model; SmolLM2-135M-Instruct if left out."""
    max_length: int = 256
    """Tokens of a row."""
    repeats: int = 1
    """Number of restarts of each kind."""


def measure(code: str, arguments: list[str], cache: Path) -> dict[str, float]:
    """Run Python code in a process of its own, and return its seconds on the clock and of all cores.

    Raises:
        subprocess.CalledProcessError: the process fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, env=environment | {"QLORA_JAX_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    after = os.times()
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return {"clock": time.perf_counter() - start, "cores": cores}


def main(arguments: Arguments) -> None:
    """Measure and print the report."""
    found: dict[str, list[dict[str, float]]] = {"imports": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        root = Path(folder)
        flags = ["--max-length", str(arguments.max_length), "--samples", "0", "--save-every", "1", "--held-out", "0"]
        flags += ["--max-steps", "9"]
        flags += ["--model", arguments.model] if arguments.model else []
        measure(RUN, ["3", *flags, "--output", str(root / "first")], root / "first-cache")
        for repeat in range(arguments.repeats):
            found["imports"].append(measure(IMPORT, [], root / "none"))
            for kind in ("cold", "warm"):
                output = root / f"{kind}-{repeat}"
                shutil.copytree(root / "first", output)
                one = measure(RUN, ["1", *flags, "--output", str(output)], root / f"cache-{repeat}")
                found[kind].append(one)
                print(f"{kind}: {one['clock']:.1f} s on the clock, {one['cores']:.1f} s of all cores", flush=True)
    report = {kind: {unit: min(one[unit] for one in each) for unit in each[0]} for kind, each in found.items()}
    ratio = {unit: round(report["warm"][unit] / report["cold"][unit], 3) for unit in report["warm"]}
    print(json.dumps({kind: {k: round(v, 2) for k, v in one.items()} for kind, one in report.items()} | {"ratio": ratio}))


if __name__ == "__main__":
    sys.exit(cli.run(main, Arguments, __doc__))
