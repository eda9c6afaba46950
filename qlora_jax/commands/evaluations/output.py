"""What the sub-commands share: tables in Markdown, JSON without NaN, and a picture of figures with their intervals."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError
from qlora_jax.evaluate import Interval, Judgements, notes_on_pairs

__all__ = ["bounds", "check_least", "check_plot", "draw_intervals", "number", "print_json", "print_notes", "print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, with columns of equal width; the first column is text and the others are numbers."""
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (header, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |")


def number(value: float, digits: int = 1) -> str:
    """Return a number as text, and a dash if it is undefined."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def bounds(interval: Interval, digits: int = 1) -> str:
    """Return the bounds of an interval as text, and a dash if they are undefined."""
    if math.isnan(interval.low):
        return "–"
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def print_json(values: Mapping[str, Any]) -> None:
    """Print values as one line of JSON, with null for NaN."""
    print(json.dumps(_without_nan(values), allow_nan=False))


def _without_nan(value: Any) -> Any:
    match value:
        case dict():
            return {name: _without_nan(item) for name, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def print_notes(judgements: Judgements) -> None:
    """Print on stderr what a file contains, and what should be said of it."""
    left_out = f", left out without a judgement: {judgements.left_out:,}" if judgements.left_out else ""
    models, questions = len(judgements.models), len(judgements.questions)
    print(
        f"{judgements.source}: {judgements.kind}: {len(judgements):,}{left_out}; "
        f"models: {models:,}, questions: {questions:,}",
        *notes_on_pairs(judgements),
        sep="\n",
        file=sys.stderr,
    )


def check_least(options: object, **least: int) -> None:
    """Raise OptionError if numbers of a dataclass of options are below the least that is given for each; None is not."""
    values = {name: getattr(options, name) for name in least}
    low = [name for name, value in values.items() if value is not None and value < least[name]]
    if low:
        raise OptionError("; ".join(f"{name}: expected at least {least[name]}, found {values[name]}" for name in low))


def check_plot(path: Path | None) -> None:
    """Raise OptionError if a picture of this name could not be written."""
    if path is not None:
        from qlora_jax.plan import check_drawing

        check_drawing(path)


def draw_intervals(intervals: Mapping[str, Interval], path: Path, label: str) -> None:
    """Draw one line for each name, the first at the top: the bounds, and a point at the value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.32 * len(intervals)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, interval in enumerate(intervals.values()):
        if not math.isnan(interval.low):
            axes.hlines(place, interval.low, interval.high, color="C0", linewidth=2)
        axes.plot(interval.value, place, "o", color="C0")
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.4)
    figure.savefig(path, dpi=150)
