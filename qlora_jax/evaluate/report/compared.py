"""The results of `evaluate.py compare`: pictures of each metric and of what changed, and the table that the command prints.

{"metric": "perplexity", "model": "mine", "value": 12.3, "low": 11.0, "high": 13.7, "against": "base, nf4+dq",
 "change": {"kind": "gain", "unit": "%", "value": -84.6, "low": -86.6, "high": -82.4, "verdict": "better"}}
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.report.page import paragraph, table
from qlora_jax.evaluate.report.pictures import intervals

__all__ = ["comparison_parts", "drawable"]

_LARGEST = 1e100  # number that is drawn
_HEADER = ["model", "metric", "value", "95 % interval", "change", "95 % interval", "against", "kind", "verdict"]


def comparison_parts(values: Mapping[str, Any]) -> list[str] | None:
    """Return the parts of a section for the results of a comparison; None if they are other results."""
    rows = values.get("compare")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows or not all(map(_is_row, rows)):
        return None
    parts = [paragraph(f"Measured on {values['data']}.")] if isinstance(values.get("data"), str) else []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = [row for row in rows if row["metric"] == metric]
        measured = {row["model"]: _figure(row) for row in of_metric}
        parts.append(intervals(measured, f"{metric}, with 95 % intervals", _digits(measured)))
        changes = {
            f"{row['model']} against {row['against']}: {row['change']['kind']}": _figure(row["change"])
            for row in of_metric
            if "change" in row
        }
        if changes:
            unit = next(row["change"]["unit"] for row in of_metric if "change" in row)
            parts.append(intervals(changes, f"change of {metric} in {unit}, with 95 % intervals; 0 is no change"))
    parts.append(table(_HEADER, [_cells(row) for row in rows], "", words=[1, 6, 7, 8]))
    return parts


def drawable(*numbers: object) -> Interval | None:
    """Return the value, the lower and the upper bound as an interval; None unless they are numbers that can be drawn."""
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in numbers):
        return None
    if any(_LARGEST < abs(one) < math.inf for one in numbers):  # type: ignore[arg-type]
        return None
    value, low, high = map(float, numbers)  # type: ignore[arg-type]
    return Interval(value, low, high)


def _is_row(row: object) -> bool:
    if not isinstance(row, Mapping) or not _has_texts(row, "metric", "model") or not _has_figure(row):
        return False
    if "change" not in row:
        return True
    change = row["change"]
    return (
        isinstance(change, Mapping)
        and _has_texts(row, "against")
        and _has_texts(change, "kind", "unit", "verdict")
        and _has_figure(change)
    )


def _has_texts(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


def _has_figure(row: Mapping[str, Any]) -> bool:
    return drawable(row.get("value"), row.get("low"), row.get("high")) is not None


def _figure(row: Mapping[str, Any]) -> Interval:
    return Interval(float(row["value"]), float(row["low"]), float(row["high"]))


def _digits(figures: Mapping[str, Interval]) -> int:
    return 1 if max(abs(one.value) for one in figures.values()) >= 20 else 3


def _cells(row: Mapping[str, Any]) -> list[object]:
    found: list[object] = [row["model"], row["metric"], row["value"], _bounds(row, "")]
    if "change" not in row:
        return [*found, "", "", "", "", ""]
    change = row["change"]
    text = f"{change['value']:+.2f} {change['unit']}"
    return [*found, text, _bounds(change, "+"), row["against"], change["kind"], change["verdict"]]


def _bounds(row: Mapping[str, Any], sign: str) -> str:
    return "–" if math.isnan(row["low"]) else f"{row['low']:{sign}.2f} to {row['high']:{sign}.2f}"
