"""Train the adapters of many tenants at once over one frozen base.

python scripts/train_many.py TENANTS.toml

Each tenant has a folder like a run of its own; docs/tenants.md describes the file.
"""

from collections.abc import Sequence

from qlora_jax import cli
from qlora_jax.finetune.tenants import ManyOptions, train_many

__all__ = ["ManyOptions", "main"]


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(_run, ManyOptions, __doc__, arguments, program=program, saved=_saved)


def _run(options: ManyOptions) -> None:
    train_many(options)


def _saved(options: ManyOptions) -> str:
    return "each tenant goes on from its own last checkpoint with the same command"
