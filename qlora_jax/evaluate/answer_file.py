"""A file of the answers of one model, which grows by one line an answer and is continued after an interruption.

    {"question_id": 1, "model": "NAME", "prompt": "…", "answer": "…", "settings": {…}, …}

Each line is written at once, so that whatever ends the process costs the answers that are not complete. A last line without
an end is of such an answer and is removed. All lines have the settings that the answers were made with, and the same ones:
a file never mixes answers of two kinds. When all questions are answered, the lines get the order of the questions.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate.prompt_file import Prompt

__all__ = ["AnswerFile"]

_KEYS = ("question_id", "model", "prompt", "answer", "settings")
_START = b'{"question_id": '


class AnswerFile:
    """The answers of one model, in a file.

    Attributes:
        answered: the ids of the questions that have an answer.
    """

    def __init__(self, path: Path, model: str, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        """Open a file that does not exist yet, or continue one. Nothing is written yet.

        Args:
            path: the file.
            model: the name of the model in it.
            prompts: all questions.
            settings: what decides the answers, as JSON can hold it.

        Raises:
            OptionError: the file has answers of another model, of other settings or to other questions, which are named.
            DataError: the file is no file of answers.
            OSError: the file cannot be read or written.
        """
        self._path, self._model, self._settings = path, model, json.loads(json.dumps(settings))
        self._prompts = {prompt.question_id: prompt for prompt in prompts}
        self._lines: dict[int | str, str] = {}
        self._whole = 0  # bytes of whole lines
        if path.is_dir():
            raise OptionError(f"--output {path}: expected a file, found a folder")
        if not path.parent.is_dir():
            raise OptionError(f"--output {path}: expected a file in a folder that exists, found no {path.parent}")
        if path.exists():
            self._read()

    @property
    def answered(self) -> set[int | str]:
        return set(self._lines)

    def add(self, question_id: int | str, answer: str, **more: Any) -> None:
        """Write an answer, with further keys of its line."""
        row = {"question_id": question_id, "model": self._model, "prompt": self._prompts[question_id].text, "answer": answer}
        line = json.dumps(row | more | {"settings": self._settings}, ensure_ascii=False) + "\n"
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(self._whole)
            file.truncate()
            file.write(line.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        self._lines[question_id] = line

    def finish(self) -> None:
        """Give the lines the order of the questions; the file is whole at any moment."""
        temporary = self._path.with_name(f".{self._path.name}.writing")
        lines = [self._lines[question_id] for question_id in self._prompts if question_id in self._lines]
        temporary.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
        temporary.replace(self._path)

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines, in the order of the questions."""
        return [json.loads(self._lines[question_id]) for question_id in self._prompts if question_id in self._lines]

    def _read(self) -> None:
        data = self._path.read_bytes()
        self._whole = data.rfind(b"\n") + 1
        if not self._whole and not _may_be_answer(data):
            raise DataError(f"{self._path}: expected a file of answers, found {data[:60]!r}; choose another --output")
        for number, line in enumerate(data[: self._whole].splitlines(), 1):
            place = f"{self._path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: expected a line of JSON, found {line[:60]!r}") from error
            if not _is_answer(row):
                raise DataError(
                    f"{place}: expected an answer ({', '.join(_KEYS)}), found {line[:60]!r}; choose another --output"
                )
            self._check(row, place)
            self._lines[row["question_id"]] = line.decode("utf-8") + "\n"

    def _check(self, row: dict[str, Any], place: str) -> None:
        found, ours = row["settings"] | {"model": row["model"]}, self._settings | {"model": self._model}
        changed = [name for name in dict.fromkeys([*found, *ours]) if found.get(name) != ours.get(name)]
        if changed:
            there = "; ".join(f"{name} {found.get(name)!r} there, {ours.get(name)!r} here" for name in changed)
            raise OptionError(f"{place}: holds answers with other settings: {there}; choose another --output")
        prompt = self._prompts.get(row["question_id"])
        if prompt is None or prompt.text != row["prompt"]:
            other = "no such question" if prompt is None else "another question"
            raise OptionError(f"{place}: holds an answer to question {row['question_id']!r}, which is {other} here")
        if row["question_id"] in self._lines:
            raise DataError(f"{place}: expected one answer to question {row['question_id']!r}, found two")


def _may_be_answer(line: bytes) -> bool:
    """Return whether a line without an end is an answer, or the start of one."""
    try:
        return _is_answer(json.loads(line))
    except (ValueError, RecursionError):
        return line.startswith(_START) or _START.startswith(line)


def _is_answer(row: Any) -> bool:
    """Return whether a line is an answer with its settings."""
    if not isinstance(row, dict) or any(key not in row for key in _KEYS):
        return False
    return isinstance(row["settings"], dict) and isinstance(row["question_id"], int | str)
