"""The fields of a group of options whose declarations stand beside the methods or objectives that they belong to."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import tyro

from qlora_jax.peft import Option, by_name

__all__ = ["dataclass_fields"]


def dataclass_fields(owners: Mapping[str, Iterable[Option]]) -> list[tuple[str, Any, Any]]:
    """Return the options of all owners as fields for `dataclasses.make_dataclass`, with the help texts of the command line.

    Args:
        owners: the options of each owner by the owner's name, such as "ia3".
    """
    return [
        (name, Annotated[option.type, tyro.conf.arg(help=option.help)], dataclasses.field(default=option.default))
        for name, option in by_name(owners).items()
    ]
