"""Reads tokenizer.json with the tokenizers library, whatever the file holds.

The library raises plain exceptions, or a class of its own where its code fails, and prints a traceback then. It makes lists
as long as the largest id of a token, and a regular expression may backtrack without end.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qlora_jax.errors import CheckpointError, shortened

__all__ = ["guarded", "read_backend"]

PROBES = [f"{repeated * 60}{end}" for repeated in ("a", " ", "1", "aA", "\n", "a ") for end in ("!", "\u00e9")]
MOST_TOKENS = 2**24  # as many as an embedding may have rows (models/bounds.py)
_LARGE = re.compile(rb'"\s*:\s*\d{8,}')  # a number that may be too large for an id; the file is parsed only if it has one


def read_backend(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder's tokenizer.json, tried on texts.

    Raises:
        CheckpointError: the file is damaged, or holds ids or regular expressions that take no end.
    """
    path = folder / "tokenizer.json"
    _check_ids(path)
    return guarded(folder, lambda: _tried(Tokenizer.from_file(str(path))))


def _check_ids(path: Path) -> None:
    text = path.read_bytes()
    if _LARGE.search(text) is None:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # the library says what is wrong
        return
    for index in _ids(values):
        if type(index) is int and index >= MOST_TOKENS:
            raise CheckpointError(f"{path}: expected ids of tokens below {MOST_TOKENS:,}, found {shortened(index)}.")


def _ids(values: Any) -> Iterator[Any]:
    """Yield the ids of a vocabulary and of the added tokens."""
    model, added = (values.get("model"), values.get("added_tokens")) if isinstance(values, dict) else (None, None)
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    yield from vocabulary.values() if isinstance(vocabulary, dict) else ()
    yield from (token.get("id") for token in added if isinstance(token, dict)) if isinstance(added, list) else ()


def guarded(folder: Path, read: Callable[[], Tokenizer]) -> Tokenizer:
    """Return what `read` returns; raise CheckpointError for whatever the tokenizers library raises for a damaged file."""
    try:
        return read()
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise _unreadable(folder, error) from error
    except BaseException as error:  # or, where its own code fails, a class of its own that is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise _unreadable(folder, error) from error


def _tried(backend: Tokenizer) -> Tokenizer:
    """Return the tokenizer after texts on which a regular expression that backtracks without end fails.

    Padding and truncation belong to a call, as in transformers: a file may have those of its last one, of any length.
    """
    backend.no_padding()
    backend.no_truncation()
    with _silent():
        backend.encode_batch(PROBES, add_special_tokens=False)
    return backend


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to stderr in the block: where its own code fails, the library prints a traceback of it."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    text = (str(error).strip().splitlines() or ["no reason given"])[0]
    return CheckpointError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {text[:300]}")
