"""Reads the JSON files of models and adapters: an object, or one error that says what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import CheckpointError

__all__ = ["parse_json_object", "read_json_object"]

MAX_BYTES = 100_000_000  # the index of the largest models has a few megabytes


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no file of text, too large, or no JSON object.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path.name}: is malformed: expected a JSON object, found no regular file.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path.name}: is malformed: expected at most {MAX_BYTES:,} bytes, found {path.stat().st_size:,}."
            )
        return parse_json_object(path.read_bytes())
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        if isinstance(error, CheckpointError) and str(error).startswith(path.name):
            raise
        raise CheckpointError(f"{path.name}: is malformed: expected a JSON object, found {error}.") from error


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object of a text.

    Raises:
        CheckpointError: the text is no JSON, too deep, or another value than an object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError("JSON that is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"other text: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a {type(value).__name__}")
    return value
