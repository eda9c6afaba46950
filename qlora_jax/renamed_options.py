"""Options, and values of options, that have a new name. The command line, config files and records of earlier runs all use
these two tables.

A flag, a key or a value with an old name is an error that gives the new name. The record of an earlier run (`options.json`)
is not edited by people: it is read with its old names replaced, so that the run can be resumed.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["MEANT", "RENAMED_OPTIONS", "new_value", "replace_old_names"]

# Old name → new name, as written in a config file (with underscores). The name of a group of options may stand here too.
RENAMED_OPTIONS: dict[str, str] = {
    "quantize_tables": "embedding_storage",
}
# (option, old value) → new value
RENAMED_VALUES: dict[tuple[str, str], str] = {
    ("on_long", "truncate"): "cut",
}
# Options whose name means another option in other programs → the flag that is meant by a value that is none of theirs.
MEANT: dict[str, str] = {
    "template": "chat-template",
}


def new_value(option: str, value: Any) -> str | None:
    """Return the new name of a value of an option, both as written in a config file; None if it has none."""
    return RENAMED_VALUES.get((option, value)) if isinstance(value, str) else None


def replace_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested option values with every old name replaced by the new one; a value under the new name has precedence."""
    renamed = {
        RENAMED_OPTIONS[name]: value
        for name, value in values.items()
        if name in RENAMED_OPTIONS and RENAMED_OPTIONS[name] not in values
    }
    current = {name: value for name, value in values.items() if name not in RENAMED_OPTIONS}
    return {
        name: replace_old_names(value) if isinstance(value, Mapping) else new_value(name, value) or value
        for name, value in {**current, **renamed}.items()
    }
