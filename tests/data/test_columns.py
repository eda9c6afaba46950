"""Columns by hand: any names of a file become ours, and a misspelt one is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data import DataError, open_source, stream_source
from qlora_jax.data.schemas import parse
from qlora_jax.data.sources import column_names
from qlora_jax.errors import OptionError

Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def records(path: Path, rows: list[dict[str, Any]], *columns: str) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = column_names(columns)
    opened = open_source(str(path), None, names)
    names.check(opened.columns)
    assert list(opened.records) == list(stream_source(str(path), None, names))
    return list(opened.records)


@pytest.mark.parametrize(
    ("row", "columns", "schema"),
    [
        ({"query": "Q", "reply": "A"}, ("prompt=query", "answer=reply"), "question/answer"),
        ({"query": "Q", "reply": "A"}, ("question=query", "answer=reply"), "question/answer"),
        ({"query": "Q", "reply": "A"}, ("prompt=query", "completion=reply"), "prompt/completion"),
        ({"query": "Q", "reply": "A"}, ("instruction=query", "output=reply"), "alpaca"),
        ({"query": "Q", "reply": "A"}, ("instruction=query", "answer=reply"), "question/answer"),
        ({"prompt": "Q", "response": "A"}, ("completion=response",), "prompt/completion"),
        ({"prompt": "Q", "response": "A"}, ("answer=response",), "question/answer"),
        ({"question": "Q", "answer": "no", "better": "A"}, ("answer=better",), "question/answer"),
        ({"question": "A", "answer": "Q"}, ("answer=question", "question=answer"), "question/answer"),
        ({"dialog": [Q, A]}, ("messages=dialog",), "messages"),
        ({"my text = x": "Q"}, ("text=my text = x",), "text"),
    ],
)
def test_any_names_become_ours(tmp_path: Path, row: dict[str, Any], columns: tuple[str, ...], schema: str) -> None:
    # A second row with all columns, so that none of the names is misspelt.
    everything = row | {column.partition("=")[2]: "x" for column in columns if column.partition("=")[2] not in row}
    record = parse(records(tmp_path / "a.jsonl", [row, everything], *columns)[0])
    assert record.schema == schema
    if schema != "text":
        assert record.messages == (Q, A)


def test_more_columns_and_rows_of_another_form(tmp_path: Path) -> None:
    rows = [
        {"q": "Q", "a": "A", "persona": "Be kind."},
        {"q": "Q", "a": "A"},
        {"messages": [Q, A]},
        {"q": "Q", "b": "A"},
    ]
    found = records(tmp_path / "a.jsonl", rows, "question=q", "answer=a", "system=persona")
    assert [message["content"] for message in parse(found[0]).messages] == ["Be kind.", "Q", "A"]
    assert parse(found[1]).messages == parse(found[2]).messages == (Q, A)
    with pytest.raises(DataError, match=r"expected the column 'a' \(--columns answer=a\), found \['b', 'q'\]"):
        parse(found[3])


def test_a_column_whose_name_is_taken_is_counted_as_not_used(tmp_path: Path) -> None:
    (row,) = records(tmp_path / "a.jsonl", [{"question": "Q", "answer": "no", "better": "A"}], "answer=better")
    assert parse(row).unused == ("answer of the file",)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("answer",), "columns: expected OURS=THEIRS, such as answer=reply, found 'answer'"),
        (("=reply",), "expected OURS=THEIRS"),
        (("answer=",), "expected OURS=THEIRS"),
        (("anwser=reply",), "columns: expected one of .* before =, found 'anwser'; did you mean answer?"),
        (("answer=a", "answer=b"), "columns: expected each of ours once, found answer twice"),
        (("answer=a", "output=a"), "columns: expected each of the file's once, found a twice"),
        (
            ("answer=rely",),
            r"columns answer=rely: expected a column of the data, found \['query', 'reply'\]; did you mean answer=",
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: tuple[str, ...], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        records(tmp_path / "a.jsonl", [{"query": "Q", "reply": "A"}], *columns)


def test_columns_of_preference_pairs(tmp_path: Path) -> None:
    row = {"input": "Q", "good": "A", "bad": "B"}
    assert records(tmp_path / "a.jsonl", [row], "prompt=input", "chosen=good", "rejected=bad") == [
        {"prompt": "Q", "chosen": "A", "rejected": "B"}
    ]
