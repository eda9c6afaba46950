"""Files as people have them: every type stays as it is written, and rows come out of every form and compression."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from qlora_jax.data import DataError, load_records, open_source, stream_records, stream_source
from qlora_jax.data.files import DamagedRow, read_file
from qlora_jax.data.schemas import parse
from qlora_jax.data.values import WrittenFloat, checked_text, from_json

QA = [{"question": f"Q{number}", "answer": f"ü {number} 😀"} for number in range(3)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answer(path: Path, index: int = 0) -> str:
    return parse(load_records(str(path)).to_list()[index]).messages[-1]["content"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"2024-03-01"', "2024-03-01"),
        ('"2024-03-01T10:00:00Z"', "2024-03-01T10:00:00Z"),
        ('"10:30"', "10:30"),
        ("8.50", "8.50"),
        ("1e5", "1e5"),
        ("-0.0", "-0.0"),
        ("7", "7"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("true", "true"),
        ('"null"', "null"),
    ],
)
def test_an_answer_is_its_text_in_the_file(tmp_path: Path, written: str, text: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"question": "Q", "answer": {written}}}\n' * 2)
    assert answer(path) == text
    assert answer(write(tmp_path / "a.json", f'[{{"question": "Q", "answer": {written}}}]')) == text
    (first, _) = stream_records(str(path))
    assert parse(first).messages[-1]["content"] == text


def test_values_of_tables_are_their_text(tmp_path: Path) -> None:
    values = {
        "2024-03-01": datetime.date(2024, 3, 1),
        "2024-03-02": datetime.datetime(2024, 3, 2),
        "2024-03-01T10:30:00": datetime.datetime(2024, 3, 1, 10, 30),
        "8.50": decimal.Decimal("8.50"),
        "5": 5,
        "false": False,
    }
    for text, value in values.items():
        table = pyarrow.table({"question": ["Q"], "answer": [value]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert answer(tmp_path / "a.parquet") == text
    for kind in (pyarrow.float16(), pyarrow.float32()):
        value = pyarrow.array([np.float16(0.1) if kind == pyarrow.float16() else 0.1], kind)
        pyarrow.parquet.write_table(pyarrow.table({"question": ["Q"], "answer": value}), tmp_path / "a.parquet")
        assert answer(tmp_path / "a.parquet") == "0.1"
    assert float(WrittenFloat("8.50")) == 8.5
    assert checked_text(from_json("[8.50]", "column 'x'")[0], "") == "8.50"
    assert json.dumps({"a": WrittenFloat("8.50")}) == '{"a": 8.5}'
    with pytest.raises(DataError, match="here: expected text, found list"):
        checked_text([1], "here")


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("a.jsonl", lines(QA[0]) + '{"question": "q", "answer": "one", "answer": "two"}', "answer"),
        ("a.csv", 'messages\n"[{""role"": ""user"", ""content"": ""a"", ""role"": ""assistant""}]"\n', "role"),
    ],
)
def test_a_key_that_occurs_twice_is_a_damaged_row(tmp_path: Path, name: str, text: str, key: str) -> None:
    """One of the two values would be lost."""
    with pytest.raises(DataError, match=f"the key '{key}' occurs twice in one object"):
        parse(load_records(str(write(tmp_path / name, text))).to_list()[-1])


def test_nulls_are_data_in_json_and_filling_in_tables(tmp_path: Path) -> None:
    calls = [{"name": "wait", "arguments": arguments} for arguments in ({"time": 5}, {"time": "noon"}, {"time": None})]
    rows = [{"conversations": [{"from": "function_call", "value": json.dumps(call)}]} for call in calls]
    rows += [{"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]} for call in calls]
    read = load_records(str(write(tmp_path / "a.jsonl", lines(*rows)))).to_list()
    found = [parse(row).messages[0]["tool_calls"][0]["function"]["arguments"] for row in read]
    assert found == [call["arguments"] for call in calls] * 2
    assert [type(arguments["time"]) for arguments in found[3:]] == [int, str, type(None)]
    # In a table, the keys that other rows have are null.
    unlike = [{"arguments": {"a": 1}}, {"arguments": {"b": "x"}}]
    datasets.Dataset.from_list(unlike).to_parquet(tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")).to_list() == unlike


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress, "zstd"], ids=[".gz", ".bz2", ".xz", ".zst"]
)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_compressed_files(tmp_path: Path, compress: Any, kind: str) -> None:
    plain = tmp_path / f"rows{kind}"
    match kind:
        case ".jsonl":
            write(plain, lines(*QA))
        case ".json":
            write(plain, json.dumps(QA, indent=1))
        case ".csv":
            pandas.DataFrame(QA).to_csv(plain, index=False)
        case ".txt":
            write(plain, "".join(row["answer"] + "\n\n" for row in QA))
        case ".parquet":
            pandas.DataFrame(QA).to_parquet(plain)
    data = plain.read_bytes()
    if compress == "zstd":
        packed, extension = pyarrow.compress(data, codec="zstd", asbytes=True), ".ZST"
    else:
        packed = compress(data)
        extension = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz"}[packed[:2]]
    path = write(tmp_path / f"rows{kind}{extension}", packed)
    expected = [{"text": row["answer"]} for row in QA] if kind == ".txt" else QA
    assert load_records(str(path)).to_list() == expected
    assert list(stream_records(str(path)).skip(1)) == expected[1:]
    write(path, packed[: len(packed) - 9])
    with pytest.raises(DataError, match=rf"rows{kind}{extension}: expected a whole (Parquet )?file"):
        load_records(str(path))


@pytest.mark.parametrize(
    ("content", "expected", "note"),
    [
        ({"data": QA}, QA, ""),
        ({"version": "1", "data": QA}, QA, "of a.json only 'data' is read, not 'version'"),
        ({"a": QA[:1], "rows": QA}, QA, "of a.json only 'rows' is read, not 'a'"),
        ({"question": ["Q0", "Q1", "Q2"], "answer": [row["answer"] for row in QA]}, QA, ""),
        ({name: {str(i): row[name] for i, row in enumerate(QA)} for name in QA[0]}, QA, ""),
        ({row["question"]: row for row in QA}, QA, ""),
        (QA[0], QA[:1], ""),
        ({"messages": [{"role": "user", "content": "Hi"}]}, [{"messages": [{"role": "user", "content": "Hi"}]}], ""),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [{"conversations": [{"from": "human", "value": "Hi"}]}], ""),
    ],
)
@pytest.mark.parametrize(("name", "indent"), [("a.json", 2), ("a.json", None), ("a.jsonl", 2)])
def test_rows_within_a_json_document(
    tmp_path: Path, content: Any, expected: Any, note: str, name: str, indent: int | None
) -> None:
    path = write(tmp_path / name, json.dumps(content, indent=indent, ensure_ascii=False))
    opened = open_source(str(path))
    assert list(opened.records) == expected
    assert opened.note == note.replace("a.json", name)
    assert list(stream_source(str(path))) == expected


def test_an_array_in_a_file_of_lines(tmp_path: Path) -> None:
    for content in (json.dumps(QA), json.dumps(QA, indent=1), "[\n" + ",\n".join(map(json.dumps, QA)) + "\n]"):
        assert load_records(str(write(tmp_path / "a.jsonl", content))).to_list() == QA
    # A first line that is damaged is no document.
    rows = list(read_file(write(tmp_path / "a.jsonl", '{"question": "Q\n' + lines(*QA))))
    assert rows[1:] == QA
    assert isinstance(rows[0], DamagedRow)


def test_files_are_read_by_what_they_hold(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*QA).encode())
    assert load_records(str(write(tmp_path / "a.jsonl", packed))).to_list() == QA
    assert load_records(str(write(tmp_path / "a.jsonl.gz", lines(*QA)))).to_list() == QA
    # As jq prints objects.
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, "\n".join(json.dumps(row, indent=2) for row in QA))
        assert load_records(str(path)).to_list() == QA
        with pytest.raises(DataError, match=r"line 5, column 1: expected a JSON object, found"):
            load_records(str(write(tmp_path / name, path.read_text()[:-3])))


def test_a_quote_that_is_out_of_place(tmp_path: Path) -> None:
    rows = 'question,answer\nQ,A\nQ,"A" b\nR,"B"\n'
    first, damaged, last = open_source(str(write(tmp_path / "a.csv", rows))).records
    assert (first, last) == ({"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"})
    assert damaged.reason.startswith('a.csv, line 3: expected fields quoted with ", found: ')
    with pytest.raises(DataError, match=r"a\.csv, line 5: expected fields quoted"):
        open_source(str(write(tmp_path / "a.csv", rows + 'R,"B\n')))


def test_tables_of_spreadsheets_and_pandas(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"question": ["How much?", "Which?", "Say, how many?"], "answer": ["8.50", "NA", "007"]})
    frame.to_csv(tmp_path / "index.csv")
    assert load_records(str(tmp_path / "index.csv")).to_list() == [
        {"(index)": str(number)} | row for number, row in enumerate(frame.to_dict("records"))
    ]
    frame.to_csv(tmp_path / "semicolon.csv", sep=";", index=False)
    assert load_records(str(tmp_path / "semicolon.csv")).to_list() == frame.to_dict("records")
    messages = [[{"role": "user", "content": "Don't"}, {"role": "assistant", "content": 'Say "no"'}]]
    pandas.DataFrame({"messages": messages}).to_csv(tmp_path / "lists.csv", index=False)  # as Python writes lists
    pandas.DataFrame({"messages": map(json.dumps, messages)}).to_csv(tmp_path / "json.csv", index=False)
    for name in ("lists.csv", "json.csv"):
        (row,) = load_records(str(tmp_path / name)).to_list()
        assert list(parse(row).messages) == messages[0]


def test_damaged_rows_are_in_the_place_of_the_row(tmp_path: Path) -> None:
    damaged = {
        '{"question": "Q"': r"a\.jsonl, line 2, column \d+: expected one JSON object a line",
        '["a"]': "a.jsonl, line 2: expected a JSON object, found list",
        "null": "a.jsonl, line 2: expected a JSON object, found null",
        '{"answer": "half \\ud83d"}': r"a\.jsonl, line 2, key 'answer': expected whole characters, found \\ud83d",
        '{"a": [{"b": "\\udc00 x"}]}': "line 2, key 'a': expected whole characters",
        '{"a": ' + "[" * 100_000: r"line 2: expected one JSON object a line, found .*\(nested too deeply\)",
        '{"a": ' + "9" * 5000 + "}": "line 2: expected one JSON object a line",
        "caf\xe9": "line 2: expected UTF-8 text, found byte 0xe9 at byte 3",
    }
    for text, expected in damaged.items():
        path = write(tmp_path / "a.jsonl", lines(QA[0]).encode() + text.encode("latin-1") + b"\n" + lines(QA[1]).encode())
        first, row, last = open_source(str(path)).records
        assert (first, last) == (QA[0], QA[1])
        assert isinstance(row, DamagedRow)
        with pytest.raises(DataError, match=expected):
            load_records(str(path))
        with pytest.raises(DataError, match=expected):
            parse(row)
    path = write(tmp_path / "a.csv", "question,answer\nQ,A\nonly one\nQ,B\n")
    assert "a.csv, line 3: expected 2 fields" in list(open_source(str(path)).records)[1].reason
    with pytest.raises(DataError, match="expected UTF-8 text, found UTF-16"):
        load_records(str(write(tmp_path / "a.jsonl", lines(QA[0]).encode("utf-16"))))


@pytest.mark.parametrize("last", [{"question": "Last?", "answer": "Yes.", "source": "hand"}, {"messages": [], "answer": 3}])
def test_columns_and_types_of_late_rows(tmp_path: Path, last: dict[str, Any]) -> None:
    """More than the readers of Arrow look at before they fix the columns: 10 MB. About 1 s."""
    row = json.dumps({"question": "What?", "answer": "word " * 2000}) + "\n"
    path = write(tmp_path / "a.jsonl", row * 1100 + json.dumps(last) + "\n")
    rows = open_source(str(path))
    assert len(rows.records) == 1101
    assert set(rows.columns) == {"question", "answer", *last}
    assert list(stream_source(str(path)).skip(1100)) == [last]


def test_a_folder_is_its_files_each_read_as_itself(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "data.csv", "question,answer\nHow much?,8.50\nWhich?,NA\n")
    write(
        folder / "more" / "b.jsonl.gz", gzip.compress(lines({"question": "When?", "answer": "2024-03-01", "x": 1}).encode())
    )
    write(folder / "test.jsonl", lines(QA[0]))
    write(folder / "dev" / "part-0.json", json.dumps(QA[:2]))
    write(folder / "README.md", "# Data")
    write(folder / "notes.txt", "Not data.")
    write(folder / ".hidden.jsonl", "x")
    opened = open_source(str(folder))
    assert [row["answer"] for row in opened.records] == ["8.50", "NA", "2024-03-01"]
    assert opened.note == "not read: dev/part-0.json, test.jsonl, README.md, notes.txt"
    assert [row["answer"] for row in stream_source(str(folder))] == ["8.50", "NA", "2024-03-01"]
    assert load_records(str(folder), "test").to_list() == QA[:1]
    assert load_records(str(folder), "validation[1:]").to_list() == QA[1:2]
    assert load_records(str(folder), "test+validation").to_list() == [QA[0], *QA[:2]]
    with pytest.raises(
        DataError, match=r"cannot be loaded with split 'dev'.*; the folder has the splits validation, test, train"
    ):
        load_records(str(folder), "dev")
    with pytest.raises(DataError, match="expected a folder with files"):
        load_records(str(write(tmp_path / "none" / "a.bin", "x").parent))


def test_folders_as_the_hub_has_them(tmp_path: Path) -> None:
    for split, row in (("train", QA[0]), ("test", QA[1])):
        write(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.jsonl", lines(row))
    assert load_records(str(tmp_path / "hub")).to_list() == QA[:1]
    assert load_records(str(tmp_path / "hub"), "test").to_list() == QA[1:2]
    datasets.Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
    assert load_records(str(tmp_path / "saved")).to_list() == QA
    books = tmp_path / "books"
    for name in ("one.txt", "two.txt"):
        write(books / name, f"{name}\n\nText.\n")
    assert [row["text"] for row in load_records(str(books))] == ["one.txt", "Text.", "two.txt", "Text."]


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for number in range(3):
        write(folder / f"{number}.jsonl", lines(*({"n": 10 * number + row} for row in range(4))))
    pandas.DataFrame({"n": range(30, 2530)}).to_parquet(folder / "3.parquet", row_group_size=600)
    expected = [row["n"] for row in load_records(str(folder))]
    assert len(expected) == 2512
    for skip in (0, 3, 4, 9, 12, 612, 613, 2511, 2600):
        stream = stream_records(str(folder)).skip(skip)
        rows = iter(stream)
        found = [row["n"] for row in islice(rows, 5)]
        again = stream_records(str(folder))
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert found + [row["n"] for row in again] == expected[skip:]
    with pytest.raises(DataError, match="position in the data"):
        stream.load_state_dict({"shard": 1})
    with pytest.raises(DataError, match="cannot be streamed with split 'test': expected one of train"):
        stream_records(str(folder), "test")


def test_names_of_columns_in_tables_of_spreadsheets(tmp_path: Path) -> None:
    for content in (
        "question, answer\nQ,A\n",
        "question,answer,\nQ,A,\n",
        "question|answer\nQ|A\n",
        ",question ,answer,,\n7,Q,A,,\n",
    ):
        (row,) = load_records(str(write(tmp_path / "a.csv", content)))
        assert (row["question"], row["answer"]) == ("Q", "A")
        assert set(row) - {"question", "answer"} <= {"(index)", "(column 3)", "(column 4)", "(column 5)"}
    with pytest.raises(DataError, match=r"line 1: expected one name for each column, found 'a' twice in \['a', 'b', 'a'\]"):
        load_records(str(write(tmp_path / "a.csv", "a,b,a \n1,2,3\n")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_files_that_hold_something_else(tmp_path: Path, name: str) -> None:
    for content, message in (
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "found a pointer of Git LFS; fetch the file",
        ),
        ("\n<!DOCTYPE html>\n<html><body>404</body></html>\n", "found a web page; download the file itself"),
        ("<HTML lang=en>\n", "found a web page"),
    ):
        with pytest.raises(DataError, match=f"{name}: expected data, {message}"):
            load_records(str(write(tmp_path / name, content)))
    assert len(load_records(str(write(tmp_path / "a.txt", "<html>\n<p>text\n")))) == 2


def test_numbers_of_single_precision(tmp_path: Path) -> None:
    """They have the digits that NumPy and pandas print."""
    values = [0.1, 2.5, 1e20, None]
    table = pyarrow.table({"question": ["Q"] * 4, "answer": pyarrow.array(values, pyarrow.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [answer(tmp_path / "a.parquet", index) for index in range(3)] == ["0.1", "2.5", "1e+20"]
    assert load_records(str(tmp_path / "a.parquet")).to_list()[3]["answer"] is None


def test_splits_in_one_json_object(tmp_path: Path) -> None:
    opened = open_source(str(write(tmp_path / "a.json", json.dumps({"validation": QA, "train": QA[:1]}))))
    assert len(opened.records) == 1
    assert "only 'train' is read, not 'validation'" in opened.note


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "https://huggingface.co/datasets/a/b-c",
            "found an address; download the file first; a/b-c is the id of a hub data set",
        ),
        ("s3://bucket/rows.jsonl", "found an address; download the file first"),
        ("none/of/these", "expected a data file or a folder, found nothing at"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str) -> None:
    for read in (load_records, stream_records):
        with pytest.raises(FileNotFoundError, match=f"^{source}: .*{message}"):
            read(source)
