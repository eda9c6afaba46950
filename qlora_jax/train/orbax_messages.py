"""What Orbax and its threads print about errors that are raised, and told, elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["without_messages"]


@contextmanager
def without_messages() -> Iterator[None]:
    """Drop what Orbax logs in the block: tracebacks of its threads, whose error is raised in it, and advice on saving less.

    After an error, threads of its library in C++ find the event loop of the block closed, and print that, and asyncio prints
    the errors of the other writes of the same checkpoint. They may do so at any later time, so that these messages are
    dropped until the process ends.
    """
    logger = logging.getLogger("absl")

    def drop(record: logging.LogRecord) -> bool:
        advice = record.getMessage().startswith("Waiting for previous save")
        return record.exc_info is None and record.levelno < logging.ERROR and not advice

    before = sys.unraisablehook
    logger.addFilter(drop)
    sys.unraisablehook = partial(_hook, before)
    try:
        yield
        sys.unraisablehook = before
    except BaseException:
        logging.getLogger("asyncio").addFilter(_is_of_others)
        raise
    finally:
        logger.removeFilter(drop)


def _hook(before: Callable[[Any], object], unraisable: Any) -> None:
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        before(unraisable)


def _is_of_others(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "orbax" in message)
