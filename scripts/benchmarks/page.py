"""Write results as sections of one page, as text for a terminal and as Markdown.

A section has a title, sentences, a table and more sentences.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.workers import Found


@dataclasses.dataclass(frozen=True)
class Section:
    """One result.

    Attributes:
        before: sentences before the table.
        rows: rows of the table, each with one cell per column; the first cell names the row.
        after: sentences after the table.
    """

    title: str
    before: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()


def text(section: Section) -> str:
    """Return the section as text for a terminal, with aligned columns."""
    table = [section.columns, *section.rows] if section.rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"# {section.title}", *section.before, ""]
    for row in table:
        first, *others = (cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in
                          enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join([*lines, *section.after, ""])


def markdown(sections: Sequence[Section], command: str, title: str = "Results") -> str:
    """Return the page of all sections in Markdown; `command` is the command line that made it."""
    method = "The docstring of the program describes the method. All figures are from one run on one machine."
    lines = [f"# {title}", "", f"Made by `{command}`. {method}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *(line for sentence in section.before for line in (sentence, ""))]
        if section.rows:
            lines += [*table(section.columns, section.rows), ""]
        lines += [line for sentence in section.after for line in (sentence, "")]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [_row(columns), f"|{' --- |' * len(columns)}", *map(_row, rows)]


def write(path: Path, sections: Sequence[Section], command: str, title: str = "Results") -> None:
    """Write the page of all sections."""
    path.write_text(markdown(sections, command, title), encoding="utf-8")


def command_line(script: str) -> str:
    """Return the command line of this process without the folders of this machine.

    Args:
        script: path of the program below scripts/.
    """
    words, skipping = [], False
    for word in sys.argv[1:]:
        skipping = word.startswith("--peer-python") or (skipping and not word.startswith("--"))
        if not skipping:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            words.append(f"{flag}{equals}{Path(value).name if value.startswith('/') else value}")
    return shlex.join(["python", f"scripts/{script}", *words])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def versions_sentence(found: Found) -> str:
    """Return a sentence with the versions of the packages of each program."""
    sides = (f"{side}: " + ", ".join(f"{k} {v}" for k, v in versions.items()) for side, versions in found.versions.items())
    return "; ".join(sides) + "." if found.runs else "Nothing ran."


def machine_sentence(found: Found, device: dict) -> str:
    """Return a sentence about the machine and its load."""
    before = [result["load_average_before"] for results in found.runs.values() for result in results]
    accelerators = sorted({name for results in found.runs.values() for one in results if (name := one.get("device"))})
    where = f"Ran on {', '.join(accelerators)}; host " if accelerators else ""
    load = f"; load average before a run {min(before):.1f} to {max(before):.1f}" if before else ""
    return (
        f"{where}CPU: {device['cpu']}, {device['cores']} cores{load} (a run alone causes a load of about {device['cores']})."
    )


def skipped_sentences(skipped: dict[str, str]) -> tuple[str, ...]:
    """Return a sentence for each run that was left out."""
    return tuple(f"{name} did not run: {reason}" for name, reason in skipped.items())
