"""The folder of what is kept between runs: the default model, and the result of the trial of a kernel on a GPU.

$QLORA_JAX_CACHE, else $XDG_CACHE_HOME/qlora_jax, else ~/.cache/qlora_jax
"""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder, which need not exist."""
    if named := os.environ.get("QLORA_JAX_CACHE"):
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qlora_jax"
