"""Pictures of figures, as rows of HTML with one small SVG each.

The shapes have positions in percent and sizes in pixels. A picture therefore fills its width on any screen, while its lines
stay thin and its text, which is not part of the SVG, stays readable.
"""

import math
from collections.abc import Mapping, Sequence

from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.report.page import captioned, text

__all__ = ["intervals", "matrix", "shares"]

_TICKS = (3, 6)  # the least and the most of them


def intervals(rows: Mapping[str, Interval], label: str, digits: int = 1) -> str:
    """Return a row for each figure: its name, a line between its bounds with a point at the value, and the numbers.

    Args:
        rows: the figures, the first at the top.
        label: what they are.
        digits: of the numbers.
    """
    finite = [edge for one in rows.values() for edge in (one.value, one.low, one.high) if math.isfinite(edge)]
    ticks = _ticks(min(finite), max(finite)) if finite else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    grid = "".join(f'<line x1="{at(t)}" x2="{at(t)}" y1="0" y2="100%" stroke="var(--line)"/>' for t in ticks)
    found = []
    for name, one in rows.items():
        shapes, words = grid, _number(one.value, digits)
        if math.isfinite(one.low) and math.isfinite(one.high):
            words += f" ({_number(one.low, digits)} to {_number(one.high, digits)})"
            shapes += (
                f'<line x1="{at(one.low)}" x2="{at(one.high)}" y1="50%" y2="50%" stroke="var(--one)" stroke-width="4"/>'
            )
        if math.isfinite(one.value):
            shapes += f'<circle cx="{at(one.value)}" cy="50%" r="5" fill="var(--one)" stroke="var(--ground)"/>'
        found.append(_row(name, shapes, words))
    places = [("start" if t == low else "end" if t == high else "middle", t) for t in ticks]
    axis = "".join(
        f'<text x="{at(t)}" y="60%" text-anchor="{place}" font-size="12" fill="var(--faint)">{_tick(t, ticks)}</text>'
        for place, t in places
    )
    found.append(f'<div class="row axis"><span class="label"></span><svg aria-hidden="true">{axis}</svg><span></span></div>')
    return f'<div class="rows"><p class="faint">{text(label)}</p>{"".join(found)}</div>'


def shares(rows: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Return a bar for each row that is divided into shares, which sum to 1.

    Args:
        rows: the shares of each row.
        names: what the shares are, two or three of them.
    """
    colours = {2: ("--one", "--other"), 3: ("--one", "--neutral", "--other")}[len(names)]
    found = []
    for name, parts in rows.items():
        start, shapes = 0.0, ""
        for part, colour in zip(parts, colours, strict=True):
            shapes += (
                f'<rect x="{100 * start:.2f}%" y="15%" width="{100 * part:.2f}%" height="70%" fill="var({colour})" '
                'stroke="var(--ground)"/>'
            )
            start += part
        shapes += '<line x1="50%" x2="50%" y1="0" y2="100%" stroke="var(--ink)" stroke-dasharray="3 3"/>'
        found.append(_row(name, shapes, " / ".join(f"{100 * part:.0f}" for part in parts) + " %"))
    key = "".join(
        f'<svg class="key" aria-hidden="true"><rect width="100%" height="100%" fill="var({colour})"/></svg>{text(name)}'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<div class="rows"><p class="faint">{key}</p>{"".join(found)}</div>'


def matrix(names: Sequence[str], cells: Sequence[Sequence[float | None]], caption: str) -> str:
    """Return a table of shares from 0 to 1, coloured from orange (0) to blue (1); None stands for no comparison."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    body = ""
    for name, row in zip(names, cells, strict=True):
        body += f'<tr><th scope="row">{text(name)}</th>'
        for share in row:
            if share is None or not math.isfinite(share):
                body += "<td>–</td>"
            else:
                colour, strength = ("--good" if share >= 0.5 else "--bad"), 1.1 * abs(share - 0.5)
                body += f'<td style="background: rgba(var({colour}), {strength:.2f})">{100 * share:.0f} %</td>'
        body += "</tr>\n"
    above, label = captioned(caption)
    return (
        f'{above}<div class="scroll" tabindex="0"><table class="matrix"{label}>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _row(name: str, shapes: str, words: str) -> str:
    label = text(f"{name}: {words}")
    return (
        f'<div class="row"><span class="label">{text(name)}</span><svg role="img" aria-label="{label}">{shapes}</svg>'
        f'<span class="value">{text(words)}</span></div>'
    )


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from at most the lowest to at least the highest value."""
    width = max(high - low, 1e-12 * abs(high))
    width = width if width > 1e-100 else 1.0
    power = 10.0 ** math.floor(math.log10(width))
    for step in (power * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first < _TICKS[1]:
            last = max(last, first + _TICKS[0] - 1)
            return [number * step for number in range(first, last + 1)]
    return [low, high if high > low else low + 1]


def _tick(value: float, ticks: Sequence[float]) -> str:
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.{digits}f}"
