"""The errors that a user of the package can cause, and how their messages list names.

    QLoRAError           the base of all of them; a ValueError, so that callers who catch ValueError keep working
      OptionError        an option or an argument: unknown, out of range, or in contradiction with another
      DataError          a file or a row of training or evaluation data
      CheckpointError    the files of a base model, of an adapter or of a tokenizer
      UnsupportedError   a model architecture, a method or a device that is not supported here
      DoesNotFitError    a run that needs more memory than there is
      DivergedError      a loss or a gradient that is NaN or infinite
      HostError          another process of the same run that has failed or ended

Each message names the place, what was expected there and what was found.
"""

from collections.abc import Sequence
from typing import Self

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "DoesNotFitError",
    "HostError",
    "OptionError",
    "QLoRAError",
    "UnsupportedError",
    "failed_download",
    "list_names",
    "shortened",
]

_MAX_LISTED = 8  # how many names of one kind of problem a message spells out
_LONGEST_NAME = 300  # characters of each
# How files start that stand in the place of others after a download that failed.
_FAILED_DOWNLOADS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself, for example with git lfs pull",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


class QLoRAError(ValueError):
    """An error that the user's input caused."""

    @classmethod
    def of(cls, place: object, problems: Sequence[str]) -> Self:
        """Return one error that lists all problems found at a place, so that a file is corrected once."""
        if len(problems) == 1:
            return cls(f"{place}: {problems[0]}")
        return cls(f"{place}: {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


class OptionError(QLoRAError):
    """An option or an argument is unknown, out of range, or contradicts another."""


class DataError(QLoRAError):
    """A file or a row of data is missing, damaged or of an unknown form."""


class CheckpointError(QLoRAError):
    """A checkpoint, an adapter or a tokenizer is missing, damaged or of an unsupported kind."""


class UnsupportedError(QLoRAError):
    """A model architecture, a method or a device is not supported."""


class DoesNotFitError(QLoRAError):
    """A run needs more memory than there is.

    Attributes:
        needed: the bytes that it needs; None where they are unknown.
    """

    def __init__(self, message: str, needed: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed


class DivergedError(QLoRAError):
    """The loss or the gradient became NaN or infinite."""


class HostError(QLoRAError):
    """Another process of the same run has failed or ended, or was started differently."""


def list_names(names: Sequence[str]) -> str:
    """Return the first names of a list and how many more there are, for a message."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…" for name in names[:_MAX_LISTED]]
    return ", ".join(shown) + more


def failed_download(start: bytes) -> str | None:
    """Return what a file is in place of its contents, by its first 40 bytes; None if it is no download that failed."""
    text = start.lstrip(b"\xef\xbb\xbf \r\n").lower()
    return next((found for first, found in _FAILED_DOWNLOADS.items() if text.startswith(first)), None)


def shortened(value: object, most: int = 60) -> str:
    """Return a value of a file as a message shows it, in at most so many characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "…"
