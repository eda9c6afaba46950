"""One option of the command line, declared beside the method or the objective that it belongs to.

`finetune/options/` makes the flags and the keys of TOML files from these declarations.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Option", "by_name", "option_problems"]


def _anything(value: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Option:
    """An option and what its value may be.

    Attributes:
        name: the key in a TOML file; the flag is the same with dashes.
        type: the type of its value, as in an annotation of a dataclass field.
        default: the value of an option that is not given.
        help: the text that `--help` shows.
        fits: whether a given value is allowed.
        expected: the allowed values in words, for the error message.
    """

    name: str
    type: Any
    default: Any
    help: str
    fits: Callable[[Any], bool] = _anything
    expected: str = ""

    def is_given(self, values: Mapping[str, Any]) -> bool:
        """Return whether the value differs from the default."""
        return values[self.name] != self.default


def by_name(owners: Mapping[str, Iterable[Option]]) -> dict[str, Option]:
    """Return the options of all owners by name; several owners may share one option.

    Args:
        owners: the options of each owner by the owner's name, such as "ia3".

    Raises:
        TypeError: two different options have the same name.
    """
    found: dict[str, tuple[str, Option]] = {}
    for owner, options in owners.items():
        for option in options:
            first, known = found.setdefault(option.name, (owner, option))
            if known is not option:
                raise TypeError(
                    f"option {option.name}: expected one declaration, which its owners share, found one of {first} and "
                    f"one of {owner}"
                )
    return {name: option for name, (_, option) in found.items()}


def option_problems(values: Mapping[str, Any], owners: Mapping[str, Iterable[Option]], chosen: str, kind: str) -> list[str]:
    """Return what is wrong with the options that were given: those of another owner, and values that are not allowed.

    Args:
        values: the value of every option by its name.
        owners: the options of each owner by the owner's name, such as "ia3".
        chosen: the name of the owner whose options may be given.
        kind: what an owner is called in messages, such as "method".
    """
    problems = []
    for name, option in by_name(owners).items():
        if not option.is_given(values):
            continue
        mine = [owner for owner, options in owners.items() if option in options]
        if chosen not in mine:
            others = ", ".join(mine)
            problems.append(f"{name}: expected none with {kind} {chosen}, found {values[name]!r}; it is for {others}")
        elif not option.fits(values[name]):
            problems.append(f"{name}: expected {option.expected}, found {values[name]}")
    return problems
