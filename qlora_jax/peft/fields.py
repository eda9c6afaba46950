"""Reading the fields of PEFT's adapter_config.json; all problems are reported in one error.

A field that would change the mathematics in an unsupported way is an error. A field that the method does not know is an
error if it looks switched on: its value is true, or a non-empty object or list. Unknown numbers and strings are accepted,
because they only configure a feature that is switched off.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.errors import shortened
from qlora_jax.peft.method import FieldErrors

# Fields of every method that do not change the mathematics: descriptions of the run, and settings of PEFT itself.
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
    """Reader of the fields of one configuration.

    Attributes:
        problems: messages about the invalid fields found so far.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        read: frozenset[str],
        inert: frozenset[str] = frozenset(),
        expected: Mapping[str, tuple[object, ...]] | None = None,
    ) -> None:
        """Check the fields that the method will not read.

        Args:
            config: the parsed adapter_config.json.
            read: names of the fields that the method reads with `get`.
            inert: names of the fields that do not change the method's mathematics.
            expected: for each field that is not read, the only supported values.
        """
        self._config = config
        known, expected = read | inert | _INERT, expected or {}
        self.problems = [
            f"{name} = {json.dumps(value)[:80]} is not supported"
            for name, value in config.items()
            if name not in known and not _is_fine(value, expected.get(name))
        ]

    def get(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        """Return a field's value, or `default` if it is missing or null; record a problem unless `fits(value)`."""
        value = self._config.get(name)
        value = default if value is None else value
        if not fits(value):
            self.problems.append(f"{name}: expected {expected}, found {shortened(value)}")
        return value

    def check(self) -> None:
        """Raise FieldErrors if any problem was found."""
        if self.problems:
            raise FieldErrors(self.problems)


def _is_fine(value: object, expected: tuple[object, ...] | None) -> bool:
    if expected is not None:
        return any(value is allowed or (isinstance(allowed, str) and value == allowed) for allowed in expected)
    return value is not True and not (isinstance(value, dict | list) and value)


def as_names(value: str | list[str]) -> str | tuple[str, ...]:
    """Return a JSON list of names as a tuple, and a regular expression unchanged."""
    return value if isinstance(value, str) else tuple(value)


def as_list(value: str | tuple[str, ...]) -> str | list[str] | None:
    """Return names as PEFT writes them to JSON: a list, None instead of an empty list, or one regular expression."""
    return value if isinstance(value, str) else list(value) or None


def is_whole(value: Any) -> bool:
    return type(value) is int


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def is_names(value: Any) -> bool:
    return isinstance(value, str) or is_list(value, lambda name: isinstance(name, str))


def is_mapping(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def is_token_indices(value: Any) -> bool:
    return is_list(value, is_whole) or is_mapping(value, lambda tokens: is_list(tokens, is_whole))
