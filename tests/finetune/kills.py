"""Kills runs and merges at random operations on files and at random times, and looks at what they leave.

    python tests/finetune/kills.py --kills 200

The signal is SIGKILL or SIGTERM. It comes

    file    at a random operation on a file
    save    up to 0.1 s after a random operation on a file of a checkpoint, while threads of Orbax write it
    time    after up to 8 s: also in C++, while programs are compiled, and in the first seconds

A killed process leaves the whole result or none: an adapter or a merged model that is there has all its files, with the
bytes of an uninterrupted run. A run goes on from the newest checkpoint that is complete. After the same command has run
once more, the adapter and the losses are those of the uninterrupted run, bit for bit, and nothing else is left. After
SIGTERM, the process ends by itself with code 143, or 0 if it was done. Each process is a fork of this one, which has
imported everything and has not started JAX yet. The last lines are the tally.

    python tests/finetune/kills.py --goodput-minutes 30 --kill-every 5

kills one long run by SIGKILL every five minutes, and prints its goodput: the steps that are saved at the end times the time
of a step, as a share of the whole time.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Before JAX is imported, which reads them then: all processes share the compiled programs.
FOLDER = Path(tempfile.mkdtemp(prefix="kills-"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER / "compiled"))
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

import datasets  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import transformers  # noqa: E402, F401
from runs import without_timing  # noqa: E402
from tiny_models import write_tiny_llama  # noqa: E402

from qlora_jax.commands import merge, train  # noqa: E402
from qlora_jax.train.state_store import latest_step  # noqa: E402

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.truncate")
SLOW_SECONDS = 300
SHARE_OF_RERUNS = 0.3
SAVE_SECONDS = 0.1  # a little more than it takes to write a checkpoint of the tiny model
# A fork that has not begun with its command yet dies of SIGTERM as any process.
ENDED = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {128 + signal.SIGTERM, -signal.SIGTERM}}


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process kills itself, and how.

    Attributes:
        number: the signal.
        kind: "file", "save" or "time", as the docstring of the module explains; "": never.
        at: the number of the operation.
        seconds: the time after it, or after the start.
    """

    number: signal.Signals = signal.SIGKILL
    kind: str = ""
    at: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        where = f"after {self.seconds:.1f} s" if self.kind == "time" else f"at operation {self.at} ({self.kind})"
        return f"{self.number.name} {where}"


class Job:
    """A command that writes one folder, in a place of its own.

    Attributes:
        name: "train" or "merge".
        result: the folder, below the place, that is whole or not there.
        expected: the bytes of its files after an uninterrupted run, by name.
        losses: the records of a run without what differs from one run to the next.
        left: all names in the place after an uninterrupted run, as `names` returns them.
        operations: how many operations on files an uninterrupted run made, and how many on files of checkpoints, by kind.
    """

    def __init__(self, name: str, result: str, arguments: Sequence[str], root: Path) -> None:
        self.name, self.result, self.arguments = name, result, [*arguments]
        place = root / f"{name}-whole"
        place.mkdir()
        code, log = self.start(place, Kill()).wait()
        assert code == 0, log
        self.expected, self.left, self.losses = contents(place / result), names(place), losses(place)
        self.operations: dict[str, int] = json.loads((root / f"{name}-whole.count").read_text())

    def start(self, place: Path, kill: Kill) -> "Process":
        """Start the command, which kills itself."""
        main = {"train": train.main, "merge": merge.main}[self.name]
        return Process(main, [*self.arguments, "--output", str(place / self.result.split("/")[0])], place, kill)

    def draw(self, draws: random.Random) -> Kill:
        """Return a random kill."""
        number = draws.choice((signal.SIGKILL, signal.SIGTERM))
        kind = draws.choices(("file", "save", "time"), (4, 4 if self.operations["save"] else 0, 2))[0]
        if kind == "time":
            return Kill(number, kind, 0, draws.uniform(0.0, 8.0))
        return Kill(number, kind, draws.randint(1, self.operations[kind]), draws.uniform(0, SAVE_SECONDS) * (kind == "save"))

    def damage(self, place: Path) -> str | None:
        """Return what is wrong with what a killed process left; None if nothing is."""
        folder = place / self.result
        if folder.exists() and contents(folder) != self.expected:
            return f"{folder} is there and not whole: {sorted(contents(folder))}"
        if (place / "run" / "completed").exists() and not folder.exists():
            return f"{place}: completed without {folder}"
        return None

    def rerun(self, place: Path) -> str | None:
        """Run the command once more, without a kill; return what is wrong with what is there then."""
        code, log = self.start(place, Kill()).wait()
        folder, done = place / self.result, is_done(code, log)
        if code != 0 and not (done and folder.exists()):
            return log[-2000:]
        if contents(folder) != self.expected:
            return f"{folder}: another result"
        if losses(place) != self.losses:
            return f"{place}: other losses"
        left = names(place)
        return None if left == self.left else f"{place}: left {sorted(left ^ self.left)}"


class Process:
    """A fork that runs a command and kills itself."""

    def __init__(self, main: object, arguments: Sequence[str], place: Path, kill: Kill) -> None:
        self.log, self.saved = place.with_suffix(".log"), latest_step(place / "run" / "checkpoints")
        self._kill, self._start = kill, time.monotonic()
        self.id = os.fork()
        if self.id:
            return
        counts, killer = {"file": 0, "save": 0}, threading.Timer(kill.seconds, os.kill, (os.getpid(), kill.number))
        killer.daemon = True
        saves = os.sep + "checkpoints" + os.sep

        def operation(event: str, values: tuple[object, ...]) -> None:
            below = [str(value) for value in values[:2] if str(value).startswith(str(place) + os.sep)]
            if event not in OPERATIONS or not below:
                return
            for kind in ("file", "save") if any(saves in path for path in below) else ("file",):
                counts[kind] += 1
                if kind == kill.kind and counts[kind] == kill.at:
                    if kind == "save":
                        killer.start()
                    else:
                        os.kill(os.getpid(), kill.number)

        code = 70
        try:
            with open(self.log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.addaudithook(operation)
            code = main(arguments)  # type: ignore[operator]
            place.with_suffix(".count").write_text(json.dumps(counts))
        finally:
            os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Return (exit code, what it printed); a process that hangs is killed, as is one whose time has come."""
        end, due = self._start + SLOW_SECONDS, self._kill.kind == "time"
        while time.monotonic() < end:
            if due and time.monotonic() - self._start >= self._kill.seconds:
                os.kill(self.id, self._kill.number)
                due = False
            found, status = os.waitpid(self.id, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace")
            time.sleep(0.02)
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        return -99, f"hung: {self.log.read_text(errors='replace')}"

    def went_on_wrongly(self, log: str) -> str | None:
        """Return what is wrong with the checkpoint from which a run went on; None: nothing, or it did not come so far."""
        found = re.search(r"Resuming .* after step (\d+) of", log)
        if found is not None and int(found[1]) != self.saved:
            return f"went on from step {found[1]}, not from {self.saved}"
        return "a checkpoint was not whole" if "damaged-" in log or "cannot restore" in log else None


def is_done(code: int, log: str) -> bool:
    """Return whether there was nothing left to kill."""
    return code == 0 or (code == 1 and ("found it in use" in log or "holds a finished run" in log))


def losses(place: Path) -> list[dict[str, object]]:
    """Return the records of a run without what differs from one run to the next."""
    path = place / "run" / "metrics.jsonl"
    return without_timing([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def names(place: Path) -> set[str]:
    """Return the names of all files, those of checkpoints without their step: SIGTERM saves the step that a run is in."""
    found = {re.sub(r"checkpoints/\d+", "checkpoints/STEP", str(path.relative_to(place))) for path in place.rglob("*")}
    return {name for name in found if "ocdbt" not in name and "/d/" not in name}


def training_flags(root: Path, *, max_steps: int, save_every: int) -> list[str]:
    """Write a model and data, and return the flags of a run on them."""
    model, data = write_tiny_llama(root / "model", num_hidden_layers=1), root / "rows.jsonl"
    data.write_text(
        "".join(f'{{"question": "{number}?", "answer": "{"red " * (number % 3 + 1)}"}}\n' for number in range(9))
    )
    flags = ["--model", str(model), "--data", str(data), "--rank", "4", "--max-length", "64", "--held-out", "0"]
    flags += ["--max-steps", str(max_steps), "--save-every", str(save_every)]
    return [*flags, "--eval-every", "0", "--samples", "0", "--no-memory-check"]


def jobs(root: Path) -> list[Job]:
    """Return the commands, after one uninterrupted run of each."""
    trained = Job("train", "run/adapter", training_flags(root, max_steps=5, save_every=2), root)
    flags = ["--model", str(root / "model"), "--adapter", str(root / "train-whole" / "run" / "adapter"), "--no-compare"]
    return [trained, Job("merge", "merged", flags, root)]


def kill_all(kills: int, seed: int, root: Path) -> list[str]:
    """Kill so many processes and return what was wrong. After some kills in the same place, the command may end."""
    draws, wrong, tally = random.Random(seed), list[str](), collections.Counter[tuple[str, str, str]]()
    trained, merged = jobs(root)
    places: dict[str, Path] = {}
    number = 0
    while tally.total() < kills:  # of processes that were killed before they were done
        number += 1
        job = merged if number % 5 == 4 else trained
        place = places.setdefault(job.name, root / f"{job.name}-{number}")
        place.mkdir(exist_ok=True)
        kill = job.draw(draws)
        process = job.start(place, kill)
        code, log = process.wait()
        killed, done = code in ENDED[kill.number], is_done(code, log)
        problem = (job.damage(place) or process.went_on_wrongly(log)) if done or killed else log[-2000:]
        tally[job.name, kill.number.name, kill.kind] += killed
        last = done or draws.random() < SHARE_OF_RERUNS or tally.total() >= kills
        if last and not problem:
            problem = job.rerun(place)
        if last or problem:
            shutil.rmtree(places.pop(job.name))
        end = "killed" if killed else f"ended with {code}"
        print(f"{number}: {job.name} {kill}: {end}{', run again' if last else ''}, {problem or 'well'}", flush=True)
        wrong += [problem] if problem else []
    for (name, how, kind), count in sorted(tally.items()):
        print(f"{name:6} {how:8} {kind:5} {count:4}")
    print(f"{tally.total()} of {number} were killed in time; {len(wrong)} were wrong")
    return wrong


def goodput(minutes: float, kill_every: float, root: Path) -> None:
    """Kill one run every so many minutes, and print how much of the time was spent in steps that were not lost."""
    flags, place = training_flags(root, max_steps=200_000, save_every=200), root / "long"
    place.mkdir()
    end, metrics, kills, busy, done = time.monotonic() + 60 * minutes, place / "run" / "metrics.jsonl", 0, 0.0, 0
    began = time.monotonic()
    while (now := time.monotonic()) < end:
        process = Process(train.main, [*flags, "--output", str(place / "run")], place, Kill())
        before, first = latest_step(place / "run" / "checkpoints") or 0, None
        abandoned = metrics.stat().st_ino if metrics.exists() else None  # a run that goes on writes the file anew
        stop = min(end, now + 60 * kill_every)
        while time.monotonic() < stop:
            time.sleep(0.1)
            if first is None and metrics.exists() and metrics.stat().st_ino != abandoned:
                first = time.monotonic() if metrics.read_bytes().count(b"\n") > before else None
        os.kill(process.id, signal.SIGKILL)
        process.wait()
        kills += 1
        steps = 0 if first is None else metrics.read_bytes().count(b"\n") - before
        saved = (latest_step(place / "run" / "checkpoints") or 0) - before
        restart = (first or stop) - now
        busy, done = busy + stop - (first or stop), done + steps
        print(f"kill {kills}: {restart:.1f} s to the first step, {steps} steps, {steps - saved} of them lost", flush=True)
    saved, elapsed, step = latest_step(place / "run" / "checkpoints") or 0, time.monotonic() - began, busy / max(done, 1)
    print(f"goodput {saved * step / elapsed:.3f}: {saved} steps of {step:.4f} s in {elapsed:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goodput-minutes", type=float, default=0.0)
    parser.add_argument("--kill-every", type=float, default=5.0)
    chosen = parser.parse_args()
    problems: list[str] = []
    try:
        if chosen.goodput_minutes:
            goodput(chosen.goodput_minutes, chosen.kill_every, FOLDER)
        else:
            problems = kill_all(chosen.kills, chosen.seed, FOLDER)
    finally:
        shutil.rmtree(FOLDER)
    sys.exit(bool(problems))
