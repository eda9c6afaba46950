"""Which steps a run lowers, and where: JAX's own log tells."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

BOTH_PRECOMPILED = [("jit(step)", True), ("jit(train_step)", True)]  # the evaluation's, which comes first, and training's


@contextmanager
def steps_lowered() -> Iterator[list[tuple[str, bool]]]:
    """(name of a step, whether the thread that precompiles lowered it) of what runs within, in order."""
    found: list[tuple[str, bool]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            for name, _ in BOTH_PRECOMPILED:
                if text.startswith(f"Compiling {name}"):
                    found.append((name, threading.current_thread().name.startswith("compile")))

    listener = Listener()
    logging.getLogger("jax").addHandler(listener)
    jax.config.update("jax_log_compiles", True)  # of all threads, which `jax.log_compiles` is not
    try:
        yield found
    finally:
        jax.config.update("jax_log_compiles", False)
        logging.getLogger("jax").removeHandler(listener)
