"""The fields of a group of options whose declarations stand beside the methods or objectives that they belong to."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any

import tyro

from qlora_jax.peft import Option, by_name

__all__ = ["dataclass_fields"]


def dataclass_fields(options: Iterable[Option]) -> list[tuple[str, Any, Any]]:
    """Return the options as fields for `dataclasses.make_dataclass`, with their help texts for the command line."""
    return [
        (name, Annotated[option.type, tyro.conf.arg(help=option.help)], dataclasses.field(default=option.default))
        for name, option in by_name(options).items()
    ]
