"""Masks of attention that are computed tile by tile, so that none of length x length exists."""

import dataclasses
from typing import Any, Protocol

from jax import Array


class Visible(Protocol):
    """Which keys a query may attend to. Instances are compile-time constants, and so must be hashable."""

    def mask(self, arrays: Any, rows: Array, columns: Array) -> Array:
        """Return bool `[b or 1, rows, columns]` for numbers of queries and keys, which may be beyond the last."""
        ...

    def reaches(self, rows: range, columns: range) -> bool:
        """Return False if none of these queries may attend to any of these keys, whatever the arrays are."""
        ...


@dataclasses.dataclass(frozen=True)
class CausalRows:
    """Earlier tokens of the same segment.

    Attributes:
        window: number of tokens that a token attends to, including itself; None: all earlier ones.
        shared: number of first tokens that tokens of all segments attend to.
    """

    window: int | None = None
    shared: int = 0

    def mask(self, arrays: Array | None, rows: Array, columns: Array) -> Array:
        """Return the mask; `arrays` is int32 `[b, t]`, the segment of each token, or None: each row is one segment."""
        seen = columns <= rows[:, None]
        if self.window is not None:
            seen = seen & (columns > rows[:, None] - self.window)
        if arrays is None:
            return seen[None]
        own, others = (at(arrays, index) for index in (rows, columns))
        same = own[:, :, None] == others[:, None]
        same = same | (columns < self.shared) if self.shared else same
        return seen & same & (others > 0)[:, None]

    def reaches(self, rows: range, columns: range) -> bool:
        """Return whether the last query is not before the first key, nor the first query's window after the last key."""
        return columns[0] <= rows[-1] and (self.window is None or columns[-1] > rows[0] - self.window)


@dataclasses.dataclass(frozen=True)
class KeyRows:
    """The keys of a mask, which is the same for all queries.

    Attributes:
        before: number of keys before that of the first query, if queries attend to no later keys; None: to all keys.
    """

    before: int | None = None

    def mask(self, arrays: Array, rows: Array, columns: Array) -> Array:
        """Return the mask; `arrays` is bool `[b or 1, s]`, true for keys that queries may attend to."""
        seen = at(arrays, columns)[:, None]
        return seen if self.before is None else seen & (columns <= rows[:, None] + self.before)

    def reaches(self, rows: range, columns: range) -> bool:
        """Return whether the last query is not before the first key."""
        return self.before is None or columns[0] <= rows[-1] + self.before


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask that is computed tile by tile.

    Attributes:
        visible: which keys a query may attend to.
        arrays: the arrays that `visible` reads; they get no gradient.
    """

    visible: Visible
    arrays: Any = None


def at(values: Array, index: Array) -> Array:
    """Return the columns `index` of `[b, n]` values, 0 or False beyond the last."""
    return values.at[:, index].get(mode="fill", fill_value=0)
