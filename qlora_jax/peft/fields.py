"""The fields of PEFT's adapter_config.json, read with all problems in one error.

A field that would change the mathematics in a way that is not supported here is an error. Of fields that a method does not
know, those that are switched on are suspected: true, or an object or list with something in it; numbers and strings are
settings of some switch that is off.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.peft.method import FieldErrors

# Of every method: records, and settings of PEFT itself.
_INERT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    )
)


class Fields:
    """Reads the fields of one configuration.

    Attributes:
        problems: what was wrong so far.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        read: frozenset[str],
        inert: frozenset[str] = frozenset(),
        expected: Mapping[str, tuple[object, ...]] | None = None,
    ) -> None:
        """
        Args:
            read: names of the fields that the method asks for.
            inert: names of fields of no consequence for it.
            expected: the values of fields that are supported at these alone.
        """
        self._config = config
        known, expected = read | inert | _INERT, expected or {}
        self.problems = [
            f"{name} = {json.dumps(value)[:80]} is not supported"
            for name, value in config.items()
            if name not in known and not _is_fine(value, expected.get(name))
        ]

    def get(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        """A field's value, or the default where it is missing or null."""
        value = self._config.get(name)
        value = default if value is None else value
        if not fits(value):
            self.problems.append(f"{name}: expected {expected}, found {value!r}")
        return value

    def check(self) -> None:
        """Raises FieldErrors where something was wrong."""
        if self.problems:
            raise FieldErrors(self.problems)


def _is_fine(value: object, expected: tuple[object, ...] | None) -> bool:
    if expected is not None:
        return any(value is allowed or (isinstance(allowed, str) and value == allowed) for allowed in expected)
    return value is not True and not (isinstance(value, dict | list) and value)


def as_names(value: str | list[str]) -> str | tuple[str, ...]:
    """Names, or a regular expression, as methods hold them."""
    return value if isinstance(value, str) else tuple(value)


def as_list(value: str | tuple[str, ...]) -> str | list[str] | None:
    """The same as PEFT writes them."""
    return value if isinstance(value, str) else list(value) or None


def is_whole(value: Any) -> bool:
    return type(value) is int


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def is_names(value: Any) -> bool:
    return isinstance(value, str) or is_list(value, lambda name: isinstance(name, str))


def is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def is_rows(value: Any) -> bool:
    return is_list(value, is_whole) or is_table(value, lambda tokens: is_list(tokens, is_whole))
