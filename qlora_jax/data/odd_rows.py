"""An account of the rows that cannot be used, and of the columns and keys that nothing reads.

A row that cannot be used is an error, or it is left out and counted with others for the same reason. Two reasons are the
same if their messages agree up to numbers and up to what was found. If more than one row in ten is left out, and more than
one at all, the file probably has another form than was expected, which is an error.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

from qlora_jax.errors import DataError, list_names

__all__ = ["Odd", "OnBadRow", "RowAccount", "RowTally"]

OnBadRow = Literal["error", "skip"]
P = ParamSpec("P")
T = TypeVar("T")
_MOST_REASONS = 5  # how many reasons a message spells out
_LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Odd:
    """The rows that are left out for one reason: their number, the first of them, and the message about that one."""

    count: int
    first: int
    message: str

    def __str__(self) -> str:
        message = self.message if len(self.message) <= _LONGEST else self.message[:_LONGEST] + "…"
        return f"row {self.first}: {message}{f' (and {self.count - 1:,} more like it)' if self.count > 1 else ''}"


@dataclass(frozen=True)
class RowAccount:
    """The rows of a source that are left out, by reason, and the columns and keys that are not used, with their rows."""

    bad: dict[str, Odd] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "RowAccount") -> "RowAccount":
        """Return the account of the rows of both."""
        bad = dict(self.bad)
        for reason, odd in other.bad.items():
            before = bad.get(reason)
            first = min((odd, *((before,) if before else ())), key=lambda one: one.first)
            bad[reason] = Odd(odd.count + (before.count if before else 0), first.first, first.message)
        return RowAccount(bad, dict(Counter(self.unused) + Counter(other.unused)))

    @property
    def left_out(self) -> int:
        """The number of rows that are left out."""
        return sum(odd.count for odd in self.bad.values())

    def sentences(self) -> list[str]:
        """Return what a report says, none for rows without any oddity."""
        said = []
        if self.bad:
            said.append(f"{self.left_out:,} left out: cannot be used ({self.reasons()})")
        if self.unused:
            said.append(f"not used: {list_names(sorted(self.unused))}")
        return said

    def reasons(self) -> str:
        """Return the reasons, the most frequent first."""
        most = sorted(self.bad.values(), key=lambda odd: (-odd.count, odd.first))
        more = f"; and {len(most) - _MOST_REASONS} more reasons" if len(most) > _MOST_REASONS else ""
        return "; ".join(map(str, most[:_MOST_REASONS])) + more

    def check(self, rows: int) -> None:
        """Raise DataError if too many of so many rows are left out."""
        if self.left_out > 1 and 10 * self.left_out > rows:
            raise DataError(
                f"{self.left_out:,} of {rows:,} rows cannot be used, more than one in ten, which are too many to leave out "
                f"(rows count from 0): {self.reasons()}"
            )


class RowTally:
    """Counts what a `RowAccount` contains, row by row."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        if on_bad_row not in ("error", "skip"):
            raise DataError(f"on_bad_row: expected error or skip, found {on_bad_row!r}")
        self._on_bad_row, self._account, self._unused = on_bad_row, RowAccount(), Counter[str]()

    def leave_out(self, row: int, error: DataError) -> None:
        """Count a row that cannot be used, or raise DataError with its number if that is an error.

        Args:
            row: the number of the row, from 0.
            error: what is wrong with it.
        """
        if self._on_bad_row == "error":
            raise DataError(f"row {row} (counted from 0): {error}") from error
        reason = re.sub(r"\d+", "#", re.split(r"[,:] found\b", str(error))[0])
        self._account = self._account + RowAccount({reason: Odd(1, row, str(error))})

    def attempt(self, row: int, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
        """Return what a function returns; if it raises DataError, `leave_out` the row and return None."""
        try:
            return function(*arguments, **options)
        except DataError as error:
            self.leave_out(row, error)
            return None

    def unused(self, names: Iterable[str]) -> None:
        """Count the columns and keys of a row that nothing reads."""
        self._unused.update(names)

    def account(self) -> RowAccount:
        """Return the account of all rows so far."""
        return self._account + RowAccount(unused=dict(self._unused))
