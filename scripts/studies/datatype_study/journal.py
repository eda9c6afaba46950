"""What a study has measured so far: a file of JSON lines, the first of which says what is studied.

A line is written and flushed as soon as its cell is done; a study that is started again skips the cells that it finds. One
of another model, of other texts or in another dtype is not mixed with it: that is an error.
"""

import json
from pathlib import Path
from typing import Any


class Journal:
    """The cells of a study by their keys.

    Attributes:
        rows: what has been measured.
        found: how many of them an earlier run measured.
    """

    def __init__(self, path: Path, study: dict[str, Any]) -> None:
        """Opens the file, or starts it.

        Raises:
            ValueError: it holds another study, or is no such file.
        """
        study = json.loads(json.dumps(study))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1]]  # without what a kill may have left of a last line
            before = lines[0]["study"] if lines else study
            self.rows: dict[str, Any] = {line["key"]: line["row"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the JSON lines of a study, found {error!r}") from error
        changed = [name for name in {**study, **before} if study.get(name) != before.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
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
        """Keeps a cell."""
        self.rows[key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row}) + "\n")
