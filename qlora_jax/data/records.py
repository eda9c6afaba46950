"""Reading rows from files and from the hub; all errors of a local file are found before any long work starts.

1. `source` is the path of an existing file, the path of an existing folder, or the id of a data set on the hub.
2. A local text file is first read line by line by the checks below. They know the line number, which the Arrow readers of
   `datasets` do not report, so the error of a damaged file contains the line.
3. Then `datasets.load_dataset` reads the file into a memory-mapped table.

All CSV and TSV columns are read as text, because type inference would change the answer "NA" to null and "8.50" to 8.5.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# A hub id is `name` or `owner/name`; a text with more slashes is a path.
HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def load_records(source: str, split: str | None = None) -> "Dataset":
    """Return the rows of a local file (JSON lines, JSON, CSV, TSV, Parquet), a folder of such files, or a hub data set.

    Args:
        source: path of a file or folder, or id of a hub data set.
        split: a split in the syntax of `datasets`, such as "train", "test[:100]" or "train[10%:]"; None: "train", which is
            also the name of the only split of a local file.

    Raises:
        DataError: the file is damaged or of an unknown kind.
        FileNotFoundError: there is no such file, folder or data set.
        ConnectionError: the hub cannot be reached.
    """
    path = Path(source).expanduser()
    split = split or "train"
    if path.is_file():
        reader, check = _reader_of(path)
        options = check(path)
        records = _load(reader, split, str(path), data_files=str(path), **options)
    elif path.is_dir():
        records = _load(str(path), split, str(path))
    elif _looks_like_a_path(source):
        raise FileNotFoundError(f"{source}: expected a data file or a folder, found nothing at {path.absolute()}")
    else:
        records = _load(source, split, f"{source!r} (no such local file, so taken as a hub data set)")
    return _with_rows(records, source, split)


def stream_records(source: str, split: str | None = None) -> "IterableDataset":
    """Return the rows of a JSON lines or Parquet file or of a hub data set as a stream, which is never completely in memory.

    A file is not checked first, because it would have to be read twice. Errors in a row are found when the row is read.
    See `load_records` for arguments and errors.
    """
    path, split = Path(source).expanduser(), split or "train"
    if path.is_file():
        if path.suffix.lower() not in STREAMED:
            raise DataError(f"{path}: expected with streaming a {' or '.join(STREAMED)} file, found {path.suffix!r}")
        return _load(STREAMED[path.suffix.lower()], split, str(path), data_files=str(path), streaming=True)
    if path.is_dir() or _looks_like_a_path(source):
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"{source}: expected a file or a hub data set, found {found} at {path.absolute()}")
    return _load(source, split, f"{source!r} (no such local file, so taken as a hub data set)", streaming=True)


def load_hub_records(hub: str, split: str, options: dict[str, str]) -> "Dataset":
    """Return the rows of a hub data set; `options` are more arguments for `datasets.load_dataset`."""
    return _with_rows(_load(hub, split, f"hub data set {hub}", **options), hub, split)


def _with_rows(records: "Dataset", source: str, split: str) -> "Dataset":
    if len(records) == 0:
        raise DataError(f"{source}: expected at least one row in split {split!r}, found none")
    return records


def _looks_like_a_path(source: str) -> bool:
    return (
        Path(source).suffix.lower() in READERS or source.startswith((os.sep, ".", "~")) or HUB_NAME.fullmatch(source) is None
    )


def _reader_of(path: Path) -> tuple[str, Callable[[Path], dict[str, Any]]]:
    extension = path.suffix.lower()
    if extension not in READERS:
        raise DataError(f"{path}: expected one of the extensions {', '.join(READERS)}, found {extension or 'none'!r}")
    return READERS[extension]


def _load(reader: str, split: str, place: str, **options: Any) -> Any:
    """Return a Dataset, or with `streaming=True` an IterableDataset."""
    # Importing `datasets` takes about a second, and batching and serving do not need it.
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        loaded = datasets.load_dataset(reader, split=split, **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{place}: expected a file or a data set on the hub, found neither: {error}") from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{place}: expected rows with the same columns and types, found: {cause}") from error
    except OSError as error:
        raise ConnectionError(f"{place}: could not be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{place}: cannot be loaded with split {split!r}: {error}") from error
    if not isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        raise DataError(f"{place}: expected one split, found a {type(loaded).__name__} for split {split!r}")
    return loaded


# The checks. Each returns the additional options that `load_dataset` needs for the file.


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end); raise DataError at the first byte that is not UTF-8."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A byte-order mark is harmless in the first line only.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = offset + error.start
                raise DataError(
                    f"{path}, line {number}: expected UTF-8 text, found byte 0x{line[error.start]:02x} "
                    f"at byte {place} of the file; convert it, for example with iconv"
                ) from error
            offset += len(line)
            yield number, text.rstrip("\r\n")


def _check_json_lines(path: Path) -> dict[str, Any]:
    rows = 0
    for number, line in _decoded_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.colno}: expected one JSON object a line, "
                f"found {_shortened(line)!r} ({error.msg})"
            ) from error
        _check_is_object(row, f"{path}, line {number}")
        rows += 1
    _check_some_rows(path, rows)
    return {}


def _check_json(path: Path) -> dict[str, Any]:
    text = "\n".join(line for _, line in _decoded_lines(path))
    if not text.lstrip().startswith("["):
        return _check_json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: expected a JSON array of objects, "
            f"found {_shortened(text[error.pos :])!r} ({error.msg})"
        ) from error
    for index, row in enumerate(rows):
        _check_is_object(row, f"{path}, element {index}")
    _check_some_rows(path, len(rows))
    return {}


def _check_delimited(separator: str) -> Callable[[Path], dict[str, Any]]:
    def check(path: Path) -> dict[str, Any]:
        # The limit is a setting of the whole process, so it is changed for this file only.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            # Line ends are added again, because inside quotes they belong to the field.
            lines = csv.reader((line + "\n" for _, line in _decoded_lines(path)), delimiter=separator, strict=True)
            return _check_table(path, lines, separator)
        except csv.Error as error:
            raise DataError(f'{path}: expected fields quoted with ", found: {error}') from error
        finally:
            csv.field_size_limit(limit)

    return check


def _check_table(path: Path, lines: Any, separator: str) -> dict[str, Any]:
    from datasets import Features, Value

    header: list[str] = []
    rows = 0
    for fields in lines:
        if not fields:
            continue
        if not header:
            header = fields
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated or "" in header:
                raise DataError(f"{path}, line 1: expected one name for each column, found {header}")
        elif len(fields) != len(header):
            raise DataError(
                f"{path}, line {lines.line_num}: expected {len(header)} fields ({', '.join(header)}), found {len(fields)}"
            )
        else:
            rows += 1
    _check_some_rows(path, rows)
    features = Features({name: Value("string") for name in header})
    return {"sep": separator, "keep_default_na": False, "features": features}


def _check_parquet(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        _check_some_rows(path, 0)
    if start != b"PAR1":
        raise DataError(f"{path}: expected a Parquet file (first bytes PAR1), found {start!r}")
    return {}


def _check_is_object(row: object, place: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(row).__name__} {_shortened(repr(row))}")


def _check_some_rows(path: Path, rows: int) -> None:
    if rows == 0:
        size = path.stat().st_size
        found = "an empty file" if size == 0 else f"none in {size} bytes"
        raise DataError(f"{path}: expected at least one row, found {found}")


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


STREAMED = {".jsonl": "json", ".parquet": "parquet"}
READERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    ".jsonl": ("json", _check_json_lines),
    ".json": ("json", _check_json),
    ".csv": ("csv", _check_delimited(",")),
    ".tsv": ("csv", _check_delimited("\t")),
    ".parquet": ("parquet", _check_parquet),
}
