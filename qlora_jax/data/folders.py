"""The files of a folder of data, by the split that their names tell.

Names of files and of folders tell the split, as on the hub: `test.csv`, `data/validation-00000-of-00001.parquet`. If none is
for training by its name, those whose names tell nothing are. A folder that describes its own splits (`configs` in README.md)
and one that `save_to_disk` wrote are left to `datasets`.
"""

import re
from pathlib import Path

from qlora_jax.data.files import EXTENSIONS, file_kind
from qlora_jax.errors import DataError

__all__ = ["is_described", "is_saved", "splits_of_folder"]

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files that describe a data set and are no data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def splits_of_folder(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return (the data files of each split, the files that are no data), both in the order of their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)]
    files = [path for path in files if path.name not in _DESCRIPTIONS]
    data = [path for path in files if file_kind(path) not in (None, ".txt")]
    data = data or [path for path in files if file_kind(path) == ".txt"]  # beside tables, a text describes them
    if not data:
        raise DataError(f"{folder}: expected a folder with files {', '.join(EXTENSIONS)}, found none")
    splits: dict[str, list[Path]] = {}
    for path in data:
        splits.setdefault(_split_of_file(path.relative_to(folder)), []).append(path)
    if "train" not in splits and "" in splits:
        splits["train"] = splits.pop("")
    others = splits.pop("", [])
    return splits, [*others, *(path for path in files if path not in data)]


def _split_of_file(path: Path) -> str:
    """Return the split that a name tells, the file's before those of its folders; an empty text if none does."""
    for part in reversed(path.parts):
        words = re.findall(r"[a-z]+", part.lower())
        for split, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return ""


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def is_described(folder: Path) -> bool:
    """Return whether a folder says itself which files belong to which split."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    return is_saved(folder) or (head.startswith("---") and re.search(r"^configs:", head, re.MULTILINE) is not None)
