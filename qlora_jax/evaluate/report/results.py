"""Tables and pictures of the results that the sub-commands print as JSON, whichever they are (compared.py has `compare`).

numbers and texts                        a table of two columns
an object or a list of objects           a table with a row for each, and a column for each name in them
rows with a value and its bounds         a picture of the intervals, too: value, rating or relative; low; high
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.report.compared import comparison_parts, drawable
from qlora_jax.evaluate.report.page import table
from qlora_jax.evaluate.report.pictures import intervals

__all__ = ["of_result"]

_VALUES = ("value", "rating", "relative")
_LABELS = ("model", "judges", "name", "metric", "task")
_DEEPEST = 4
_MOST_ROWS = 300


def of_result(values: Mapping[str, Any]) -> list[str]:
    """Return the parts of a section for one object of results."""
    compared = comparison_parts(values)
    return _parts("", values, 0) if compared is None else compared


def _parts(title: str, values: Mapping[str, Any], depth: int) -> list[str]:
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    parts = []
    if plain:
        parts.append(table(["", "value"], list(plain.items()), title, words=[1] if _has_words(plain) else []))
    for name, value in values.items():
        below = f"{title}: {name}" if title else name
        if isinstance(value, Mapping) and value:
            rows = {key: row for key, row in value.items() if isinstance(row, Mapping)}
            if rows and len(rows) == len(value):
                parts += _table_of(below, rows)
            elif depth < _DEEPEST:
                parts += _parts(below, value, depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and not _is_plain(value):
            rows = [row for row in value if isinstance(row, Mapping)]
            parts += _table_of(below, {_label(row, place): row for place, row in enumerate(rows, start=1)})
    return parts


def _table_of(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    flat = {name: _flat(row) for name, row in list(rows.items())[:_MOST_ROWS]}
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    texts = {column for row in flat.values() for column, value in row.items() if isinstance(value, (str, list))}
    words = [place for place, column in enumerate(columns, start=1) if column in texts]
    cells = [[name, *(row.get(column) for column in columns)] for name, row in flat.items()]
    more = f" (the first {_MOST_ROWS} of {len(rows):,} rows)" if len(rows) > _MOST_ROWS else ""
    parts = [table(["", *columns], cells, title + more, words)]
    drawn = {name: one for name, row in rows.items() if (one := _interval(row)) is not None}
    kinds = {str(row.get("metric")) for name, row in rows.items() if name in drawn}
    if len(drawn) > 1 and len(kinds) == 1:  # figures of different kinds have no common axis
        largest = max(abs(one.value) for one in drawn.values())
        parts.insert(0, intervals(drawn, title, 1 if largest >= 20 else 3))
    return parts


def _interval(row: Mapping[str, Any]) -> Interval | None:
    """Return the figure of a row with its bounds, if it has them and they can be drawn."""
    return drawable(next((row[name] for name in _VALUES if name in row), None), row.get("low"), row.get("high"))


def _flat(row: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, Any]:
    """Return the values of a row, those of objects in it by the names of both."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}, ", depth + 1) if depth < _DEEPEST else {}
        elif _is_plain(value):
            found[before + name] = value
    return found


def _label(row: Mapping[str, Any], place: int) -> str:
    found = [row[name] for name in _LABELS if name in row]
    words = ", ".join(" / ".join(map(str, one)) if isinstance(one, list) else str(one) for one in found)
    return f"{place}. {words}" if words else str(place)


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(one is None or isinstance(one, (str, int, float)) for one in value)
    return value is None or isinstance(value, (str, int, float))


def _has_words(values: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) for value in values.values())
