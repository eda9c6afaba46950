"""The value of `--data` → records with one conversation, pair or text per row.

1. An existing file or folder, or a hub data set, is read as it is (records.py).
2. A data set's name from the QLoRA authors' program (e.g. `oasst1`), if it is no file, is read from the hub and converted
   (named.py).
3. Columns get the names that the user gives them (columns.py).
4. Rows that are messages of trees (OASST1's own files) become conversations (trees.py).

Several sources form one corpus. With weights, each source gets its share of the corpus (mixture.py).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.data.columns import NO_COLUMNS, ColumnNames
from qlora_jax.data.file_input import DamagedRow, RowOrDamage
from qlora_jax.data.named import NAMED, WITHOUT_SOURCE, convert_named
from qlora_jax.data.pairs import PREFERENCE_COLUMNS
from qlora_jax.data.records import Rows, load_hub_records, open_rows, rows_of_table, stream_records
from qlora_jax.data.schemas import SCHEMAS
from qlora_jax.data.streams import ChangedStream, RowStream
from qlora_jax.data.trees import COLUMNS, read_trees
from qlora_jax.errors import DataError

__all__ = ["Source", "column_names", "open_source", "stream_source"]


@dataclass(frozen=True)
class Source:
    """The rows of a source.

    Attributes:
        records: the rows; a damaged one is a `DamagedRow`.
        columns: the columns that occur in the source, by the source's own names; empty where they have fixed names.
        note: a note on the source, such as on its conversion; empty for rows that were not converted.
    """

    records: Rows | list[dict[str, Any]]
    columns: tuple[str, ...] = ()
    note: str = ""


def column_names(texts: Sequence[str]) -> ColumnNames:
    """Return the columns that are renamed, from texts `ours=theirs`.

    Raises:
        OptionError: a text of another form, or a name that no schema has.
    """
    forms = {name: schema.columns for name, schema in SCHEMAS.items()} | {"preferences": PREFERENCE_COLUMNS}
    required = {name for columns in forms.values() for name in columns} | {"prompt"}
    optional = {name for schema in SCHEMAS.values() for name in schema.optional}
    return ColumnNames.of(texts, required | optional, {name: tuple(columns) for name, columns in forms.items()})


def open_source(source: str, split: str | None = None, columns: ColumnNames = NO_COLUMNS) -> Source:
    """Return the rows of a file, a folder, a hub data set or a data set in `NAMED`.

    See `load_records` for the errors. A damaged row of a file is none of them: it is in the place of the row.
    """
    if not Path(os.path.expanduser(source)).exists():
        if source in NAMED:
            named = NAMED[source]
            records = load_hub_records(named.hub, split or named.split, named.options)
            note = f"{named.hub}, as the QLoRA authors' program reads it"
            return Source(rows_of_table(convert_named(source, records)), note=note)
        if source in WITHOUT_SOURCE:
            raise DataError(f"{source}: expected a data set that can be read; {WITHOUT_SOURCE[source]}")
    records = open_rows(source, split)
    note = "; ".join(records.notes)
    if not COLUMNS.issubset(records.column_names):
        return Source(records.mapped(_renaming(columns)) if columns.pairs else records, records.column_names, note)
    if records.damage is not None:
        raise DataError(records.damage)
    try:
        trees = read_trees(records)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return Source(trees.conversations, note="; ".join(filter(None, (note, str(trees)))))


def stream_source(source: str, split: str | None = None, columns: ColumnNames = NO_COLUMNS) -> RowStream:
    """Return the rows as a stream; see `stream_records` for the errors."""
    stream = stream_records(source, split)
    return ChangedStream(stream, _renaming(columns)) if columns.pairs else stream


def _renaming(columns: ColumnNames) -> Callable[[RowOrDamage], RowOrDamage]:
    def rename(row: RowOrDamage) -> RowOrDamage:
        if isinstance(row, DamagedRow):
            return row
        try:
            return columns.rename(row)
        except DataError as error:
            return DamagedRow(str(error))

    return rename
