"""What a report is made from, told apart by its first row.

judgements    JSONL with model_a, model_b, and scores or verdicts: what `judge` writes and `score` and `elo` read
answers       JSONL with model and answer: what `generate` writes and `judge` reads
results       the last line that a sub-command prints, alone or with the table before it; or a JSON object over several lines
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.data.file_input import kind_of, shortened
from qlora_jax.errors import DataError
from qlora_jax.evaluate.judge.answers import Answers, read_answers
from qlora_jax.evaluate.judgements import Judgements, json_rows, read_judgements

__all__ = ["Sources", "read_sources"]

_MOST_BYTES = 2**26


@dataclass(frozen=True)
class Sources:
    """The files of a report: judgements and results by file, and all answers together."""

    judgements: dict[str, Judgements]
    results: dict[str, dict[str, Any]]
    answers: Answers | None


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read the files of a report.

    Raises:
        DataError: a file is none of these, is malformed, or is there twice.
        OSError: a file cannot be read.
    """
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise DataError(f"expected each file once, found {path} twice")
    judgements: dict[str, Judgements] = {}
    results: dict[str, dict[str, Any]] = {}
    answers: list[Path] = []
    stems = [path.stem for path in paths]
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: expected a file, found a folder")
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        first = next((row for _, row in json_rows(path)), None)
        columns = first if isinstance(first, dict) else {}
        if "model_a" in columns or "model_b" in columns:
            judgements[name] = read_judgements(path)
        elif "answer" in columns and "model" in columns:
            answers.append(path)
        else:
            results[name] = _result(path)
    return Sources(judgements, results, read_answers(answers) if answers else None)


def _result(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file is, or that its last line is."""
    if path.stat().st_size > _MOST_BYTES:
        raise DataError(f"{path}: expected the results of a command, found a file of {path.stat().st_size:,} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8, found other bytes") from None
    if not text:
        raise DataError(f"{path}: expected judgements, answers or results, found an empty file")
    for candidate in (text, text.splitlines()[-1]):
        try:
            values = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict):
            raise DataError(f"{path}: expected a JSON object, found {kind_of(values)}")
        if not values:
            break
        return values
    raise DataError(
        f"{path}: expected judgements or answers (one JSON object a line), or the output of a sub-command, "
        f"whose last line is "
        f"JSON; found {shortened(text.splitlines()[-1])!r}"
    )
