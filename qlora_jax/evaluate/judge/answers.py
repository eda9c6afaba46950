"""The answers that a judge compares, from JSONL files with one answer a line:

    {"question_id": 1, "model": "base", "prompt": "How can I …?", "answer": "Here are …"}

A file may contain the answers of several models, and a model's answers may be in several files. The prompt (or "question")
of a question is the same for all models. Further columns are ignored.

A comparison is one question, and the answers of two models in one order. Every pair is compared in both orders, because
judges favour a position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from qlora_jax.data.file_input import kind_of, shortened
from qlora_jax.errors import DataError, list_names
from qlora_jax.evaluate.judgements import check_known, json_rows, question_name

__all__ = ["Answers", "Comparison", "comparisons", "read_answers"]

_PROMPTS = ("prompt", "question")


@dataclass(frozen=True)
class Answers:
    """The answers of several models.

    Attributes:
        source: the files.
        ids: the question_id of each question, as it is in the file, by the name of the question.
        prompts: the prompt of each question.
        by_model: the answers of each model, by the name of the question.
    """

    source: str
    ids: dict[str, int | str]
    prompts: dict[str, str]
    by_model: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Comparison:
    """One question and two answers, in the order in which the judge sees them."""

    question_id: int | str
    prompt: str
    models: tuple[str, str]
    answers: tuple[str, str]


def read_answers(paths: Sequence[Path]) -> Answers:
    """Read files of answers.

    Raises:
        DataError: no file, an empty file, a malformed line (the message names the first one), two answers of one model to
            one question, or a question with two prompts.
        OSError: a file cannot be read.
    """
    ids: dict[str, int | str] = {}
    prompts: dict[str, tuple[str, str]] = {}
    answers: dict[str, dict[str, tuple[str, str]]] = {}
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: expected a file of answers, found a folder")
        problems, rows = [], 0
        for number, row in json_rows(path):
            place = f"{path}, line {number}"
            if isinstance(row, str):
                problems.append(row)
                continue
            found = _read_row(row)
            if isinstance(found, str):
                problems.append(f"{place}: {found}")
                continue
            rows += 1
            question, model, prompt, answer = found
            before, where = prompts.setdefault(question, (prompt, place))
            if before != prompt:
                problems.append(
                    f"{place}: question {question}: expected the prompt of {where}, {shortened(before)!r}, "
                    f"found {shortened(prompt)!r}"
                )
            where = answers.setdefault(model, {}).setdefault(question, (answer, place))[1]
            if where != place:
                problems.append(
                    f"{place}: expected one answer of {model} to question {question}, found another in {where}; models are "
                    'compared by the column "model", which must differ'
                )
            ids.setdefault(question, int(question) if isinstance(row["question_id"], float) else row["question_id"])
        if problems:
            more = f" (the first of {len(problems):,} malformed lines)" if len(problems) > 1 else ""
            raise DataError(problems[0] + more)
        if not rows:
            raise DataError(f"{path}: expected answers, one JSON object a line, found an empty file")
    if not answers:
        raise DataError("expected files of answers, found none")
    return Answers(
        source=", ".join(map(str, paths)),
        ids=ids,
        prompts={question: prompt for question, (prompt, _) in prompts.items()},
        by_model={model: {q: answer for q, (answer, _) in rows.items()} for model, rows in answers.items()},
    )


def comparisons(
    answers: Answers, models: Sequence[str] = (), reference: str | None = None
) -> tuple[list[Comparison], list[str]]:
    """Return all comparisons in both orders, question by question, and notes on the missing answers.

    Args:
        answers: the answers.
        models: the models to compare; all if empty.
        reference: a model that the others are compared with; if None, all pairs are compared.

    Raises:
        OptionError: a name is not one of the models.
        DataError: there is only one model, or no two models have answered a common question.
    """
    known = list(answers.by_model)
    check_known([*models, *([reference] if reference else [])], known, answers.source, "models")
    chosen = [model for model in known if not models or model in models or model == reference]
    if len(chosen) < 2:
        raise DataError(
            f"{answers.source}: expected answers of at least two models, found those of {list_names(chosen)} only; a model "
            "is not judged against itself"
        )
    pairs = [pair for pair in combinations(chosen, 2) if reference is None or reference in pair]
    found = [
        comparison for question in answers.ids for pair in pairs for comparison in _both_orders(answers, question, pair)
    ]
    if not found:
        raise DataError(
            f"{answers.source}: expected common questions, found no question that two of {list_names(chosen)} have answered"
        )
    notes = []
    asked = {question for model in chosen for question in answers.by_model[model]}
    for model in chosen:
        if missing := [question for question in answers.ids if question in asked - answers.by_model[model].keys()]:
            notes.append(
                f"{model}: answers missing: {len(missing):,} of {len(asked):,} (questions {list_names(missing)}); they are "
                "not compared"
            )
        if empty := sum(not text.strip() for text in answers.by_model[model].values()):
            notes.append(f"{model}: empty answers, which are judged as such: {empty:,}")
    return found, notes


def _both_orders(answers: Answers, question: str, pair: tuple[str, str]) -> Iterator[Comparison]:
    if all(question in answers.by_model[model] for model in pair):
        for first, second in (pair, pair[::-1]):
            yield Comparison(
                answers.ids[question],
                answers.prompts[question],
                (first, second),
                (answers.by_model[first][question], answers.by_model[second][question]),
            )


def _read_row(row: dict[str, Any]) -> tuple[str, str, str, str] | str:
    """Return (question, model, prompt, answer), or what is wrong with the row."""
    prompt = next((name for name in _PROMPTS if name in row), "prompt")
    for name in ("question_id", "model", prompt, "answer"):
        if name not in row:
            return f"{name}: expected a value, found none; the columns are {list_names(list(row))}"
    question = question_name(row["question_id"])
    if question is None:
        return f"question_id: expected a whole number or a text, found {kind_of(row['question_id'])}"
    for name in ("model", prompt, "answer"):
        if not isinstance(row[name], str):
            return f"{name}: expected a text, found {kind_of(row[name])}"
    for name in ("model", prompt):
        if not row[name].strip():
            return f"{name}: expected a text, found an empty one"
    return question, row["model"], row[prompt], row["answer"]
