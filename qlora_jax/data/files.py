"""Local files → rows, with the types that the files have.

    .jsonl, .ndjson    a JSON object a line
    .json              an array of objects, an object a line, or one object that holds them (`{"data": [ … ]}`), or columns
                       (`{"question": [ … ], "answer": [ … ]}`); a `.jsonl` file with such contents is read in the same way
    .csv, .tsv         a header and rows; all values are texts, so that the answer "NA" is not null and 8.50 not 8.5
    .txt               a text a line
    .parquet           a table

Each may be compressed: `.gz`, `.bz2`, `.xz`, `.zst`. A line or an element that is no row (JSON that is cut off, bytes that
are not UTF-8, half a character, too few fields) is a `DamagedRow` with its place; a file without any rows, or whose rows
cannot be told apart, is an error.
"""

import bz2
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from qlora_jax.data.file_input import DamagedRow, Input, Row, RowOrDamage, not_utf8
from qlora_jax.data.json_files import read_json
from qlora_jax.data.values import WrittenFloat, table_row
from qlora_jax.errors import DataError, failed_download

__all__ = ["EXTENSIONS", "DamagedRow", "Row", "RowOrDamage", "file_kind", "read_file"]

_FIRST_BYTES = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}
_COMPRESSIONS = tuple(_FIRST_BYTES)
_SEPARATORS = (";", "\t", "|")  # of files that are called CSV nevertheless
_PARQUET_ROWS = 1000  # rows that are converted at a time


def file_kind(path: Path) -> str | None:
    """Return the extension that says how a file is read, without that of a compression; None if it is unknown."""
    extensions = [extension.lower() for extension in path.suffixes[-2:]]
    if extensions and extensions[-1] in _COMPRESSIONS:
        extensions.pop()
    return extensions[-1] if extensions and extensions[-1] in _READERS else None


def read_file(path: Path, *, skip: int = 0, notes: list[str] | None = None) -> Iterator[RowOrDamage]:
    """Yield the rows of a file from the row `skip` on, in order.

    Args:
        path: the file.
        skip: the number of first rows to pass over, without a look at what is in them where the form of the file allows it.
        notes: a list that gets what should be said of the file, such as parts of it that are not read.

    Raises:
        DataError: the file is of an unknown kind or damaged as a whole.
        OSError: the file cannot be read.
    """
    kind = file_kind(path)
    if kind is None:
        found = path.suffix.lower() or "none"
        raise DataError(
            f"{path}: expected one of the extensions {', '.join(EXTENSIONS)}, perhaps with {', '.join(_COMPRESSIONS)} "
            f"after it, found {found!r}; rename the file if it has one of these forms, or convert it"
        )
    with _opened(path) as file:
        yield from _READERS[kind](Input(path, file, kind, skip, [] if notes is None else notes))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed if its first bytes say so, and name it in the errors of decompression."""
    with path.open("rb") as file:
        start = file.read(40)
    found = failed_download(start)
    if found is not None and file_kind(path) != ".txt":  # whose lines may be of any kind
        raise DataError(f"{path}: expected data, found {found}")
    compression = next((name for name, first in _FIRST_BYTES.items() if start.startswith(first)), "")
    try:
        if compression == ".zst":
            import pyarrow

            raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
            file = cast(BinaryIO, io.BufferedReader(cast(Any, raw), 1 << 20))
        else:
            openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            file = openers.get(compression, lambda path: path.open("rb"))(path)
        with file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected a whole file, compressed as {compression}, found: {error}") from error
    except OSError as error:
        if compression and error.errno is None:  # from bz2 and from Arrow
            raise DataError(f"{path}: expected a whole file, compressed as {compression}, found: {error}") from error
        raise


# Tables and texts


def _read_delimited(separator: str) -> Callable[[Input], Iterator[RowOrDamage]]:
    def read(source: Input) -> Iterator[RowOrDamage]:
        numbered = source.texts()
        first = next(((number, line) for number, line in numbered if line), None)
        if first is None:
            return
        # Spreadsheets of many languages separate by semicolons, and call that CSV.
        others = [other for other in _SEPARATORS if other in first[1] and separator not in first[1]]
        # Line ends are added again, because inside quotes they belong to the field.
        lines = (line + "\n" for _, line in chain([first], numbered))
        reader = csv.reader(lines, delimiter=others[0] if others else separator, strict=True)
        yield from islice(_rows_of_table(source.path, reader, first[0] - 1), source.skip, None)

    return read


def _rows_of_table(path: Path, reader: Any, before: int) -> Iterator[RowOrDamage]:
    header: list[str] = []
    while True:
        # The limit is a setting of the whole process, so it is changed for this record only.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            place = f"line {reader.line_num + before}"
            wrong = f'{place}: expected fields quoted with ", found: {error}'
            if "end of data" in str(error) or not header:  # all lines from the quote on would be one field
                raise DataError(f"{path}, {wrong}") from error
            fields = []
            yield DamagedRow(f"{path.name}, {wrong}")
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            header = _header(fields)
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(f"{path}, line 1: expected one name for each column, found {twice!r} twice in {header}")
        elif len(fields) != len(header):
            place = f"{path.name}, line {reader.line_num + before}"
            yield DamagedRow(f"{place}: expected {len(header)} fields ({', '.join(header)}), found {len(fields)}")
        else:
            yield dict(zip(header, fields, strict=True))


def _header(fields: list[str]) -> list[str]:
    """Return the names of columns. Spreadsheets leave names out, and pandas that of its index, which is the first column."""
    names = [field.strip() for field in fields]
    if len(names) > 1 and names[0] == "":
        names[0] = "(index)"
    return [name or f"(column {number})" for number, name in enumerate(names, start=1)]


def _read_text(source: Input) -> Iterator[RowOrDamage]:
    rows = ((number, line) for number, line in source.lines() if line.strip())
    for number, line in islice(rows, source.skip, None):
        try:
            yield {"text": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield DamagedRow(not_utf8(f"{source.path.name}, line {number}", error))


def _read_parquet(source: Input) -> Iterator[RowOrDamage]:
    import pyarrow
    import pyarrow.parquet

    if not source.path.stat().st_size:
        return
    file = source.file if source.file.seekable() else io.BytesIO(source.file.read())
    start = file.read(4)
    if start != b"PAR1":
        raise DataError(f"{source.path}: expected a Parquet file (first bytes PAR1), found {start!r}")
    try:
        table, skip, groups = pyarrow.parquet.ParquetFile(file), source.skip, []
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if not groups and skip >= rows:
                skip -= rows
            else:
                groups.append(group)
        batches = table.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups) if groups else []
        precisions = {pyarrow.float16(): np.float16, pyarrow.float32(): np.float32}
        short = {field.name: precisions[field.type] for field in table.schema_arrow if field.type in precisions}
        rows_of_all: Iterable[Row] = (_with_short_floats(row, short) for batch in batches for row in batch.to_pylist())
        yield from (table_row(row) for row in islice(rows_of_all, skip, None))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source.path}: expected a whole Parquet file, found: {error}") from error


def _with_short_floats(row: Row, columns: Mapping[str, type[np.floating[Any]]]) -> Row:
    """Return the row with the digits that a number of its precision needs: 0.1 in place of 0.10000000149011612."""
    for name, precision in columns.items():
        if row[name] is not None and np.isfinite(row[name]):
            row[name] = WrittenFloat(str(precision(row[name])))
    return row


_READERS: dict[str, Callable[[Input], Iterator[RowOrDamage]]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": _read_delimited(","),
    ".tsv": _read_delimited("\t"),
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
EXTENSIONS = tuple(_READERS)
