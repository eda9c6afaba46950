"""The file of judgements while it is being made: each judgement is a line that is appended and on the disk before the next.

    {"question_id": 1, "model_a": "x", "model_b": "y", "verdict": 1, "judge": "z", "reply": "…", "tokens": [812, 64],
     "request": "9f0c…"}

A process that is killed leaves whole lines and at most the start of one, which the next run removes. "request" is a hash of
what was asked, the answers and the judge included: a run asks only for comparisons whose request is not there, and a line
with the names of a comparison and another request is an error rather than a judgement of other answers. A verdict or a
score of -1 has a column "failure". It is final if no reply could be read. If the endpoint failed, it is asked again: such
lines are written at the end of a run, so that the next one removes them by cutting the end of the file.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate.judge.answers import Comparison
from qlora_jax.evaluate.judgements import Kind, json_rows, question_name, read_judgements

__all__ = ["FAILED", "UNREAD", "Journal", "Key", "key_of", "no_judgement", "open_journal", "request_hash"]

Key = tuple[str, str, str]  # question, first model, second model
UNREAD, FAILED = "unread", "endpoint"  # the kinds of failures
_START = b'{"question_id": '


def key_of(comparison: Comparison) -> Key:
    """Return the names by which a comparison is found."""
    return (str(comparison.question_id), *comparison.models)


def request_hash(values: Any) -> str:
    """Return a hash of what is asked: values that JSON can represent."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def no_judgement(kind: Kind) -> dict[str, Any]:
    """Return the columns of a row in which the judge gave no judgement."""
    return {"verdict": -1} if kind == "verdicts" else {"score_a": -1, "score_b": -1}


class Journal:
    """A file of judgements that is open and locked; see `open_journal`.

    Attributes:
        rows: the rows of the file, by the names of their comparison.
    """

    def __init__(self, path: Path, file: BinaryIO, rows: dict[Key, dict[str, Any]]) -> None:
        self.path, self.rows = path, rows
        self._file, self._lock = file, threading.Lock()

    def add(self, comparison: Comparison, columns: Mapping[str, Any]) -> None:
        """Append the row of a comparison, and return when it is on the disk."""
        row = {
            "question_id": comparison.question_id,
            "model_a": comparison.models[0],
            "model_b": comparison.models[1],
            **columns,
        }
        with self._lock:
            self.rows[key_of(comparison)] = row
            self._file.write((json.dumps(row) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def tokens(self) -> tuple[int, int]:
        """Return the tokens of prompts and of replies that all judgements of the file took."""
        read = written = 0
        for row in self.rows.values():
            match row.get("tokens"):
                case [int(one), int(other)]:
                    read, written = read + one, written + other
        return read, written

    def has(self, comparison: Comparison, request: str) -> bool:
        """Return whether the file has the judgement of a comparison.

        Raises:
            DataError: it has a row with these names that is the reply to another request.
        """
        row = self.rows.get(key_of(comparison))
        if row is None:
            return False
        if row.get("request") != request:
            first, second = comparison.models
            raise DataError(
                f"{self.path}: expected judgements of these answers by this judge, found one of question "
                f"{comparison.question_id}, {first} before {second}, by "
                f"{row.get('judge', 'a judge without a name')} that was "
                "asked otherwise (other answers, another judge, wording or limit of length); choose another "
                "file with --output"
            )
        return True


@contextmanager
def open_journal(path: Path, kind: Kind) -> Iterator[Journal]:
    """Open a file of judgements, which is made if there is none, and remove what the next run asks again.

    Raises:
        DataError: the file is none of judgements of this kind, or has a malformed line before its end.
        OptionError: another process writes it.
        OSError: it cannot be read or written.
    """
    if path.is_dir():
        raise OptionError(f"output: expected a file, found the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"{path}: expected a file that no other process writes, found one that another judge writes"
            ) from None
        _remove_torn_line(file)
        rows = _rows(path, kind)
        while rows and next(reversed(rows.values())).get("failure") == FAILED:
            rows.popitem()
            _remove_last_line(file)
        file.seek(0, os.SEEK_END)
        yield Journal(path, file, rows)


def _remove_torn_line(file: BinaryIO) -> None:
    """Cut the file after its last line end: a line that is not ended was being written when the process was killed."""
    size = file.seek(0, os.SEEK_END)
    end = _line_start(file, size)
    file.seek(0)
    # Nothing is cut from a file that is none of judgements; reading it then tells what is wrong with it.
    if end < size and _is_judgement(file.readline()):
        file.truncate(end)


def _is_judgement(line: bytes) -> bool:
    """Return whether a line is one of a file of judgements, or the start of one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line))
    return isinstance(row, dict) and "model_a" in row


def _remove_last_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.truncate(_line_start(file, size - 1))


def _line_start(file: BinaryIO, end: int) -> int:
    """Return the place after the last line end among the first `end` bytes."""
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _rows(path: Path, kind: Kind) -> dict[Key, dict[str, Any]]:
    if not path.stat().st_size:
        return {}
    read_judgements(path, kind)  # raises an error for a malformed file
    rows: dict[Key, dict[str, Any]] = {}
    for number, row in json_rows(path):
        assert isinstance(row, dict)
        key = (str(question_name(row["question_id"])), row["model_a"], row["model_b"])
        if key in rows:
            raise DataError(
                f"{path}, line {number}: expected one judgement of question {key[0]}, {key[1]} before {key[2]}, found two; "
                "choose another file with --output"
            )
        rows[key] = row
    return rows
