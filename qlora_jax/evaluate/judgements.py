"""Judgements of pairs of answers, from JSONL files of two kinds.

    scores      {"question_id": 1, "model_a": "gpt-3.5", "model_b": "13b-guanaco", "score_a": 9.0, "score_b": 8.5}
    verdicts    {"question_id": 1, "model_a": "gpt-4", "model_b": "13b-guanaco", "verdict": 1}

`model_a` is the model whose answer the judge saw first. A score is a number from 0. A verdict is 1 (the first answer is
better), 2 (the second is better) or 3 (a tie). Both are -1 if the judge gave none. Judges favour one of the two
positions, so each pair is usually judged in both orders (Zheng et al. 2023, arXiv 2306.05685; Dettmers et al. 2023,
arXiv 2305.14314). The column "judge" is optional; further columns are ignored, also those of the other kind.
"""

import difflib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlora_jax.data.file_input import kind_of, not_utf8, shortened
from qlora_jax.errors import DataError, OptionError, list_names

__all__ = ["Judgements", "Kind", "check_known", "json_rows", "notes_on_pairs", "question_name", "read_judgements"]

Kind = Literal["scores", "verdicts"]

_COLUMNS: dict[Kind, tuple[str, ...]] = {"scores": ("score_a", "score_b"), "verdicts": ("verdict",)}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip
_MOST = 1e9  # no scale of scores goes further; sums of scores stay exact
_POINTS = {1: (1.0, 0.0), 2: (0.0, 1.0), 3: (0.5, 0.5), -1: (math.nan, math.nan)}


@dataclass(frozen=True)
class Judgements:
    """The judgements of one or more judges.

    Attributes:
        source: the file.
        kind: whether `values` are scores or points of a comparison.
        models, questions, judges: the names, sorted; a judge without a name is "".
        question, first, second, judge: int64 `[n]`: indices of the question, of the models and of the judge. `first` is the
            model whose answer the judge saw first.
        values: float64 `[n, 2]`: the scores of the first and the second model, or their points (1 and 0; ½ each for a tie).
            NaN where the judge gave none.
    """

    source: str
    kind: Kind
    models: tuple[str, ...]
    questions: tuple[str, ...]
    judges: tuple[str, ...]
    question: np.ndarray
    first: np.ndarray
    second: np.ndarray
    judge: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.question)

    @property
    def left_out(self) -> int:
        """The number of rows without a judgement."""
        return int(np.isnan(self.values).any(1).sum())

    def rows(self, chosen: np.ndarray) -> "Judgements":
        """Return the judgements of chosen rows, with the same names and indices."""
        names = ("question", "first", "second", "judge", "values")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def valid(self) -> "Judgements":
        """Return the judgements without the rows in which the judge gave none."""
        return self.rows(np.flatnonzero(~np.isnan(self.values).any(1)))

    def between(self, models: Collection[str]) -> "Judgements":
        """Return the judgements whose two models are both among these names, with these models only.

        Raises:
            OptionError: a name is not in the file, with the most similar name.
        """
        check_known(models, self.models, self.source, "models")
        names = tuple(sorted(set(models)))
        index = np.array([names.index(name) if name in names else -1 for name in self.models])
        first, second = index[self.first], index[self.second]
        kept = (first >= 0) & (second >= 0)
        return replace(self.rows(kept), models=names, first=first[kept], second=second[kept])

    def points(self) -> np.ndarray:
        """Return the points of the first model `[n]`: 1 for the better answer, ½ for a tie, 0 for the worse; NaN: none."""
        if self.kind == "verdicts":
            return self.values[:, 0]
        return (np.sign(self.values[:, 0] - self.values[:, 1]) + 1) / 2


def check_known(names: Collection[str], known: Sequence[str], source: str, option: str) -> None:
    """Raise OptionError if a name that an option gives is not one of the models of a file."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise OptionError(f"{option}: expected models of {source} ({list_names(known)}), found {name!r}{hint}")


def notes_on_pairs(judgements: Judgements) -> list[str]:
    """Return what should be said of pairs that were not judged on the same questions in both orders, or judged twice."""
    asked: dict[tuple[int, int, int], set[int]] = {}
    repeated = 0
    for judge, first, second, question in zip(
        judgements.judge.tolist(),
        judgements.first.tolist(),
        judgements.second.tolist(),
        judgements.question.tolist(),
        strict=True,
    ):
        questions = asked.setdefault((judge, first, second), set())
        repeated += question in questions
        questions.add(question)
    single = {
        (first, second): len(questions - asked.get((judge, second, first), set()))
        for (judge, first, second), questions in asked.items()
    }
    notes = []
    if missing := sum(single.values()):
        (first, second), count = next((pair, count) for pair, count in single.items() if count)
        pair = f"{judgements.models[first]} before {judgements.models[second]}"
        notes.append(
            f"{judgements.source}: judgements without a counterpart in the other order: {missing:,}, the first of them with "
            f"{pair} (questions: {count:,})"
        )
    if repeated:
        notes.append(
            f"{judgements.source}: judgements that repeat a question, a pair and an order: {repeated:,}; each of them counts"
        )
    return notes


def read_judgements(path: Path, kind: Kind | None = None) -> Judgements:
    """Read a file of judgements.

    Args:
        path: a JSONL file.
        kind: the kind that is expected; None: either, and scores if the columns of both are there.

    Raises:
        DataError: the file is empty, is of another kind, or has a malformed line (the message names the first one), or a
            model is judged against itself.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        raise DataError(f"{path}: expected a file of judgements, found a folder")
    rows: list[tuple[str, str, str, str, tuple[float, float]]] = []
    found: Kind | None = None
    problems: list[str] = []
    for number, row in json_rows(path):
        if isinstance(row, str):
            problems.append(row)
            continue
        if found is None:
            found = _kind_of_row(row, kind, path, number)
            if kind is not None and found != kind:
                reader = "score" if found == "scores" else "elo"
                raise DataError(f"{path}: expected {kind} {_columns(kind)}, found {found}, which the command {reader} reads")
        row = _read_row(row, found)
        if isinstance(row, str):
            problems.append(f"{path}, line {number}: {row}")
        else:
            rows.append(row)
    if problems:
        more = f" (the first of {len(problems):,} malformed lines)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if found is None:
        raise DataError(f"{path}: expected judgements, one JSON object a line, found an empty file")
    return _collected(str(path), found, rows)


def _collected(source: str, kind: Kind, rows: list[tuple[str, str, str, str, tuple[float, float]]]) -> Judgements:
    questions, first, second, judges, values = zip(*rows, strict=True)
    models, names = np.unique([*first, *second], return_inverse=True)
    question_names, question = np.unique(questions, return_inverse=True)
    judge_names, judge = np.unique(judges, return_inverse=True)
    return Judgements(
        source=source,
        kind=kind,
        models=tuple(models.tolist()),
        questions=tuple(question_names.tolist()),
        judges=tuple(judge_names.tolist()),
        question=question,
        first=names[: len(rows)],
        second=names[len(rows) :],
        judge=judge,
        values=np.array(values, np.float64),
    )


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number from 1, object or what is wrong) for each line that is not blank."""
    with path.open("rb") as file:
        if file.peek(4).startswith(_COMPRESSED):
            raise DataError(f"{path}: expected text, one JSON object a line, found a compressed file; decompress it first")
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                yield number, not_utf8(place, error)
                continue
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                yield number, f"{place}: expected one JSON object, found {shortened(text)!r}"
                continue
            yield number, row if isinstance(row, dict) else f"{place}: expected one JSON object, found {kind_of(row)}"


def _columns(kind: Kind) -> str:
    return f"(question_id, model_a, model_b, {', '.join(_COLUMNS[kind])})"


def _kind_of_row(row: dict[str, Any], asked: Kind | None, path: Path, number: int) -> Kind:
    """Return the kind that is asked for if a column of it is there, or else the other one."""
    complete: list[Kind] = [kind for kind, columns in _COLUMNS.items() if all(column in row for column in columns)]
    begun: list[Kind] = [kind for kind, columns in _COLUMNS.items() if any(column in row for column in columns)]
    if asked is not None and asked in begun:
        return asked
    for kind in (*complete, *begun):
        return kind
    expected = " or ".join(f"{kind} {_columns(kind)}" for kind in _COLUMNS)
    raise DataError(f"{path}, line {number}: expected {expected}, found the columns {list_names(list(row)) or 'none'}")


def _read_row(row: dict[str, Any], kind: Kind) -> tuple[str, str, str, str, tuple[float, float]] | str:
    """Return (question, first model, second model, judge, values), or what is wrong with the row."""
    for name in ("question_id", "model_a", "model_b", *_COLUMNS[kind]):
        if name not in row:
            return f"{name}: expected a value, found none; the columns are {list_names(list(row))}"
    question, first, second, judge = (row.get(name) for name in ("question_id", "model_a", "model_b", "judge"))
    question = question_name(question)
    if question is None:
        return f"question_id: expected a whole number or a text, found {kind_of(row['question_id'])}"
    for name in ("model_a", "model_b"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"{name}: expected the name of a model, found {kind_of(row[name])}"
    if judge is not None and not isinstance(judge, str):
        return f"judge: expected a name, found {kind_of(judge)}"
    if first == second:
        return f"expected two models, found {first} judged against itself"
    values = _values(row, kind)
    return values if isinstance(values, str) else (question, str(first), str(second), judge or "", values)


def question_name(value: object) -> str | None:
    """Return the name of a question by its question_id, and None if that is neither a whole number nor a text."""
    if isinstance(value, float) and value.is_integer():  # as pandas writes a column of numbers with gaps
        value = int(value)
    return None if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "" else str(value)


def _values(row: dict[str, Any], kind: Kind) -> tuple[float, float] | str:
    if kind == "verdicts":
        verdict = row["verdict"]
        if isinstance(verdict, bool) or not isinstance(verdict, (int, float)) or verdict not in _POINTS:
            expected = "1 (the first answer is better), 2 (the second), 3 (a tie) or -1 (none)"
            return f"verdict: expected {expected}, found {kind_of(verdict)}"
        return _POINTS[int(verdict)]
    for name in _COLUMNS["scores"]:
        score = row[name]
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not (score == -1 or 0 <= score <= _MOST):
            return f"{name}: expected a number from 0 to {_MOST:.0e}, or -1 if the judge gave none, found {kind_of(score)}"
    if -1 in (row["score_a"], row["score_b"]):
        return math.nan, math.nan
    return float(row["score_a"]), float(row["score_b"])
