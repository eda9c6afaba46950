"""Check this package on the attached GPU or TPU: its kernels, attention, training, decoding and plans, in at most 8 minutes.

    python scripts/verify_device.py                                  everything; the report is in device.json
    python scripts/verify_device.py --sections kernels attention     a part
    python scripts/verify_device.py --small                          small shapes, as always on a CPU
    python scripts/verify_device.py --minutes 20                     more time, if rows were skipped because it was over

Each line of the table is a check that passed or failed, a measurement, or something that was skipped and why. The exit code
is 1 if a check failed. docs/device.md explains the lines. It needs nothing but the repository; it fetches SmolLM2 if it can.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_jax import cli
from qlora_jax.errors import OptionError
from qlora_jax.platforms import device_is_attached
from scripts.verification.checks import Row, summary
from scripts.verification.processes import ONE_DEVICE, rows_in_process
from scripts.verification.sections import SECTIONS, SHARES, Section, checks_of
from scripts.verification.worker import rows_in_time

_LEAST = 10  # seconds: a section is not begun with less
_OVER = "the time was over (--minutes gives more)"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Check the attached device."""

    sections: tuple[Section, ...] = SECTIONS
    """Parts to run; "machine" always runs."""
    small: bool = False
    """Small shapes and models, all in one process; always on a CPU."""
    minutes: float = 8.0
    """Time for everything; what is not done then is in the report as skipped."""
    output: Path = Path("device.json")
    """JSON file to write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Run the sections, print each row, write the report after each section, and return 1 if a row failed, else 0."""
    _check(arguments)
    start = time.monotonic()
    end = start + 60 * arguments.minutes
    small = arguments.small or not device_is_attached()
    found: list[Row] = []
    for section in SECTIONS:
        if section not in ("machine", *arguments.sections):
            continue
        rows = _rows_here(section, end) if small else _rows_of(section, end, 60 * arguments.minutes, found)
        for row in rows:
            found.append(row)
            print(row.line(), flush=True)
        small = small or _value(found, "platform") == "cpu"
        _write(arguments, found, small, time.monotonic() - start)
    print(summary(found))
    return 1 if any(row.status == "fail" for row in found) else 0


def _check(arguments: Arguments) -> None:
    if arguments.minutes <= 0:
        raise OptionError(f"--minutes: expected more than 0, found {arguments.minutes}")
    folder = arguments.output.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"--output: expected a file in a folder that exists, found {arguments.output} ({folder} does not)")


def _rows_here(section: Section, end: float) -> Iterator[Row]:
    """Yield the rows of a section that this process computes with small shapes."""
    return rows_in_time(checks_of(section, small=True), section, lambda: time.monotonic() > end, _OVER)


def _rows_of(section: Section, end: float, total: float, found: list[Row]) -> Iterator[Row]:
    """Yield the rows of a section that a process of its own computes."""
    checks, left = checks_of(section, small=False), end - time.monotonic()
    if left < _LEAST:
        yield from rows_in_time(checks, section, lambda: True, _OVER)
        return
    names = [name for check in checks for name in check.names]
    several = (_value(found, "count") or 1) > 1
    yield from rows_in_process(
        section, names, min(left, SHARES[section] * total), ONE_DEVICE.get(_value(found, "platform"), {}) if several else {}
    )


def _value(found: list[Row], name: str) -> Any:
    """Return a value of the row that says what the devices are; None before it is known."""
    return next((row.values[name] for row in found if row.section == "machine" and name in row.values), None)


def _write(arguments: Arguments, rows: list[Row], small: bool, seconds: float) -> None:
    report = {
        "small": small,
        "seconds": seconds,
        "passes": all(row.status != "fail" for row in rows),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
