"""Single values of rows: their text, JSON that is written as text, and missing values.

A value in a text column is learned as it is written in the file: a number of a JSON file keeps its digits (`8.50` and not
8.5), `true` stays `true`, a date of a Parquet file is its ISO form. JSON's NaN, which pandas writes for an empty cell, and a
floating-point NaN of a Parquet file are missing values.
"""

import ast
import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import DataError

__all__ = [
    "DECODER",
    "WrittenFloat",
    "check_characters",
    "checked_text",
    "described",
    "from_json",
    "is_missing",
    "loads",
    "table_row",
]

# The longest Python literal that is read as a list of messages; the parser needs much memory for each character.
_LONGEST_LITERAL = 1_000_000


class WrittenFloat(float):
    """A number of a JSON file, with the digits that the file has."""

    written: str

    def __new__(cls, written: str) -> "WrittenFloat":
        number = super().__new__(cls, written)
        number.written = str(written)
        return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # one of the values would be lost
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice in one object")
    return made


# Floating-point numbers are `WrittenFloat`, and NaN is None.
DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=WrittenFloat,
    parse_constant=lambda name: None if name == "NaN" else float(name),
)


def loads(text: str) -> Any:
    """Return the value of a JSON text, with floating-point numbers as `WrittenFloat` and NaN as None.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has an object with the same key twice.
    """
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def from_json(text: str, place: str) -> Any:
    """Return the value that a text column contains as JSON or, as pandas writes lists into CSV files, as a Python literal.

    Raises:
        DataError: it is neither.
    """
    try:
        return loads(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        damaged = isinstance(error, json.JSONDecodeError)
    if damaged and len(text) <= _LONGEST_LITERAL:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    raise DataError(f"{place}: expected JSON, found {text!r:.60} ({reason})")


def checked_text(value: object, place: str) -> str:
    """Return the text of a text, a number, a truth value, a date or a time.

    Raises:
        DataError: the value is of another kind; the message starts with `place`.
    """
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case WrittenFloat():
            return value.written
        case int() | float() | decimal.Decimal() if not is_missing(value):
            return str(value)
        case datetime.datetime() if value.time() == datetime.time() and value.tzinfo is None:
            # The JSON reader of `datasets`, which hub data sets come through, makes a time at midnight of a date.
            return value.date().isoformat()
        case datetime.date() | datetime.time():
            return value.isoformat()
    raise DataError(f"{place}: expected text, found {described(value)}")


def check_characters(text: str) -> None:
    """Raise DataError if a text has half of a character, a surrogate without its pair: it has no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"expected whole characters, found {half}, half of a surrogate pair") from None


def described(value: object) -> str:
    """Return the type and the start of a value, for a message."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"


def is_missing(value: object) -> bool:
    """Return whether a value stands for none: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table without the nulls within its values.

    Arrow gives each object in a table the union of all their keys, with null where one has none. Parquet files and hub data
    sets are tables; JSON files are not, and their nulls are data.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    return value
