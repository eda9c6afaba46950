"""JAX's cache of compiled programs on disk, on by default for runs: a run that is started again compiles nothing anew.

    <cache folder>/compiled        at most 2 GiB; the programs that were not used for the longest time are deleted first

JAX runs the programs that it reads there. Therefore the folder is made so that only its owner can write to it. A user who
names another folder with JAX_COMPILATION_CACHE_DIR, or switches the cache off with JAX_ENABLE_COMPILATION_CACHE=false, has
the last word.
"""

import logging
import os
from typing import Any

import jax

from qlora_jax.cache_folder import cache_folder

__all__ = ["keep_compiled_programs"]

MOST_BYTES = 2 * 2**30
LEAST_SECONDS = 0.2  # programs that compile faster are not kept
_JAX_LEAST_SECONDS = 1.0  # JAX's own default
_logger = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs on disk from now on, in this process, unless the user has decided otherwise."""
    config: Any = jax.config  # its attributes are not declared
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        _logger.info("Compiled programs are not kept for the next run: %s.", error)
        return
    config.update("jax_compilation_cache_dir", str(folder))
    if config.jax_compilation_cache_max_size == -1:
        config.update("jax_compilation_cache_max_size", MOST_BYTES)
    if config.jax_persistent_cache_min_compile_time_secs == _JAX_LEAST_SECONDS:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
