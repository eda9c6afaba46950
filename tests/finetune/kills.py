"""Kills runs and merges at random operations on files and at random times, and looks at what they leave.

    python tests/finetune/kills.py --kills 100

A killed process leaves the whole result or none: an adapter or a merged model that is there has all its files, with the
bytes of an uninterrupted run. After the same command has run once more, the result is that of the uninterrupted run, and
nothing else is left. Each process is a fork of this one, which has imported everything and has not started JAX yet.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
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
from tiny_models import write_tiny_llama  # noqa: E402

from qlora_jax.commands import merge, train  # noqa: E402

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "os.truncate")
SLOW_SECONDS = 300
SHARE_OF_RERUNS = 0.3


class Job:
    """A command that writes one folder, in a place of its own.

    Attributes:
        name: "train" or "merge".
        result: the folder, below the place, that is whole or not there.
        marker: the file that makes the folder what it is.
        expected: the bytes of its files after an uninterrupted run, by name.
        left: all names in the place after an uninterrupted run, without those that Orbax draws at random.
        operations: how many operations on files an uninterrupted run made.
    """

    def __init__(self, name: str, result: str, marker: str, arguments: Sequence[str], root: Path) -> None:
        self.name, self.result, self.marker, self.arguments, self.root = name, result, marker, [*arguments], root
        place = root / f"{name}-whole"
        place.mkdir()
        code, log = self.start(place, kill_at=0).wait()
        assert code == 0, log
        self.expected, self.left = contents(place / result), names(place)
        self.operations = int((root / f"{name}-whole.count").read_text())

    def start(self, place: Path, *, kill_at: int) -> "Process":
        """Start the command; it kills itself at an operation of that number below the place, unless it is 0."""
        main = {"train": train.main, "merge": merge.main}[self.name]
        return Process(main, [*self.arguments, "--output", str(place / self.result.split("/")[0])], place, kill_at)

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
        code, log = self.start(place, kill_at=0).wait()
        folder, done = place / self.result, "found it in use" in log or "holds a finished run" in log
        if code != 0 and not (done and folder.exists()):
            return log[-2000:]
        if contents(folder) != self.expected:
            return f"{folder}: another result"
        left = names(place)
        return None if left == self.left else f"{place}: left {sorted(left ^ self.left)}"


class Process:
    """A fork that runs a command."""

    def __init__(self, main: object, arguments: Sequence[str], place: Path, kill_at: int) -> None:
        self.log = place.with_suffix(".log")
        self.id = os.fork()
        if self.id:
            return
        count = 0

        def operation(event: str, values: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and any(str(value).startswith(str(place) + os.sep) for value in values[:2]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 70
        try:
            with open(self.log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.addaudithook(operation)
            code = main(arguments)  # type: ignore[operator]
            place.with_suffix(".count").write_text(str(count))
        finally:
            os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Return (exit code, what it printed); a process that hangs is killed."""
        end = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < end:
            found, status = os.waitpid(self.id, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace")
            time.sleep(0.02)
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        return -99, f"hung: {self.log.read_text(errors='replace')}"

    def kill(self) -> None:
        """Kill the process if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.id, signal.SIGKILL)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def names(place: Path) -> set[str]:
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    return {name for name in found if "ocdbt" not in name and "/d/" not in name}


def jobs(root: Path) -> list[Job]:
    """Return the commands, after one uninterrupted run of each."""
    model, data = write_tiny_llama(root / "model", num_hidden_layers=1), root / "rows.jsonl"
    data.write_text(
        "".join(f'{{"question": "{number}?", "answer": "{"red " * (number % 3 + 1)}"}}\n' for number in range(9))
    )
    flags = ["--model", str(model), "--data", str(data), "--rank", "4", "--max-length", "64", "--held-out", "0"]
    flags += ["--max-steps", "3", "--save-every", "2", "--eval-every", "0", "--samples", "0", "--no-memory-check"]
    trained = Job("train", "run/adapter", "adapter_config.json", flags, root)
    flags = ["--model", str(model), "--adapter", str(root / "train-whole" / "run" / "adapter"), "--no-compare"]
    return [trained, Job("merge", "merged", "config.json", flags, root)]


def kill_all(kills: int, seed: int, root: Path) -> list[str]:
    """Kill so many processes and return what was wrong. After some kills in the same place, the command may end."""
    draws, wrong, killed = random.Random(seed), list[str](), 0
    trained, merged = jobs(root)
    places: dict[str, Path] = {}
    for number in range(kills):
        job = merged if number % 4 == 3 else trained
        place = places.setdefault(job.name, root / f"{job.name}-{number}")
        place.mkdir(exist_ok=True)
        if number % 5 == 4:  # at a random time: within C++ too, and in the first seconds
            process, how = job.start(place, kill_at=0), f"after {(seconds := draws.uniform(0.0, 8.0)):.1f} s"
            time.sleep(seconds)
            process.kill()
        else:
            at = draws.randint(1, job.operations)
            process, how = job.start(place, kill_at=at), f"at operation {at} of {job.operations}"
        code, log = process.wait()
        killed += code == -signal.SIGKILL
        done = code != -signal.SIGKILL and (code == 0 or "found it in use" in log or "holds a finished run" in log)
        problem = job.damage(place) if done or code == -signal.SIGKILL else log[-2000:]
        last = done or draws.random() < SHARE_OF_RERUNS or number + 4 >= kills
        if last and not problem:
            problem = job.rerun(place)
        if last or problem:
            shutil.rmtree(places.pop(job.name))
        end = "killed" if code == -signal.SIGKILL else f"ended with {code}"
        print(f"{number + 1}: {job.name} {how}: {end}{', run again' if last else ''}, {problem or 'well'}", flush=True)
        wrong += [problem] if problem else []
    print(f"{killed} of {kills} were killed in time; {len(wrong)} were wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        problems = kill_all(chosen.kills, chosen.seed, FOLDER)
    finally:
        shutil.rmtree(FOLDER)
    sys.exit(bool(problems))
