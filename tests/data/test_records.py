"""Files: the same rows from every format, and for every fault a message that names its place."""

import json
import os
from pathlib import Path

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from qlora_jax.data import DataError, load_records

ROWS = [
    {"question": "Two and two?", "answer": "NA"},
    {"question": 'A "quoted", two-line\nquestion — with ü', "answer": "8.50"},
    {"question": "Empty?", "answer": ""},
]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", lines(*ROWS))
    write(tmp_path / "array.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "lines.json", lines(*ROWS))
    for name in ("rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl", "array.json", "lines.json"):
        assert load_records(str(tmp_path / name)).to_list() == ROWS, name


def test_blank_lines_and_a_byte_order_mark_are_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\ufeff" + lines(ROWS[0]) + "\n  \n" + lines(ROWS[1]))
    assert load_records(path).to_list() == ROWS[:2]
    path = write(tmp_path / "rows.csv", "\ufeffquestion,answer\nWhy,So\n")
    assert load_records(path).to_list() == [{"question": "Why", "answer": "So"}]


def test_messages_of_unlike_keys(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi", "name": "Ada"}]},
    ]
    assert load_records(write(tmp_path / "rows.jsonl", lines(*rows))).to_list() == rows


def test_a_split_may_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines(*ROWS))
    assert load_records(path, "train[1:]").to_list() == ROWS[1:]
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be loaded with split 'test'"):
        load_records(path, "test")


def test_a_folder_is_read_as_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", lines(*ROWS))
    assert load_records(str(folder)).to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", r"a\.jsonl: expected at least one row, found an empty file"),
        ("a.json", "", r"a\.json: expected at least one row, found an empty file"),
        ("a.csv", "", r"a\.csv: expected at least one row, found an empty file"),
        ("a.parquet", "", r"a\.parquet: expected at least one row, found an empty file"),
        ("a.jsonl", "\n \n", r"expected at least one row, found none in 3 bytes"),
        ("a.json", "[]", r"expected at least one row, found none in 2 bytes"),
        ("a.csv", "text\n", r"expected at least one row, found none in 5 bytes"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b"\n',
            r"a\.jsonl, line 2, column \d+: expected one JSON object a line",
        ),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', r"a\.jsonl, line 3: expected a JSON object, found list"),
        (
            "a.json",
            '[{"text": "a"},\n {"text" "b"}]',
            r"a\.json, line 2, column 10: expected a JSON array of objects",
        ),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, element 1: expected a JSON object, found int 3"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", r"a\.csv, line 3: expected 2 fields \(q, a\), found 3"),
        ("a.csv", 'q,a\n"two\nlines",2\n1\n', r"a\.csv, line 4: expected 2 fields \(q, a\), found 1"),
        ("a.csv", "q,q\n1,2\n", r"a\.csv, line 1: expected one name for each column, found 'q' twice in \['q', 'q'\]"),
        ("a.csv", 'q,a\n"open,2\n', r"a\.csv, line 2: expected fields quoted with"),
        ("a.parquet", "text", r"a\.parquet: expected a Parquet file \(first bytes PAR1\), found b'text'"),
        ("a.parquet", "PAR1 but cut off", r"a\.parquet"),
        (
            "a.xlsx",
            "text",
            r"a\.xlsx: expected one of the extensions \.jsonl, .*, perhaps with \.gz, .* after it, found '\.xlsx'",
        ),
        ("a", "text", r"expected one of the extensions .*, found 'none'"),
    ],
)
def test_faults_name_their_place(tmp_path: Path, name: str, content: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_records(write(tmp_path / name, content))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    first = lines({"text": "für"}).encode()
    path = write(tmp_path / "a.jsonl", first + '{"text": "für"}\n'.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: expected UTF-8 text, found byte 0xfc at byte 11 of the line; conv"
    ):
        load_records(path)


def test_unlike_types_in_one_column(tmp_path: Path) -> None:
    rows = [{"text": {"a": 1}}, {"text": "b"}, {"text": None, "more": [1, "x"]}]
    assert load_records(write(tmp_path / "a.jsonl", lines(*rows))).to_list() == rows


def test_a_pipe_or_a_device_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(DataError, match="expected a regular file or a folder, found a pipe or a device"):
            load_records(str(source))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/file", "a/b/c", "~/missing.csv"])
def test_a_missing_file(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected a data file or a folder, found nothing at /"):
        load_records(source)


def test_what_is_no_file_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> object:
        asked.append((name, split))
        if name == "owner/empty":
            return datasets.Dataset.from_list([])
        if name == "owner/offline":
            raise ConnectionError("no network")
        raise DatasetNotFoundError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"'owner/name-v1\.0' .* found neither: no such thing"):
        load_records("owner/name-v1.0", "test")
    with pytest.raises(ConnectionError, match=r"'owner/offline' .* could not be read: no network"):
        load_records("owner/offline")
    with pytest.raises(DataError, match="owner/empty: expected at least one row in split 'train', found none"):
        load_records("owner/empty")
    assert asked == [("owner/name-v1.0", "test"), ("owner/offline", "train"), ("owner/empty", "train")]


def test_real_files(shared_data: Path) -> None:
    counts = {
        "oasst_guanaco": 650,
        "code_alpaca": 1500,
        "gsm8k": 900,
        "mmlu_zero_shot": 1000,
        "vicuna_questions": 80,
    }
    assert {name: len(load_records(str(shared_data / f"{name}.jsonl"))) for name in counts} == counts
