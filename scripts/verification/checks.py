"""Checks and their rows.

A check announces the names of its rows before it runs. So each of them is in the report, whatever happens: a row that a
check could not give because of an error, a crash, or the end of the time is there with the reason.

    pass, fail   a number was compared with its limit, which is in the row
    measured     a number without a limit
    skipped      the device, the machine or the time did not allow it; the reason is in the row
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

Status = Literal["pass", "fail", "measured", "skipped"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: what was checked; unique within its section.
        status: see the module's docstring.
        text: the result in words, with units and with the limit, or the reason.
        values: the numbers for JSON.
        section: the section that the check belongs to.
    """

    name: str
    status: Status
    text: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    section: str = ""

    def line(self) -> str:
        """Return the row as a line for a terminal."""
        return f"{self.section:10} {self.status:9} {self.name:58} {self.text}"


@dataclasses.dataclass(frozen=True)
class Check:
    """A computation that gives rows.

    Attributes:
        names: the names of its rows, in their order.
        run: yields the rows; it may raise `Skipped` or any other error at any of them.
    """

    names: tuple[str, ...]
    run: Callable[[], Iterable[Row]]


class Skipped(Exception):
    """A check, or the rest of it, is not possible on this device; the message says why."""


def checked(name: str, errors: dict[str, float], limit: float, unit: str = "relative error") -> Row:
    """Return a row that passes if every error, by the name of what it is of, is at most `limit`; NaN fails."""
    worst = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    status: Status = "pass" if errors[worst] <= limit else "fail"
    of = f" ({worst})" if len(errors) > 1 else ""
    return Row(name, status, f"{unit} {errors[worst]:.1e}{of}, at most {limit:.1e}", {**errors, "limit": limit})


def measured(name: str, text: str, /, **values: Any) -> Row:
    """Return a row without a limit."""
    return Row(name, "measured", text, values)


def skipped(name: str, reason: str) -> Row:
    """Return the row of something that was not checked."""
    return Row(name, "skipped", f"skipped: {reason}")


def rows_of(check: Check) -> Iterator[Row]:
    """Yield exactly the rows that a check announces; an error becomes the reason in those that it did not give.

    A row that failed with an error is one that fails. The rows after it are skipped, because they were not checked.
    """
    left = list(check.names)
    try:
        for row in check.run():
            left.remove(row.name)
            yield row
        reason, failed = "the check did not give this row", True
    except Skipped as error:
        reason, failed = str(error), False
    except Exception as error:  # whatever a device's compiler or driver raises is a result of this program
        line = (str(error).strip().splitlines() or [""])[0]
        reason, failed = f"{type(error).__name__}: {line[:300]}", True
    yield from without_result(left, reason, failed=failed)


def without_result(names: Iterable[str], reason: str, *, failed: bool) -> Iterator[Row]:
    """Yield a row for each name: the first one fails if `failed`, the others are skipped."""
    for index, name in enumerate(names):
        if failed and index == 0:
            yield Row(name, "fail", reason)
        else:
            yield skipped(name, f"after {reason}" if failed else reason)


def summary(rows: Iterable[Row]) -> str:
    """Return how many rows there are of each status, and the names of those that failed."""
    rows = list(rows)
    counts = {status: sum(row.status == status for row in rows) for status in ("pass", "fail", "measured", "skipped")}
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    failed = [f"  {row.section}: {row.name}: {row.text}" for row in rows if row.status == "fail"]
    return "\n".join([text, *(["failed:", *failed] if failed else [])])
