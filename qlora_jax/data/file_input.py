"""A file that is being read, and what becomes of a part of it that is no row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_jax.errors import DataError

__all__ = ["DamagedRow", "Input", "Row", "RowOrDamage", "kind_of", "not_utf8", "shortened"]

Row = dict[str, Any]


@dataclass(frozen=True)
class DamagedRow:
    """A part of a file that should be a row and is none.

    Attributes:
        reason: the place, which starts with the file's name, what was expected there and what was found.
    """

    reason: str


RowOrDamage = Row | DamagedRow


@dataclass(frozen=True)
class Input:
    """A file that is open, the extension that says how it is read, and the arguments of `read_file`."""

    path: Path
    file: BinaryIO
    kind: str
    skip: int
    notes: list[str]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, bytes with the line end), without a byte-order mark."""
        for number, line in enumerate(self.file, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{self.path}: expected UTF-8 text, found UTF-16; convert it, for example with iconv")
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

    def texts(self) -> Iterator[tuple[int, str]]:
        """Yield (number from 1, text without its line end); raise DataError at the first byte that is not UTF-8."""
        for number, line in self.lines():
            try:
                yield number, line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(not_utf8(f"{self.path}, line {number}", error)) from error


def not_utf8(place: str, error: UnicodeDecodeError) -> str:
    """Return the message for bytes that are not UTF-8."""
    byte = error.object[error.start]
    where = f"byte 0x{byte:02x} at byte {error.start} of the line"
    return f"{place}: expected UTF-8 text, found {where}; convert it, for example with iconv"


def shortened(text: str, limit: int = 60) -> str:
    """Return the start of a text, for a message."""
    return text if len(text) <= limit else text[:limit] + "…"


def kind_of(value: object) -> str:
    """Return the kind and the start of a value, for a message."""
    return "null" if value is None else f"{type(value).__name__} {shortened(repr(value))}"
