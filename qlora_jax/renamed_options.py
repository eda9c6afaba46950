"""Options that have a new name. The command line, config files and records of earlier runs all use this one table.

A flag or a key with an old name is an error that gives the new name. The record of an earlier run (`options.json`) is not
edited by people: it is read with its old names replaced, so that the run can be resumed.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["RENAMED_OPTIONS", "replace_old_names"]

# Old name → new name, as written in a config file (with underscores). The name of a group of options may stand here too.
RENAMED_OPTIONS: dict[str, str] = {
    "quantize_tables": "embedding_storage",
}


def replace_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested option values with every old name replaced by the new one; a value under the new name has precedence."""
    renamed = {
        RENAMED_OPTIONS[name]: value
        for name, value in values.items()
        if name in RENAMED_OPTIONS and RENAMED_OPTIONS[name] not in values
    }
    current = {name: value for name, value in values.items() if name not in RENAMED_OPTIONS}
    return {
        name: replace_old_names(value) if isinstance(value, Mapping) else value
        for name, value in {**current, **renamed}.items()
    }
