"""MMLU's questions (Hendrycks et al. 2021), from files or the hub, as the prompts of the authors' evaluation.

    The following are multiple choice questions (with answers) about  high school physics.
                                                                                  ← an empty line
    Which of these is a scalar?                                                   ← solved examples of the subject, in
    A. force                                                                        the five-shot form five, from the
    B. mass                                                                         split `dev`
    C. velocity
    D. momentum
    Answer: B

    What is the unit of work?                                                     ← the question
    …
    Answer:

(There are two spaces before the subject, as in the authors' program and all prompts made with it.) Rows have two forms:

    subject, input, output                    a complete prompt with its examples, and the letter: the QLoRA authors' files
    subject, question, choices, answer        cais/mmlu on the hub; answer is 0 to 3 or a letter. In tables the choices may
                                              be four columns A, B, C and D.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.records import load_hub_records, load_records
from qlora_jax.errors import DataError

LETTERS = ("A", "B", "C", "D")
HUB = "cais/mmlu"
_HUB_OPTIONS = {"name": "all"}  # the configuration with every subject
_OPENING = "The following are multiple choice questions (with answers) about"
_AFTER_AN_EXAMPLE = re.compile(r"(?<=\nAnswer: [ABCD])\n\n")
_COLUMNS = "the columns subject, input, output, or subject, question, choices (or A, B, C, D), answer"


@dataclass(frozen=True)
class Question:
    """A question; its prompt is the concatenation of the parts, separated by empty lines.

    Attributes:
        header: text before the examples; empty if there is none.
        examples: solved questions.
        body: the question itself and its choices, up to and including "Answer:".
        answer: the index of the correct choice, 0 to 3.
    """

    subject: str
    header: str
    examples: tuple[str, ...]
    body: str
    answer: int

    def prompt(self, shots: int | None = None) -> str:
        """Return the prompt with the first `shots` examples; None: all examples."""
        parts = [*([self.header] if self.header else []), *self.examples[:shots], self.body]
        return "\n\n".join(parts)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a source, or a random sample of them.

    Attributes:
        source: path or hub id.
        questions: the questions that were read.
        total: number of questions of the source.
        seed: seed of the sample, if there are fewer questions.
    """

    source: str
    questions: tuple[Question, ...]
    total: int
    seed: int

    def __str__(self) -> str:
        shots = sorted({len(question.examples) for question in self.questions})
        subjects = len({question.subject for question in self.questions})
        count = f"{len(self.questions):,} of {self.total:,} questions"
        sample = f" (a sample, seed {self.seed})" if len(self.questions) < self.total else ""
        return f"{self.source}: {count}{sample}, {subjects} subjects, {' or '.join(map(str, shots))}-shot"


def read_questions(
    source: str,
    *,
    split: str | None = None,
    shots: int | None = None,
    examples: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> QuestionSet:
    """Read questions from files or from the hub.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet), a folder of such files, or a hub id, such as cais/mmlu.
        split: split of a hub data set; None: "validation", as in the QLoRA authors' program.
        shots: number of solved examples before each question; None: 5. Rows that are complete prompts contain their
            examples; for them only None, and 0 to remove the examples, are allowed.
        examples: source of the examples, in the same forms; None: the split "dev" of a hub data set.
        limit: the most questions, chosen at random and in their original order. (The first ones would belong to a few
            subjects, because files of MMLU are sorted.) None: all questions.
        seed: seed of the random choice.

    Raises:
        DataError: the columns have neither form, rows are invalid, or a subject has too few examples; the message contains
            the file or the row.
        OSError: the source does not exist or cannot be read.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit: expected at least 1, found {limit}")
    if shots is not None and shots < 0:
        raise DataError(f"shots: expected at least 0, found {shots}")
    local = Path(os.path.expanduser(source)).exists()
    rows = _load(source, split or (None if local else "validation"))
    _check_columns(rows.column_names, source)
    total = len(rows)
    chosen = range(total)
    if limit is not None and limit < total:
        chosen = sorted(np.random.default_rng(seed).choice(total, limit, replace=False).tolist())
    whole = {"subject", "input", "output"} <= set(rows.column_names)
    questions = [
        _question(row, f"{source}, row {index} (counted from 0)")
        for index, row in zip(chosen, rows.select(chosen), strict=True)
    ]
    if whole:
        if shots not in (None, 0) or examples is not None:
            raise DataError(f"{source}: expected no shots and no examples for whole prompts, which have theirs; found some")
        if shots == 0:
            questions = [replace(question, examples=()) for question in questions]
    elif shots != 0:
        if examples is None and local:
            raise DataError(
                f"{source}: expected a file of examples for {5 if shots is None else shots}-shot prompts, found none; "
                "with 0 shots it needs none"
            )
        place = examples or source
        solved_rows = _load(place, None if examples else "dev")
        _check_columns(solved_rows.column_names, place)
        solved = _examples(solved_rows, place)
        questions = _with_examples(questions, solved, 5 if shots is None else shots, place)
    return QuestionSet(source, tuple(questions), total, seed)


def _load(source: str, split: str | None) -> Any:
    if source == HUB and not Path(source).exists():
        return load_hub_records(source, split or "dev", _HUB_OPTIONS)
    return load_records(source, split)


def _check_columns(names: Iterable[str], place: str) -> None:
    found = set(names)
    table = {"subject", "question", "answer"} <= found and ("choices" in found or found.issuperset(LETTERS))
    if not table and not {"subject", "input", "output"} <= found:
        raise DataError(f"{place}: expected {_COLUMNS}; found {', '.join(names)}")


def _question(row: Mapping[str, Any], place: str) -> Question:
    subject = row.get("subject")
    if not isinstance(subject, str) or not subject:
        raise DataError(f"{place}: expected a subject, found {subject!r}")
    if isinstance(prompt := row.get("input"), str) and "output" in row:
        header, examples, body = _parts(prompt)
        answer = _letter(row["output"], f"{place}, output")
        return Question(subject, header, examples, body, answer)
    question = row.get("question")
    choices = row.get("choices") if "choices" in row else [row.get(letter) for letter in LETTERS]
    if not isinstance(question, str):
        raise DataError(f"{place}: expected a question that is a text, found {question!r:.80}")
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(text, str) for text in choices):
        raise DataError(f"{place}: expected four choices that are texts, found {choices!r:.80}")
    lines = [question, *[f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True)], "Answer:"]
    header = f"{_OPENING}  {subject.replace('_', ' ')}."
    return Question(subject, header, (), "\n".join(lines), _letter(row["answer"], f"{place}, answer"))


def _parts(prompt: str) -> tuple[str, tuple[str, ...], str]:
    """Return (header, examples, question) of a complete prompt; a prompt of another form is all question."""
    prompt, header = prompt.rstrip(), ""
    if prompt.startswith(_OPENING) and "\n\n" in prompt:
        header, prompt = prompt.split("\n\n", 1)
    *examples, body = _AFTER_AN_EXAMPLE.split(prompt)
    return header, tuple(examples), body


def _letter(value: Any, place: str) -> int:
    """Return the index of an answer, which is a letter or, as on the hub, a number from 0; in CSV files it is text."""
    text = str(value).strip()
    if text in LETTERS:
        return LETTERS.index(text)
    if not isinstance(value, bool) and text in ("0", "1", "2", "3"):
        return int(text)
    raise DataError(f"{place}: expected A, B, C, D or 0 to 3, found {value!r}")


def _examples(rows: Iterable[Mapping[str, Any]], place: str) -> dict[str, list[str]]:
    solved: dict[str, list[str]] = {}
    for index, row in enumerate(rows):
        question = _question(row, f"{place}, row {index} (counted from 0)")
        solved.setdefault(question.subject, []).append(f"{question.body} {LETTERS[question.answer]}")
    return solved


def _with_examples(questions: list[Question], solved: dict[str, list[str]], shots: int, place: str) -> list[Question]:
    few = {q.subject: len(solved.get(q.subject, ())) for q in questions if len(solved.get(q.subject, ())) < shots}
    if few:
        subject, count = next(iter(few.items()))
        raise DataError(
            f"{place}: expected {shots} examples of each subject, found {count} of {subject}"
            + (f" and too few of {len(few) - 1} other subjects" if len(few) > 1 else "")
        )
    return [replace(question, examples=tuple(solved[question.subject][:shots])) for question in questions]
