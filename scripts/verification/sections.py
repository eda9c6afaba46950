"""The sections of the report by name, in the order in which they run."""

import importlib
from typing import Literal, get_args

from scripts.verification.checks import Check

Section = Literal["machine", "kernels", "attention", "packing", "smollm2", "8b", "65b", "decoding", "peers"]
SECTIONS: tuple[Section, ...] = get_args(Section)
# The most that a section may take of all the time, so that one that compiles for long leaves some to those after it.
SHARES: dict[Section, float] = {
    "machine": 0.2,
    "kernels": 0.3,
    "attention": 0.2,
    "packing": 0.15,
    "smollm2": 0.25,
    "8b": 0.35,
    "65b": 0.35,
    "decoding": 0.3,
    "peers": 0.5,
}
_MODULES = {"smollm2": "training", "8b": "training", "65b": "training"}


def checks_of(section: Section, small: bool) -> list[Check]:
    """Return the checks of a section; its module is imported now, because most of them import JAX."""
    module = importlib.import_module(f"scripts.verification.{_MODULES.get(section, section)}")
    return module.checks_of(section, small) if section in _MODULES else module.checks(small)
