"""The sections of the report by name, in the order in which they run."""

import importlib
from typing import Literal, get_args

from scripts.verification.checks import Check

Section = Literal["machine", "kernels", "attention", "packing", "smollm2", "8b", "65b", "decoding", "peers"]
SECTIONS: tuple[Section, ...] = get_args(Section)
_MODULES = {"smollm2": "training", "8b": "training", "65b": "training"}


def checks_of(section: Section, small: bool) -> list[Check]:
    """Return the checks of a section; its module is imported now, because most of them import JAX."""
    module = importlib.import_module(f"scripts.verification.{_MODULES.get(section, section)}")
    return module.checks_of(section, small) if section in _MODULES else module.checks(small)
