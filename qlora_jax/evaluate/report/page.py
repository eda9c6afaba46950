"""The frame of a report: one HTML file that needs nothing else, neither a network nor a script.

The style has colours for light and dark screens, which follow the reader's setting, and dark text on white for paper.
Tables that are wider than the screen scroll within themselves, and what stands side by side stands one below the other on a
phone. A content security policy forbids the page to load anything at all.

All text comes from files that others may have written: it is escaped, and control characters are removed.
"""

import html
import math
import re
from collections.abc import Sequence

__all__ = ["captioned", "note", "page", "paragraph", "section", "table", "text"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f4f5f7; --ink: #1b1f24; --faint: #59636e; --line: #d1d9e0;
  --one: #0b63b5; --other: #b35900; --neutral: #8b949e; --good: 11, 99, 181; --bad: 179, 89, 0; }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1318; --panel: #1a2027; --ink: #e8edf2; --faint: #9fabb7;
  --line: #3a444e; --one: #6cb2f7; --other: #f0a35e; --neutral: #7d8792; --good: 88, 166, 255; --bad: 240, 150, 70; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.3rem; margin: 2.2rem 0 0.4rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.3rem; } p { margin: 0.4rem 0; max-width: 46rem; }
h1, h2, h3, p, .label { overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: 0.9rem; }
.note { border-left: 4px solid var(--other); padding: 0.2rem 0.8rem; background: var(--panel); }
nav ul { padding-left: 1.2rem; margin: 0.4rem 0; } a { color: var(--one); }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child, td.words, th.words { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--ground); }
td.words { white-space: normal; max-width: 30rem; min-width: 8rem; overflow-wrap: anywhere; }
table.matrix td, table.matrix th { text-align: center; } table.matrix th:first-child { text-align: left; }
.rows { margin: 0.6rem 0; max-width: 52rem; }
.row { display: grid; grid-template-columns: 14rem 1fr 12.5rem; gap: 0.2rem 0.8rem; align-items: center; }
.row svg { width: 100%; height: 1.7rem; display: block; overflow: visible; }
.row .value { font-variant-numeric: tabular-nums; font-size: 0.9rem; }
.key { display: inline-block; width: 0.8em; height: 0.8em; vertical-align: middle; margin: 0 0.3em 0.1em 0.9em; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0.8rem; margin: 0.6rem 0; }
.answer { background: var(--panel); border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.5rem 0.8rem;
  min-width: 0; }
.answer h4 { margin: 0 0 0.3rem; font-size: 0.95rem; overflow-wrap: anywhere; }
.written { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.9rem; unicode-bidi: isolate; }
@media (max-width: 40rem) { body { padding: 0.7rem; } .row { grid-template-columns: 1fr auto; }
  .row svg { grid-column: 1 / -1; grid-row: 2; } .row.axis .label, .row.axis .value { display: none; } }
@media print { :root { color-scheme: light; --ground: #ffffff; --panel: #ffffff; --ink: #000000; --faint: #444444;
  --line: #aaaaaa; --one: #0b4f94; --other: #8f4700; --neutral: #9a9a9a; --good: 11, 99, 181; --bad: 179, 89, 0; }
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; } table { font-size: 8.5pt; }
  th, td { padding: 0.15rem 0.4rem; white-space: normal; position: static; }
  td.words { min-width: 0; } nav { display: none; } thead { display: table-header-group; }
  tr, .row, .rows, .note { break-inside: avoid; } h2, h3, h4, h3 + .written, .faint { break-after: avoid; }
  td.words { overflow-wrap: break-word; }
  .answers { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def text(value: object) -> str:
    """Return a value as text of an HTML page: escaped, and without control characters and lone surrogates."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def paragraph(words: str) -> str:
    """Return a paragraph."""
    return f"<p>{text(words)}</p>"


def note(words: str) -> str:
    """Return a paragraph that stands out."""
    return f'<p class="note">{text(words)}</p>'


def section(title: str, parts: Sequence[str]) -> tuple[str, str]:
    """Return (title, body) of a section."""
    return title, "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", words: Sequence[int] = ()) -> str:
    """Return a table whose first column is text and whose others are numbers, but for those that `words` counts, from 0."""
    kinds = ['class="words"' if column in words else "" for column in range(len(header))]
    head = "".join(f'<th scope="col" {kind}>{text(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {kind}>{text(_cell(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in rows
    )
    above, label = captioned(caption)
    whole = f"<table{label}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'{above}<div class="scroll" tabindex="0">{whole}</div>'


def captioned(caption: str) -> tuple[str, str]:
    """Return (the paragraph above a table, the table's attribute with the same words); a caption would scroll with it."""
    return (f'<p class="faint">{text(caption)}</p>', f' aria-label="{text(caption)}"') if caption else ("", "")


def page(title: str, introduction: str, sections: Sequence[tuple[str, str]]) -> bytes:
    """Return the whole file, in UTF-8."""
    places = [f"section-{number}" for number in range(1, len(sections) + 1)]
    named = [(place, name) for place, (name, _) in zip(places, sections, strict=True)]
    links = "".join(f'<li><a href="#{place}">{text(name)}</a></li>' for place, name in named)
    bodies = "\n".join(
        f'<section id="{place}">\n<h2>{text(name)}</h2>\n{body}\n</section>'
        for place, (name, body) in zip(places, sections, strict=True)
    )
    whole = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
<p class="faint">{text(introduction)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{bodies}
</main>
</body>
</html>
"""
    return whole.encode("utf-8")


def _cell(value: object) -> str:
    """Return a value of a table as text: numbers with four digits that count, a dash for what is undefined."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float() if not math.isfinite(value):
            return "–"
        case float():
            digits = 4 if value == 0 else max(0, min(6, 3 - math.floor(math.log10(abs(value)))))
            return f"{value:,.{min(digits, 4) if abs(value) >= 0.001 else digits}f}"
        case list() | tuple():
            return ", ".join(map(_cell, value))
        case _:
            return str(value)
