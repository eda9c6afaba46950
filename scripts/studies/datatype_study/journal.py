"""The journal of a study: a file of JSON lines with the finished cells. The first line describes the study.

A line is written as soon as its cell is finished; a study that is continued skips the cells in the journal. It is an error
to continue a study with another model, other texts or another dtype.
"""

import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError


class Journal:
    """The cells of a study by their keys.

    Attributes:
        rows: the results of the finished cells.
        found: how many of them an earlier run measured.
    """

    def __init__(self, path: Path, study: dict[str, Any]) -> None:
        """Open the file, or create it.

        Raises:
            OptionError: the file contains another study, or is not a journal.
        """
        study = json.loads(json.dumps(study))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1]]  # without an incomplete last line
            before = lines[0]["study"] if lines else study
            self.rows: dict[str, Any] = {line["key"]: line["row"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path}: expected the JSON lines of a study, found {error!r}") from error
        changed = [name for name in {**study, **before} if study.get(name) != before.get(name)]
        if changed:
            name = changed[0]
            raise OptionError(
                f"{path}: expected the study that was begun there, with {name} {before.get(name)!r}, found "
                f"{study.get(name)!r}; --output names another folder"
            )
        self.found = len(self.rows)
        temporary = path.with_name(f".{path.name}.writing")
        lines = [{"study": study}, *({"key": key, "row": row} for key, row in self.rows.items())]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)
        self._path = path

    def add(self, key: str, row: Any) -> None:
        """Add a finished cell."""
        self.rows[key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row}) + "\n")
