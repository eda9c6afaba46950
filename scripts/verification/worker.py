"""Run one section in this process: `python -m scripts.verification.worker SECTION [small]`.

Each line on stdout is a row as JSON, printed as soon as it is known. Whatever ends this process, the program that started it
knows the names of all rows, and so which of them are missing.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import qlora_jax  # noqa: F401  (it prepares JAX for machines without an accelerator)
from scripts.verification.checks import Check, Row, rows_of, skipped
from scripts.verification.sections import Section, checks_of


def rows_in_time(checks: Sequence[Check], section: Section, over: Callable[[], bool], reason: str) -> Iterator[Row]:
    """Yield the rows of checks; those of checks that begin when the time is `over` are skipped for the reason."""
    for check in checks:
        rows = (skipped(name, reason) for name in check.names) if over() else rows_of(check)
        yield from (dataclasses.replace(row, section=section) for row in rows)


def main() -> int:
    """Run the section that the command line names."""
    section = cast(Section, sys.argv[1])
    checks = checks_of(section, small="small" in sys.argv[2:])
    stdout, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be among the rows
    for row in rows_in_time(checks, section, lambda: False, ""):
        print(json.dumps(dataclasses.asdict(row), default=str), file=stdout, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
