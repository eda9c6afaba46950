"""Runs of a benchmark: each is a process of its own, and ours and the peers' take turns.

    ours a, peer a, ours b, peer b, …     one round; as many rounds as asked

A worker (scripts/peers/*.py) is called with flags and prints one line of JSON last. A peer is known by the packages that it
needs, and runs with the first of the interpreters that has them; where none has, or where a run fails, it is left out and
the reason is told. Ours must not fail.
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

Platform = Literal["cpu", "default"]
ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "scripts" / "benchmarks" / "peers"
MEBIBYTE = 2**20
OURS = "ours"
QUIET = 0.8  # share of the cores that a program gets on a machine of its own, at least
STEADY = 1.5  # slowest step over fastest there, at most


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program that ours is compared with.

    Attributes:
        packages: that its interpreter has to have.
        cuda: whether it runs on a CUDA GPU only.
    """

    name: str
    packages: tuple[str, ...]
    cuda: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant of one side."""

    side: str
    variant: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.side} {self.variant}"


@dataclasses.dataclass(frozen=True)
class Found:
    """What runs gave: of each variant a result a round, and why others gave none."""

    runs: dict[str, list[dict[str, Any]]]
    skipped: dict[str, str]

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        """Of the packages of each side."""
        sides: dict[str, dict[str, str]] = {}
        for name, found in self.runs.items():
            sides.setdefault(name.split()[0], {}).update(found[0]["versions"])
        return sides


def command(python: Path | str, script: str, **flags: Any) -> tuple[str, ...]:
    """The command line of a worker: True is a flag by itself, False and None are none."""
    words = [str(python), str(WORKERS / script)]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words.append(f"{flag}={value}")
    return tuple(words)


def find_python(peer: Peer, pythons: Sequence[Path]) -> tuple[Path | None, str]:
    """(the first interpreter that can run a peer, ""), or (None, why none can)."""
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
    """Which of some packages an interpreter lacks.

    Raises:
        ValueError: it cannot be run.
    """
    code = f"import importlib.util as u; print(*(p for p in {packages!r} if u.find_spec(p) is None))"
    return tuple(_asked(python, code).split())


@functools.cache
def has_cuda(python: Path) -> bool:
    """Whether an interpreter with PyTorch sees a CUDA GPU."""
    return _asked(python, "import torch; print(torch.cuda.is_available())").strip() == "True"


def _asked(python: Path, code: str) -> str:
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--peer-python {python}: expected a Python interpreter, found {error}") from error


def in_turns(runs: Sequence[Run]) -> list[Run]:
    """One round: ours, peer, ours, peer …"""
    ours = [run for run in runs if run.side == OURS]
    peers = [run for run in runs if run.side != OURS]
    return [run for pair in itertools.zip_longest(ours, peers) for run in pair if run is not None]


def in_rounds(
    runs: Sequence[Run], rounds: int, platform: Platform, said: Callable[[dict[str, Any]], str], label: str
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
                tell(f"{label}: {run.name} is left out: {error}")
                continue
            found.setdefault(run.name, []).append({**result, "load_average_before": load_average})
            tell(f"{label}, round {number + 1}: {run.name}: {said(result)}; load average {load_average:.1f}")
    return Found({name: results for name, results in found.items() if name not in skipped}, skipped)


def tell(text: str) -> None:
    """A line for whoever waits; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def run_worker(command: Sequence[str], platform: Platform = "cpu") -> dict[str, Any]:
    """The JSON line of one run.

    Raises:
        ValueError: it failed; the message ends with what it wrote last.
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
    """Whether most likely neighbours had the cores, so that the figures are not to be cited."""
    return (platform == "cpu" and busy < QUIET) or max(seconds) > STEADY * min(seconds)


def peaks(runs: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """The largest peaks of all runs; that of device memory is None where nothing reports one."""
    return {
        "peak_resident_bytes": max(found["peak_resident_bytes"] for found in runs),
        "peak_device_bytes": max((found["peak_device_bytes"] or 0 for found in runs), default=0) or None,
    }


def device() -> dict[str, Any]:
    """The machine, as far as it is a CPU."""
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": cores(), "load_average": os.getloadavg()}


def cores() -> int:
    """How many this process, and so those that it starts, may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
