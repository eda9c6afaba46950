"""The folder of what is kept between runs: the default model, and the result of the trial of a kernel on a GPU.

$QLORA_JAX_CACHE, else $XDG_CACHE_HOME/qlora_jax, else ~/.cache/qlora_jax

A user without a home folder (no HOME, and no entry of the user in the system's list, as with a container's `--user 12345`)
must name the folder. `Path.home` and `Path.expanduser` raise a RuntimeError there, and for "~name" of an unknown user;
`os.path.expanduser` returns such a path as it is, so all code of the package that expands a path calls that.
"""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder, which need not exist.

    Raises:
        FileNotFoundError: no variable names it and the user has no home folder.
    """
    if named := os.environ.get("QLORA_JAX_CACHE"):
        return Path(os.path.expanduser(named))
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "qlora_jax"
    home = os.path.expanduser("~")
    if home == "~":
        raise FileNotFoundError(
            "cache folder: expected QLORA_JAX_CACHE to name a folder, because this user has no home folder (HOME is not set)"
        )
    return Path(home) / ".cache" / "qlora_jax"
