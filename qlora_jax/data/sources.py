"""The value of `--data` → records with one conversation, pair or text per row.

1. An existing file or folder, or a hub data set, is read as it is (records.py).
2. A data set's name from the QLoRA authors' program (e.g. `oasst1`), if it is no file, is read from the hub and converted
   (named.py).
3. Rows that are messages of trees (OASST1's own files) become conversations (trees.py).

Several sources form one corpus. With weights, each source gets its share of the corpus (mixture.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.data.named import NAMED, WITHOUT_SOURCE, convert_named
from qlora_jax.data.records import load_hub_records, load_records
from qlora_jax.data.trees import COLUMNS, read_trees
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """The rows of a source, and a note on their conversion, which is empty for rows that were not converted."""

    records: "Dataset | list[dict[str, Any]]"
    note: str = ""


def open_source(source: str, split: str | None = None) -> Source:
    """Return the rows of a file, a folder, a hub data set or a data set in `NAMED`; see `load_records` for the errors."""
    if not Path(source).expanduser().exists():
        if source in NAMED:
            named = NAMED[source]
            records = load_hub_records(named.hub, split or named.split, named.options)
            return Source(convert_named(source, records), f"{named.hub}, as the QLoRA authors' program reads it")
        if source in WITHOUT_SOURCE:
            raise DataError(f"{source}: expected a data set that can be read; {WITHOUT_SOURCE[source]}")
    records = load_records(source, split)
    if not COLUMNS.issubset(records.column_names):
        return Source(records)
    try:
        trees = read_trees(records)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return Source(trees.conversations, str(trees))
