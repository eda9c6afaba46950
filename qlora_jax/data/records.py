"""The rows of files, folders and hub data sets, at once (`load_records`) or as a stream (`stream_records`).

1. `source` is the path of an existing file, the path of an existing folder, or the id of a data set on the hub.
2. Files are read by files.py, with their own types, and are read again in every pass over them: they are never completely in
   memory. `load_records` reads them once before, to count the rows and to find what is damaged.
3. A folder is its data files (folders.py), read as each file itself is read.
4. Hub data sets are read by `datasets` (Arrow tables).
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.data.files import DamagedRow, RowOrDamage, file_kind, read_file
from qlora_jax.data.folders import is_described, is_saved, splits_of_folder
from qlora_jax.data.streams import FileStream, HubStream, RowStream
from qlora_jax.data.values import table_row
from qlora_jax.errors import DataError, list_names

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Rows", "check_local", "load_hub_records", "load_records", "open_rows", "rows_of_table", "stream_records"]

# A hub id is `name` or `owner/name`; a text with more slashes is a path.
HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".xlsx")  # of names of files, whatever is in them


@dataclass(frozen=True)
class Rows:
    """The rows of a source; each iteration reads them anew.

    Attributes:
        read: returns the rows of the source from its start.
        kept: the ranges of these rows that belong to the split; None: all of them.
        total: the number of rows of the source.
        column_names: the columns that occur in the source.
        damage: what is wrong with the first row that is damaged; None if none is.
        notes: what should be said of the source.
    """

    read: Callable[[], Iterator[RowOrDamage]]
    total: int
    column_names: tuple[str, ...]
    damage: str | None = None
    notes: tuple[str, ...] = ()
    kept: tuple[range, ...] | None = None

    def __len__(self) -> int:
        return self.total if self.kept is None else sum(map(len, self.kept))

    def __iter__(self) -> Iterator[Any]:
        for part in (range(self.total),) if self.kept is None else self.kept:
            yield from islice(self.read(), part.start, part.stop)

    def select(self, indices: Iterable[int]) -> list[Any]:
        """Return the rows with these indices, in the order of the indices."""
        wanted = list(indices)
        needed = set(wanted)
        found = {index: row for index, row in enumerate(self) if index in needed}
        return [found[index] for index in wanted]

    def to_list(self) -> list[Any]:
        """Return all rows."""
        return list(self)

    def mapped(self, change: Callable[[RowOrDamage], RowOrDamage]) -> "Rows":
        """Return the rows after a change of each."""
        return replace(self, read=lambda: map(change, self.read()))


def load_records(source: str, split: str | None = None) -> Rows:
    """Return the rows of a local file, a folder of files, or a hub data set.

    Args:
        source: path of a file or folder, or id of a hub data set.
        split: a split in the syntax of `datasets`, such as "train", "test[:100]" or "train[10%:]"; None: "train", which is
            also the name of the only split of a local file.

    Raises:
        DataError: a file or a row of it is damaged, or the file is of an unknown kind.
        FileNotFoundError: there is no such file, folder or data set.
        ConnectionError: the hub cannot be reached.
    """
    rows = open_rows(source, split)
    if rows.damage is not None:
        raise DataError(rows.damage)
    return rows


def open_rows(source: str, split: str | None = None) -> Rows:
    """Return the rows as `load_records` does, with a `DamagedRow` in the place of each row that is damaged."""
    path, split = Path(os.path.expanduser(source)), split or "train"
    if path.is_file():
        rows = _rows_of_files({"train": [path]}, split, str(path))
    elif path.is_dir() and not is_described(path):
        splits, unknown = splits_of_folder(path)
        rows = _rows_of_files(splits, split, str(path))
        others = [file for name, files in splits.items() if name not in re.findall(r"\w+", split) for file in files]
        unread = [str(file.relative_to(path)) for file in [*others, *unknown]]
        rows = replace(rows, notes=(*rows.notes, *([f"not read: {list_names(unread)}"] if unread else [])))
    else:
        rows = rows_of_table(_load_table(source, path, split))
    if len(rows) == 0:
        raise DataError(f"{source}: expected at least one row in split {split!r}, found none")
    return rows


def stream_records(source: str, split: str | None = None) -> RowStream:
    """Return the rows of a file, a folder of files or a hub data set as a stream, which is never completely in memory.

    A file is not checked first, because it would have to be read twice: a damaged row is a `DamagedRow` in the stream. The
    rows of a JSON file that are not one a line are in memory together. See `load_records` for arguments and errors.
    """
    path, split = Path(os.path.expanduser(source)), split or "train"
    if path.is_file() or (path.is_dir() and not is_described(path)):
        splits = {"train": [path]} if path.is_file() else splits_of_folder(path)[0]
        files = _files_of_split(splits, split, str(path))
        for file in files:
            if file_kind(file) is None:
                next(read_file(file))  # which raises the error
        return FileStream(files)
    if path.is_dir():
        raise FileNotFoundError(
            f"{source}: expected with streaming a file, another folder or a hub id, found a folder that `datasets` reads"
        )
    check_local(source)
    return HubStream(_load(source, split, _hub_place(source), streaming=True))


def load_hub_records(hub: str, split: str, options: dict[str, str]) -> "Dataset":
    """Return the table of a hub data set; `options` are more arguments for `datasets.load_dataset`."""
    table = _load(hub, split, f"hub data set {hub}", saved=False, **options)
    if len(table) == 0:
        raise DataError(f"{hub}: expected at least one row in split {split!r}, found none")
    return table


# Files and folders


def _rows_of_files(splits: dict[str, list[Path]], split: str, place: str) -> Rows:
    """Return the rows of a split, after one pass over its files."""
    if split in splits:
        return _scanned(splits[split], place)
    # Importing `datasets` takes about a second, and a plain name does not need it.
    from datasets import ReadInstruction

    named = [name for name in splits if name in re.findall(r"\w+", split)]
    parts = [_scanned(splits[name], place) for name in named]
    firsts = {name: sum(map(len, parts[:index])) for index, name in enumerate(named)}
    try:
        lengths = dict(zip(named, map(len, parts), strict=True)) or dict.fromkeys(splits, 0)
        found = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        known = f"; the folder has the splits {', '.join(splits)}" if len(splits) > 1 or "train" not in splits else ""
        raise DataError(f"{place}: cannot be loaded with split {split!r}: {str(error).rstrip('.')}{known}") from error
    kept = tuple(range(firsts[one.splitname] + one.from_, firsts[one.splitname] + one.to) for one in found)
    files = [file for name in named for file in splits[name]]
    return Rows(
        read=lambda: _read_files(files),
        total=sum(map(len, parts)),
        column_names=tuple(dict.fromkeys(name for part in parts for name in part.column_names)),
        damage=next((part.damage for part in parts if part.damage), None),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        kept=kept,
    )


def _scanned(files: Sequence[Path], place: str) -> Rows:
    """Return all rows of some files, after one pass over them.

    Raises:
        DataError: a file cannot be read, or none of them has a row.
    """
    total, columns, notes = 0, dict[str, None](), list[str]()
    damage = None
    for file in files:
        for row in read_file(file, notes=notes):
            total += 1
            if isinstance(row, DamagedRow):
                damage = damage or f"{file.parent}{os.sep}{row.reason}"
            else:
                columns.update(dict.fromkeys(row))
    if not total:
        size = sum(file.stat().st_size for file in files)
        raise DataError(f"{place}: expected at least one row, found {f'none in {size} bytes' if size else 'an empty file'}")
    return Rows(lambda: _read_files(files), total, tuple(columns), damage, tuple(notes))


def _read_files(files: Sequence[Path]) -> Iterator[RowOrDamage]:
    for file in files:
        yield from read_file(file)


def _files_of_split(splits: dict[str, list[Path]], split: str, place: str) -> list[Path]:
    if split not in splits:
        raise DataError(f"{place}: cannot be streamed with split {split!r}: expected one of {', '.join(splits)}")
    return splits[split]


# Tables of `datasets`


def rows_of_table(table: "Dataset") -> Rows:
    """Return the rows of a table of `datasets`."""
    rows: Any = table  # it is iterable, but its type does not declare it
    return Rows(lambda: map(table_row, rows), len(table), tuple(table.column_names))


def _load_table(source: str, path: Path, split: str) -> "Dataset":
    if path.is_dir():
        return _load(str(path), split, str(path), saved=is_saved(path))
    check_local(source)
    return _load(source, split, _hub_place(source))


def check_local(source: str) -> None:
    """Raise FileNotFoundError for a source that cannot be the id of a hub data set, and is no file or folder either.

    Raises:
        DataError: it is a pipe or a device.
    """
    path = Path(os.path.expanduser(source))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{source}: expected a regular file or a folder, found a pipe or a device; copy its contents into a file"
        )
    if path.exists() or not _looks_like_a_path(source):
        return
    if address := re.match(r"\w{2,}://(?:huggingface\.co/datasets/([\w.\-]+/[\w.\-]+))?", source):
        hint = f"; {address[1]} is the id of a hub data set" if address[1] else ""
        raise FileNotFoundError(
            f"{source}: expected a file, a folder or an id of the hub, found an address; download the file first{hint}"
        )
    raise FileNotFoundError(f"{source}: expected a data file or a folder, found nothing at {path.absolute()}")


def _hub_place(source: str) -> str:
    return f"{source!r} (no such local file, so taken as a hub data set)"


def _looks_like_a_path(source: str) -> bool:
    named = file_kind(Path(source)) is not None or Path(source).suffix.lower() in _ENDINGS
    return named or source.startswith((os.sep, ".", "~")) or HUB_NAME.fullmatch(source) is None


def _load(reader: str, split: str, place: str, saved: bool = False, **options: Any) -> Any:
    """Return a Dataset, or with `streaming=True` an IterableDataset; `saved`: `save_to_disk` wrote it."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        if saved:
            loaded = datasets.load_from_disk(reader)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) and split in loaded else loaded
        else:
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
