"""Streams of rows, which are never completely in memory, and whose position can be saved."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_jax.data.files import RowOrDamage, read_file
from qlora_jax.data.values import table_row
from qlora_jax.errors import DataError

__all__ = ["ChangedStream", "FileStream", "HubStream", "RowStream"]


class RowStream(Protocol):
    """A stream of rows, whose position can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def skip(self, n: int) -> "RowStream":
        """Return the stream without its first rows."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        ...


class FileStream:
    """The rows of files one after the other; a position is the number of a file and of a row of it."""

    def __init__(self, files: Sequence[Path], skip: int = 0) -> None:
        self._files, self._file, self._row = tuple(files), 0, skip

    def __iter__(self) -> Iterator[RowOrDamage]:
        while self._file < len(self._files):
            first = self._row
            for row in read_file(self._files[self._file], skip=first):
                self._row += 1
                yield row
            # A stream that begins after more rows than its first files have goes on in the next ones.
            beyond = first and self._row == first
            left = first - sum(1 for _ in read_file(self._files[self._file])) if beyond else 0
            self._file, self._row = self._file + 1, left

    def skip(self, n: int) -> "FileStream":
        """Return the stream without its first rows."""
        return FileStream(self._files, self._row + n)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        try:
            self._file, self._row = int(state["file"]), int(state["row"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"position in the data: expected a file and a row, found {state!r:.80}") from error


class HubStream:
    """The rows of a hub data set, as `datasets` streams them, without the nulls of its tables."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[RowOrDamage]:
        return (table_row(row) for row in self._rows)

    def skip(self, n: int) -> "HubStream":
        """Return the stream without its first rows."""
        return HubStream(self._rows.skip(n))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row."""
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self._rows.load_state_dict(state)


class ChangedStream:
    """The rows of a stream after a change of each."""

    def __init__(self, rows: RowStream, change: Callable[[RowOrDamage], RowOrDamage]) -> None:
        self._rows, self._change = rows, change

    def __iter__(self) -> Iterator[RowOrDamage]:
        return map(self._change, self._rows)

    def skip(self, n: int) -> "ChangedStream":
        """Return the stream without its first rows."""
        return ChangedStream(self._rows.skip(n), self._change)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row."""
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        self._rows.load_state_dict(state)
