"""Reads the small files of a folder that somebody else made.

Only regular files are opened: a pipe would wait for ever, and a device has no end. A symbolic link stands for the file that
it names, as in the hub's cache. Whatever is wrong with a file is a CheckpointError of one line.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from qlora_jax.errors import CheckpointError, failed_download

__all__ = ["check_folder", "check_regular", "parse_object", "read_object", "read_text"]

# What is read of a folder; files of other kinds may be anything.
READ = {".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja", ".bin"}
MOST_BYTES = 1 << 26  # of a file of JSON or text that is read whole; the largest indexes have a fifth of it
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Raise CheckpointError where a path is a pipe, a socket or a device; links are followed, and a missing file is none."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # missing, or a name that no file can have
        return
    if kind is not None:
        raise CheckpointError(f"{path}: expected a regular file, found {kind}; copy its contents into a file first.")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError where a file of a folder that could be read is a pipe, a socket or a device."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READ:
            check_regular(path)


def read_text(path: Path) -> str | None:
    """Return the text of a file; None where there is none.

    Raises:
        CheckpointError: the file is no regular file, is not UTF-8, or is larger than any file of its kind.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path}: expected at most {MOST_BYTES:,} bytes, found {size:,}.")
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark before the text
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected UTF-8, found byte {error.object[error.start]:#04x} at {error.start}."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where there is no file.

    Raises:
        CheckpointError: see `read_text`; or the file holds no JSON object, or one that is nested too deeply.
    """
    text = read_text(path)
    try:
        return None if text is None else parse_object(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: is malformed: expected a JSON object, found {error}.") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a text.

    Raises:
        CheckpointError: the text is no JSON, too deep, or another value than an object. The message is what was found.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError("JSON that is nested too deeply") from None
    except ValueError as error:
        start = text[:40].encode() if isinstance(text, str) else text[:40]
        raise CheckpointError(failed_download(start) or f"other text: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a {type(value).__name__}")
    return value
