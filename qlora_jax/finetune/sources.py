"""Finds a data file that does not exist before any other is read and tokenized."""

import os
from pathlib import Path

from qlora_jax.data import NAMED
from qlora_jax.finetune.options.data import DataOptions

__all__ = ["check_sources"]

_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".arrow"))


def check_sources(data: DataOptions) -> None:
    """Raise FileNotFoundError where `data` or `eval_data` names a file or folder that does not exist.

    A name that may be the id of a data set on the hub is left to the reader of the data.
    """
    for source in (*data.sources, *([] if data.eval_data is None else [data.eval_data])):
        path = Path(source).expanduser()
        is_path = source.startswith((os.sep, ".", "~")) or source.count("/") > 1 or path.suffix.lower() in _SUFFIXES
        if is_path and source not in NAMED and not path.exists():
            raise FileNotFoundError(f"{source}: expected a data file or a folder, found nothing at {path.absolute()}")
