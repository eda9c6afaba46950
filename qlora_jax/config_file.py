"""Dataclasses of options from TOML: one table for each group of options, with the names of their fields.

A table, a key or a type that the options do not have is an error that names the file and the most similar name: a run of
several days must not start with a default because a key was misspelt. An option that was renamed is an error that gives its
new name.
"""

import dataclasses
import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

import tyro

from qlora_jax.errors import OptionError, shortened
from qlora_jax.renamed_options import RENAMED_OPTIONS, new_value

__all__ = ["from_toml", "from_values", "is_required", "read_toml"]

T = TypeVar("T")


def from_toml(options: type[T], path: Path) -> T:
    """Return an instance of the dataclass from a TOML file; see `read_toml` and `from_values` for the errors."""
    return from_values(options, read_toml(path), f"config file {path}")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        OptionError: the file is missing or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptionError(f"config file {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"config file {path}: expected UTF-8, found {error}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
        raise OptionError(f"config file {path}: not valid TOML: {error}") from error


def from_values(options: type[T], values: dict[str, Any], place: str) -> T:
    """Return an instance of the dataclass from tables of values, as TOML gives them.

    Args:
        place: what the values are from, for the message.

    Raises:
        OptionError: values that do not fit, all of them in one message.
    """
    problems: list[str] = []
    result = _build(options, values, "", problems)
    if problems:
        raise OptionError(f"{place}: " + "; ".join(problems))
    return result


def _build(options: type[Any], values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """Return an instance of `options`; add a message to `problems` for each value that does not fit."""
    hints = typing.get_type_hints(options)
    names = {name.replace("-", "_"): name for name in values}
    chosen: dict[str, Any] = {}
    for field, name in names.items():
        if twice := [other for other in values if other != name and other.replace("-", "_") == field]:
            problems.append(f"{prefix}{name}: given twice, also as {prefix}{twice[0]}")
    for field, name in names.items():
        if RENAMED_OPTIONS.get(field) in hints and field not in hints:
            problems.append(f"{prefix}{name}: was renamed to {prefix}{RENAMED_OPTIONS[field]}")
            continue
        if field not in hints:
            near = difflib.get_close_matches(field, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            problems.append(f"unknown key {prefix}{name}{hint}")
            continue
        value, hint = values[name], hints[field]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if isinstance(value, dict):
                chosen[field] = _build(hint, value, f"{prefix}{field}.", problems)
            else:
                problems.append(f"{prefix}{name}: expected a table, found {shortened(value)}")
        elif (changed := new_value(field, value)) is not None:
            problems.append(f"{prefix}{name}: {value} was renamed to {changed}")
        elif not _fits(value, hint):
            problems.append(f"{prefix}{name}: expected {_name(hint)}, found {shortened(value)}")
        else:
            chosen[field] = _convert(value, hint)
    required = {field.name: tyro.MISSING_NONPROP for field in dataclasses.fields(options) if is_required(field)}
    try:
        return options(**required | chosen)  # flags may give what the file leaves open
    except ValueError as error:
        problems.append(str(error))
        return options(**required)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field of options has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[-1]) for item in value.values())
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return isinstance(hint, type) and isinstance(value, hint)


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    inner = typing.get_args(hint) or (hint,)
    if isinstance(value, dict):
        return {name: _convert(item, inner[-1]) for name, item in value.items()}
    if isinstance(value, str) and Path in inner:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in inner and int not in inner:
        return float(value)
    return value


def _name(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple:
        return f"a list of {_name(inner[0])}"
    if origin is dict:
        return f"a table of {_name(inner[-1])}"
    return getattr(hint, "__name__", str(hint))
