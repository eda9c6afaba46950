"""Files of JSON → rows: an object a line, an array of objects, or one object that holds rows or columns."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from qlora_jax.data.file_input import DamagedRow, Input, Row, RowOrDamage, kind_of, not_utf8, shortened
from qlora_jax.data.values import DECODER, check_characters, loads
from qlora_jax.errors import DataError

__all__ = ["read_json"]

_BRACKETS = (b"[", b"{", b"[{")


def read_json(source: Input) -> Iterator[RowOrDamage]:
    """Yield the rows of a file of JSON."""
    numbered = source.lines()
    start: list[tuple[int, bytes]] = []  # up to the second line that is not blank
    full: list[bytes] = []
    for number, line in numbered:
        start.append((number, line))
        full += [line.strip()] if line.strip() else []
        if len(full) == 2:
            break
    if not full:
        return
    # One object in one line of a .json file may hold the rows; in two lines and more, each is a row.
    if len(full) == 1:
        of_lines = source.kind != ".json" and _is_row(full[0])
    else:
        of_lines = _is_row(full[0]) or (full[0] not in _BRACKETS and _is_row(full[1]))
    if of_lines or not full[0].startswith((b"[", b"{")):
        lines = ((number, line) for number, line in chain(start, numbered) if line.strip())
        for number, line in islice(lines, source.skip, None):
            yield _row_of_line(line, f"{source.path.name}, line {number}")
    else:
        # The rows are not one a line: an array, an object that holds the rows, or a file that is damaged at its start.
        yield from islice(_rows_of_document([*start, *numbered], source), source.skip, None)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(loads(line.decode()), dict)
    except ValueError:
        return False


def _row_of_line(line: bytes, place: str) -> RowOrDamage:
    try:
        text = line.decode().rstrip("\r\n")
        return _checked_row(loads(text), place, text)
    except UnicodeDecodeError as error:
        return DamagedRow(not_utf8(place, error))
    except json.JSONDecodeError as error:
        place = f"{place}, column {error.colno}"
        return DamagedRow(f"{place}: expected one JSON object a line, found {shortened(text.strip())!r} ({error.msg})")
    except ValueError as error:
        found = shortened(text.strip())
        return DamagedRow(f"{place}: expected one JSON object a line, found {found!r} ({error})")


def _rows_of_document(lines: list[tuple[int, bytes]], source: Input) -> Iterator[RowOrDamage]:
    """Yield the rows of a file that does not start with one row in one line."""
    path, whole = source.path, b"".join(line for _, line in lines)
    opening = whole.lstrip()[:1]
    try:
        text = whole.decode()
        value = loads(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and opening == b"{":
            objects = _objects_of(text)  # as jq prints them
            if objects is not None:
                yield from (_checked_row(row, f"{path.name}, object {index}", text) for index, row in enumerate(objects))
                return
        full = [(number, line) for number, line in lines if line.strip()]
        if full[0][1].strip() not in _BRACKETS and (opening != b"[" or source.kind != ".json"):
            yield from (_row_of_line(line, f"{path.name}, line {number}") for number, line in full)
            return
        if isinstance(error, UnicodeDecodeError):
            raise DataError(not_utf8(str(path), error)) from error
        expected = "a JSON array of objects" if opening == b"[" else "a JSON object"
        if not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{path}: expected {expected}, found: {error}") from error
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: expected {expected}, "
            f"found {shortened(text[error.pos :])!r} ({error.msg})"
        ) from error
    if isinstance(value, dict):
        value = _rows_of_object(value, source)
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {kind_of(value)}")
    yield from (_checked_row(row, f"{path.name}, element {index}", text) for index, row in enumerate(value))


def _objects_of(text: str) -> list[Any] | None:
    """Return the objects that a text contains one after the other; None if it contains anything else."""
    objects, position, length = [], 0, len(text.rstrip())
    while position < length:
        if text[position].isspace():
            position += 1
            continue
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        objects.append(value)
    return objects


def _rows_of_object(value: Row, source: Input) -> list[Any]:
    """Return the rows that a JSON object holds: a list of them, columns of equal length, or the object itself."""
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    held = {name: part for name, part in lists.items() if part and all(isinstance(row, dict) for row in part)}
    # A list of messages makes the object a row; a list of rows, the object a box around them.
    held = {name: part for name, part in held.items() if not any(_is_message(row) for row in part)}
    if held:
        name = "train" if "train" in held else max(held, key=lambda name: len(held[name]))
        if others := [other for other in value if other != name]:
            source.notes.append(f"of {source.path.name} only {name!r} is read, not {', '.join(map(repr, others))}")
        return held[name]
    columns = {name: list(part.values()) if isinstance(part, dict) else part for name, part in value.items()}
    if columns and all(isinstance(part, list) for part in columns.values()):
        lengths = {len(part) for part in columns.values()}
        dicts = [part for part in value.values() if isinstance(part, dict)]
        by_index = all(key.isdecimal() for part in dicts for key in part)  # as pandas writes a table
        if len(lengths) == 1 and by_index and not any(_is_message(cell) for part in lists.values() for cell in part):
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        if len(dicts) == len(value):  # rows by name
            return dicts
    return [value]


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value.keys() & {"role", "from"}) and bool(value.keys() & {"content", "value"})


def _checked_row(value: object, place: str, text: str) -> RowOrDamage:
    if not isinstance(value, dict):
        return DamagedRow(f"{place}: expected a JSON object, found {kind_of(value)}")
    if "\\ud" in text or "\\uD" in text:  # halves of characters can only be written as escapes
        for name, part in value.items():
            try:
                check_characters(json.dumps({name: part}, ensure_ascii=False, default=str))
            except DataError as error:
                return DamagedRow(f"{place}, key {name!r}: {error}")
    return value
