"""Train the adapters of many tenants at once over one frozen base.

python scripts/train_many.py TENANTS.toml

Each tenant has a folder like a run of its own; docs/tenants.md describes the file.
"""

from collections.abc import Sequence

from qlora_jax import cli
from qlora_jax.finetune.tenants import ManyOptions as Options
from qlora_jax.finetune.tenants import train_many

__all__ = ["Options", "main"]


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(_run, Options, __doc__, arguments, program=program, saved=_saved)


def _run(options: Options) -> None:
    train_many(options)


def _saved(options: Options) -> str:
    return "each tenant goes on from its own last checkpoint with the same command"
