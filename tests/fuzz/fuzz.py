"""Damages files of models, adapters, runs and data, opens them as the commands do, and looks at what comes of it.

    python tests/fuzz/fuzz.py --mutations 3000 --seed 1
    python tests/fuzz/fuzz.py --seed 1 --only 1234        one mutation of these, with the traceback of what it raised

Each mutation changes one file (fuzz_targets.py; mutations.py and binaries.py). It must end in one of these ways:

    refused      a QLoRAError with a short message
    identical    the change has no effect on what is read
    changed      another value that a file may have, such as another weight

Problems are any other exception, a message that is long or empty, more than 10 seconds of processor time, and more than 2 GB
of memory. A process reads the files, and this one watches it: a loop in compiled code cannot be interrupted from within.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from fuzz_folders import write_folders  # noqa: E402
from fuzz_targets import TARGETS, Target, digest  # noqa: E402

from qlora_jax.errors import QLoRAError  # noqa: E402

MOST_SECONDS, MOST_WAITING = 10.0, 600.0  # of processor time; of the clock, for a process that sleeps
MOST_BYTES = 2 * 2**30
MOST_CHARACTERS, MOST_LINES = 3000, 12  # of a message
PAGE = os.sysconf("SC_PAGE_SIZE")
Outcome = dict[str, Any]


class Place:
    """Fresh folders, and what opening them undamaged gives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._expected: dict[str, str] = {}

    def expected(self, target: Target) -> str:
        """Return the digest of a folder that is not damaged. The first time, programs are compiled."""
        key = f"{target.folder} {target.open.__name__}"
        if key not in self._expected:
            self._expected[key] = digest(target.open(self.root / target.folder))
        return self._expected[key]

    def files(self, target: Target) -> list[Path]:
        found = sorted(
            path for pattern in target.files for path in (self.root / target.folder).glob(pattern) if path.is_file()
        )
        assert found, target
        return [path for path in found if path.stat().st_size]

    def attempt(self, name: str, seed: int, number: int, *, show: bool = False) -> Outcome:
        """Make one mutation, open the folder, and undo it."""
        target, draws = TARGETS[name], random.Random(f"{seed} {number}")
        path = draws.choice(self.files(target))
        content = path.read_bytes()
        new, what = target.mutate(content, draws)
        outcome: Outcome = {"format": name, "number": number, "what": f"{path.relative_to(self.root)}: {what[:300]}"}
        before = used_seconds(), reset_peak()
        path.write_bytes(new)
        try:
            found = digest(target.open(self.root / target.folder))
            outcome["kind"] = "identical" if found == self.expected(target) else "changed"
        except QLoRAError as error:
            outcome |= judged(str(error), path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also what compiled code raises where it fails
            outcome |= {"kind": "PROBLEM", "said": f"{type(error).__name__}: {str(error)[:300]} ({innermost(error)})"}
            if show:
                traceback.print_exc()
        finally:
            path.write_bytes(content)
        outcome |= {"seconds": used_seconds() - before[0], "bytes": max(peak() - before[1], 0)}
        for key, most in (("seconds", MOST_SECONDS), ("bytes", MOST_BYTES)):
            if outcome[key] > most:
                outcome |= {"kind": "PROBLEM", "said": f"{outcome[key]:,.0f} {key}; {outcome.get('said', '')}"}
        return outcome


def judged(said: str, path: Path) -> Outcome:
    """Return whether a message is short, and whether it names the file or its folder."""
    if not said.strip() or len(said) > MOST_CHARACTERS or said.count("\n") > MOST_LINES or "Traceback" in said:
        return {
            "kind": "PROBLEM",
            "said": f"a message of {len(said)} characters, {said.count(chr(10)) + 1} lines: {said[:300]}",
        }
    names = {path.name, *(parent.name for parent in path.parents[:4])} - {"", "/"}
    return {"kind": "refused", "said": said, "named": any(name in said for name in names)}


def innermost(error: BaseException) -> str:
    """Return the last lines of the package that an error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "qlora_jax" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])


def used_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def reset_peak() -> int:
    """Let Linux count the peak memory from now on; return the memory of now in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident("self")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def resident(process: int | str) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def seconds_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and of children that it has waited for


class Reader:
    """A process that makes mutations one after the other, in folders of its own, and writes a line before and after each."""

    def __init__(self, jobs: list[tuple[str, int]], seed: int, pristine: Path, root: Path) -> None:
        shutil.copytree(pristine, root)
        receiving, sending = os.pipe()
        self.id = os.fork()
        if not self.id:
            os.close(receiving)
            work(jobs, seed, root, os.fdopen(sending, "w"))
        os.close(sending)
        os.set_blocking(receiving, False)
        self.pipe, self.text = receiving, b""

    def lines(self) -> Iterator[Any]:
        """Yield what the process has written since the last call; None at its end."""
        while True:
            try:
                part = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not part:
                yield None
                return
            *whole, self.text = (self.text + part).split(b"\n")
            yield from map(json.loads, whole)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        os.close(self.pipe)


def work(jobs: list[tuple[str, int]], seed: int, root: Path, out: TextIO) -> None:
    """Make the mutations, and leave the process."""
    code = 70
    try:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        os.dup2(os.open(root / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.chdir(root)
        place = Place(Path())
        for name in dict.fromkeys(name for name, _ in jobs):
            place.expected(TARGETS[name])
        for name, number in jobs:
            print(json.dumps({"format": name, "number": number, "start": True}), file=out, flush=True)
            print(json.dumps(place.attempt(name, seed, number)), file=out, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        out.close()
        os._exit(code)


def watch(jobs: list[tuple[str, int]], seed: int, pristine: Path, root: Path) -> Iterator[Outcome]:
    """Yield the outcome of each mutation. A process that takes too much is ended, and another goes on after it."""
    while jobs:
        reader = Reader(jobs, seed, pristine, root / f"reader-{len(jobs)}")
        current, begun, waited = jobs[0], seconds_of(reader.id), time.monotonic()
        size, working, ended = resident(reader.id), False, False
        while not ended:
            time.sleep(0.05)
            for line in reader.lines():
                if line is None:
                    ended = True
                elif line.get("start"):
                    current, working = (line["format"], line["number"]), True
                    begun, waited, size = seconds_of(reader.id), time.monotonic(), resident(reader.id)
                else:
                    jobs, working = jobs[1:], False
                    yield line
            if not working or ended:
                continue
            used, grown, wall = seconds_of(reader.id) - begun, resident(reader.id) - size, time.monotonic() - waited
            if used > 2 * MOST_SECONDS or grown > 2 * MOST_BYTES or wall > MOST_WAITING:
                ended, working, jobs = True, False, jobs[1:]
                yield failed(current, f"ended after {used:.0f} s of processor time, {wall:.0f} s, {grown:,} bytes")
        reader.end()
        if working:
            yield failed(current, "the process died")
            jobs = jobs[1:]
        elif jobs and current == jobs[0]:  # it has not begun: the folders that are not damaged cannot be opened
            raise RuntimeError((root / f"reader-{len(jobs)}" / "stderr").read_text(errors="replace")[-3000:])


def failed(job: tuple[str, int], said: str) -> Outcome:
    return {"format": job[0], "number": job[1], "kind": "PROBLEM", "what": "", "said": said, "seconds": 0.0, "bytes": 0}


def jobs_of(formats: list[str], count: int) -> list[tuple[str, int]]:
    return [(formats[number % len(formats)], number) for number in range(count)]


def report(outcomes: list[Outcome], seed: int, *, messages: bool) -> int:
    """Print a line for each format, and each problem with the command that makes it again; return the number of problems."""
    kinds = ("refused", "identical", "changed", "PROBLEM")
    print(f"{'format':20}" + "".join(f"{kind:>10}" for kind in kinds) + f"{'most s':>8}{'most MB':>9}  not named")
    for name in dict.fromkeys(outcome["format"] for outcome in outcomes):
        of = [outcome for outcome in outcomes if outcome["format"] == name]
        counts = collections.Counter(outcome["kind"] for outcome in of)
        unnamed = sum(not outcome.get("named", True) for outcome in of)
        line = "".join(f"{counts[kind]:10}" for kind in kinds)
        print(f"{name:20}{line}{max(o['seconds'] for o in of):8.1f}{max(o['bytes'] for o in of) / 2**20:9.0f}  {unnamed}")
    if messages:
        for outcome in outcomes:
            mark = "" if outcome.get("named", True) else " NOT NAMED"
            print(f"{outcome['number']} {outcome['what']}")
            print(f"    {outcome['kind']}{mark} {outcome['seconds']:.1f} s: {outcome.get('said', '')[:400]}")
    problems = [outcome for outcome in outcomes if outcome["kind"] == "PROBLEM"]
    for outcome in problems:
        again = f"python tests/fuzz/fuzz.py --seed {seed} --formats {outcome['format']} --only {outcome['number']}"
        print(f"PROBLEM {outcome['format']}, {outcome['what']}\n    {outcome['said']}\n    {again}")
    total = sum(outcome["seconds"] for outcome in outcomes)
    print(f"{len(outcomes)} mutations, {len(problems)} problems, {total:.0f} s of processor time")
    return len(problems)


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", type=int, help="the number of one mutation, which is made in this process")
    parser.add_argument("--messages", action="store_true", help="print every mutation and what was said")
    chosen = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        child = os.fork()  # JAX must not have started where a process forks
        if not child:
            work_folders(root / "pristine")
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return 1
        if chosen.only is not None:
            name = chosen.formats[chosen.only % len(chosen.formats)]
            os.chdir(root / "pristine")
            outcome = Place(Path()).attempt(name, chosen.seed, chosen.only, show=True)
            print("\n".join(f"{key}: {value}" for key, value in outcome.items()))
            return outcome["kind"] == "PROBLEM"
        jobs = jobs_of(chosen.formats, chosen.mutations)
        outcomes = list(watch(jobs, chosen.seed, root / "pristine", root))
        return report(outcomes, chosen.seed, messages=chosen.messages) > 0
    finally:
        shutil.rmtree(root)


def work_folders(root: Path) -> None:
    """Write the folders, and leave the process."""
    code = 70
    try:
        root.mkdir()
        os.chdir(root)
        write_folders(Path())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
