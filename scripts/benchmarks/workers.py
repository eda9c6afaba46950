"""Run the processes of a benchmark. Runs of qlora_jax and of the peers alternate:

    ours a, peer a, ours b, peer b, …     one round; the options say how many rounds there are

A worker (scripts/benchmarks/peers/*.py) is called with flags and prints one line of JSON last. A peer is described by the
packages that it needs, and runs with the first interpreter that has them. A peer without an interpreter, or one that fails,
is left out and the reason is printed. Runs of qlora_jax must not fail.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax.errors import OptionError

Platform = Literal["cpu", "default"]
ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "scripts" / "benchmarks" / "peers"
MEBIBYTE = 2**20
OURS = "ours"
QUIET = 0.8  # least share of the cores that a program uses on an otherwise idle machine
STEADY = 1.5  # largest ratio of the slowest to the fastest step there


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program that qlora_jax is compared with.

    Attributes:
        packages: names of the packages that its interpreter needs.
        cuda: whether it runs only on a CUDA GPU.
    """

    name: str
    packages: tuple[str, ...]
    cuda: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant of one program.

    Attributes:
        side: "ours" for qlora_jax, else the name of the peer.
    """

    side: str
    variant: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.side} {self.variant}"


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of a benchmark.

    Attributes:
        runs: by name of a variant, its results, one for each round.
        skipped: by name of a variant that was left out, the reason.
    """

    runs: dict[str, list[dict[str, Any]]]
    skipped: dict[str, str]

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        """The versions of the packages of each program."""
        sides: dict[str, dict[str, str]] = {}
        for name, found in self.runs.items():
            sides.setdefault(name.split()[0], {}).update(found[0]["versions"])
        return sides


def command(python: Path | str, script: str, **flags: Any) -> tuple[str, ...]:
    """Return the command line of a worker. A flag with the value True has no argument; False and None add no flag."""
    words = [str(python), str(WORKERS / script)]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words.append(f"{flag}={value}")
    return tuple(words)


def find_python(peer: Peer, pythons: Sequence[Path]) -> tuple[Path | None, str]:
    """Return the first interpreter that can run a peer and "", or None and the reason."""
    reasons = []
    for python in pythons:
        missing = missing_packages(python, peer.packages)
        if not missing and peer.cuda and not has_cuda(python):
            reasons.append(f"{python.name}: needs a CUDA GPU, found none")
        elif missing:
            reasons.append(f"{python.name} has no {', '.join(missing)}")
        else:
            return python, ""
    return None, "; ".join(reasons) or "no interpreter was named"


@functools.cache
def missing_packages(python: Path, packages: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of these packages an interpreter does not have.

    Raises:
        OptionError: the interpreter cannot be run.
    """
    code = f"import importlib.util as u; print(*(p for p in {packages!r} if u.find_spec(p) is None))"
    return tuple(_asked(python, code).split())


@functools.cache
def has_cuda(python: Path) -> bool:
    """Return whether PyTorch finds a CUDA GPU in an interpreter."""
    return _asked(python, "import torch; print(torch.cuda.is_available())").strip() == "True"


def _asked(python: Path, code: str) -> str:
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise OptionError(f"--peer-python {python}: expected a Python interpreter, found {error}") from error


def in_turns(runs: Sequence[Run]) -> list[Run]:
    """Return the runs of one round in their order: ours, peer, ours, peer …"""
    ours = [run for run in runs if run.side == OURS]
    peers = [run for run in runs if run.side != OURS]
    return [run for pair in itertools.zip_longest(ours, peers) for run in pair if run is not None]


def in_rounds(
    runs: Sequence[Run], rounds: int, platform: Platform, progress_text: Callable[[dict[str, Any]], str], label: str
) -> Found:
    """Every run once a round; `said` puts a result into a few words for whoever waits.

    Raises:
        ValueError: a run of ours failed.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for run in in_turns(runs):
            if run.name in skipped:
                continue
            load_average = os.getloadavg()[0]
            try:
                result = run_worker(run.command, platform)
            except ValueError as error:
                if run.side == OURS:
                    raise
                skipped[run.name] = str(error).strip().splitlines()[-1]
                log(f"{label}: {run.name} is left out: {error}")
                continue
            found.setdefault(run.name, []).append({**result, "load_average_before": load_average})
            log(f"{label}, round {number + 1}: {run.name}: {progress_text(result)}; load average {load_average:.1f}")
    return Found({name: results for name, results in found.items() if name not in skipped}, skipped)


def log(text: str) -> None:
    """Print a progress message on stderr; results are printed on stdout."""
    print(text, file=sys.stderr, flush=True)


def run_worker(command: Sequence[str], platform: Platform = "cpu") -> dict[str, Any]:
    """Return the JSON line of one run.

    Raises:
        ValueError: the run failed; the message ends with the last lines of its stderr.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}\nexit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def disturbed(seconds: Sequence[float], busy: float, platform: Platform) -> bool:
    """Return whether other processes probably used the cores, so that the numbers should not be cited."""
    return (platform == "cpu" and busy < QUIET) or max(seconds) > STEADY * min(seconds)


def peaks(runs: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Return the largest peaks of all runs; that of device memory is None if no run reports one."""
    return {
        "peak_resident_bytes": max(found["peak_resident_bytes"] for found in runs),
        "peak_device_bytes": max((found["peak_device_bytes"] or 0 for found in runs), default=0) or None,
    }


def device() -> dict[str, Any]:
    """Return the CPU of this machine, its number of cores and its load."""
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": cores(), "load_average": os.getloadavg()}


def cores() -> int:
    """Return how many cores this process and its children may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
