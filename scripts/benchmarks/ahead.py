"""What the scripts share that compile for a device which is not there. To be imported before JAX.

A plan runs nothing on a device: one that is attached stays free, and without one JAX loads its compiler only so. libtpu
would ask a metadata server what machine this is, and lets one process at a time have the chip.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import tyro

from qlora_jax.models import ModelConfig, family_of
from qlora_jax.plan import SIZES, CompilerMissing, CompilerRefuses


def main_of(arguments: type[Any], run: Callable[[Any], None], description: str | None) -> int:
    """Parses the command line, runs, and tells an error in one line; the exit status."""
    parsed = tyro.cli(arguments, description=description)
    try:
        run(parsed)
    except (CompilerMissing, CompilerRefuses, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError where a name is none of those that are known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: expected some of {', '.join(known)}, found {name}")


def config_of(size: str) -> ModelConfig:
    """The config of a model by the name of its size."""
    return family_of(SIZES[size]).config(SIZES[size])
