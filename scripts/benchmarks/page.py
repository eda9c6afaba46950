"""Results as sections of one page: a title, sentences, a table, more sentences; as text for a terminal and as Markdown."""

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
        before, after: sentences around the table.
        rows: of the table, each with a cell for each of `columns`; the first says what the row is.
    """

    title: str
    before: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()


def text(section: Section) -> str:
    """The section for a terminal, in columns of even width."""
    table = [section.columns, *section.rows] if section.rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"# {section.title}", *section.before, ""]
    for row in table:
        first, *others = (cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in
                          enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join([*lines, *section.after, ""])


def markdown(sections: Sequence[Section], command: str, title: str = "Results") -> str:
    """The page of all sections; `command` is what made it."""
    lines = [f"# {title}", "", f"Made by `{command}`, whose head says how; the figures of one run on one machine.", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *(line for sentence in section.before for line in (sentence, ""))]
        if section.rows:
            lines += [_row(section.columns), f"|{' --- |' * len(section.columns)}", *map(_row, section.rows), ""]
        lines += [line for sentence in section.after for line in (sentence, "")]
    return "\n".join(lines)


def write(path: Path, sections: Sequence[Section], command: str, title: str = "Results") -> None:
    """Writes the page."""
    path.write_text(markdown(sections, command, title), encoding="utf-8")


def said_command(script: str) -> str:
    """The command line, without where things lie on this machine."""
    words, skipping = [], False
    for word in sys.argv[1:]:
        skipping = word.startswith("--peer-python") or (skipping and not word.startswith("--"))
        if not skipping:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            words.append(f"{flag}{equals}{Path(value).name if value.startswith('/') else value}")
    return shlex.join(["python", f"scripts/{script}", *words])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def versions_said(found: Found) -> str:
    """A sentence of the packages of each side."""
    sides = (f"{side}: " + ", ".join(f"{k} {v}" for k, v in versions.items()) for side, versions in found.versions.items())
    return "; ".join(sides) + "." if found.runs else "Nothing ran."


def machine_said(found: Found, device: dict) -> str:
    """A sentence of the machine and how busy it was."""
    before = [result["load_average_before"] for results in found.runs.values() for result in results]
    accelerators = sorted({name for results in found.runs.values() for one in results if (name := one.get("device"))})
    where = f"Ran on {', '.join(accelerators)}; host " if accelerators else ""
    load = f"; load average before a run {min(before):.1f} to {max(before):.1f}" if before else ""
    return f"{where}CPU: {device['cpu']}, {device['cores']} cores{load} (a run alone makes about {device['cores']})."


def skipped_said(skipped: dict[str, str]) -> tuple[str, ...]:
    """A sentence for each that did not run."""
    return tuple(f"{name} did not run: {reason}" for name, reason in skipped.items())
