"""The messages of a run: standard logging, which `finetune` shows on stderr as plain lines.

Every module of a run logs at the level INFO, to a logger below `qlora_jax`. `prepare`, `train` and `finish` do not write to
stderr themselves. Of several processes, process 0 shows all messages, and the others show warnings. If a program has its own
handler of the logger `qlora_jax`, all messages go there and none to stderr.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_jax.nn import is_main

__all__ = ["messages_on_stderr"]


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Show the messages of the package on stderr, unless the program has a handler for them already."""
    logger = logging.getLogger("qlora_jax")
    if logger.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main() else logging.WARNING)
    logger.propagate = False  # a handler of the root logger would show every message once more
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
