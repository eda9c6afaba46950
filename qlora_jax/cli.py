"""Command lines from dataclasses: a TOML file gives values, flags on the command line overrule them.

    python scripts/train.py --config run.toml --learning-rate 1e-4

A config file has one table for each group of the options, with the names of their fields. A table, a key or a type that the
options do not have is an error that names the file and the nearest name: a misspelt key must not be swallowed and a run of
days go on with a default.
"""

import dataclasses
import difflib
import sys
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")


def parse(options: type[T], *, description: str | None, arguments: Sequence[str] | None = None) -> T:
    """The options of a command line, with the values of `--config FILE` (TOML) as defaults where one is given.

    Raises:
        ValueError: the config file is missing, is no TOML, or has keys or types that the options do not have.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config, arguments = _take_config(arguments)
    default = options() if config is None else from_toml(options, config)
    # tyro makes a flag of each key of a default that is a mapping, and none of the mapping itself.
    arguments = _with_values(arguments, _open_switches(options))
    described = f"{description}\n\n--config FILE.toml sets any of these options; flags overrule it."
    parsed = tyro.cli(
        Annotated[options, tyro.conf.OmitArgPrefixes],  # type: ignore[valid-type]
        args=arguments,
        default=_emptied(default),
        description=described,
    )
    return _refilled(parsed, default)


def _emptied(options: Any) -> Any:
    """The options without what their mappings hold."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    changed = {
        name: _emptied(value) if dataclasses.is_dataclass(value) else {}
        for name, value in values.items()
        if dataclasses.is_dataclass(value) or isinstance(value, dict)
    }
    return dataclasses.replace(options, **changed)


def _refilled(options: Any, default: Any) -> Any:
    """The options with the mappings of `default` where they have none."""
    changed = {}
    for field in dataclasses.fields(options):
        value, before = getattr(options, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = _refilled(value, before)
        elif value == {}:
            changed[field.name] = before
    return dataclasses.replace(options, **changed)


def run(main: Callable[[T], Any], options: type[T], description: str | None) -> None:
    """Parses, calls, and turns what bad input raises into one line on stderr and exit code 1."""
    try:
        main(parse(options, description=description))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        sys.exit(130)


def from_toml(options: type[T], path: Path) -> T:
    """An instance of the dataclass from a TOML file; see `parse` for what it raises."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"config file {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path}: expected UTF-8, found {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config file {path}: not valid TOML: {error}") from error
    problems: list[str] = []
    result = _build(options, values, "", problems)
    if problems:
        raise ValueError(f"config file {path}: " + "; ".join(problems))
    return result


def to_dict(options: Any) -> dict[str, Any]:
    """The options as nested plain values, for a record that JSON can hold."""
    return _plain(dataclasses.asdict(options))


def _open_switches(options: type[Any]) -> set[str]:
    """The flags whose value is yes, no, or left open."""
    flags: set[str] = set()
    for name, hint in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            flags |= _open_switches(hint)
        elif set(typing.get_args(hint)) == {bool, type(None)}:
            flags.add(name.replace("_", "-"))
    return flags


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """`--x` and `--no-x` of switches that may be left open as `--x=True` and `--x=False`: tyro wants a value."""
    spelled = {f"--{name}": f"--{name}=True" for name in switches} | {f"--no-{name}": f"--{name}=False" for name in switches}
    pairs = zip(arguments, [*arguments[1:], "--"], strict=False)
    return [spelled.get(a, a) if following.startswith("-") else a for a, following in pairs]


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    config, rest = None, []
    queue = iter(arguments)
    for argument in queue:
        name, _, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        value = value or next(queue, "")
        if not value or config is not None:
            raise ValueError("--config: expected one file, found " + ("none" if not value else "two"))
        config = Path(value)
    return config, rest


def _build(options: type[Any], values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """An instance of `options`; what does not fit is added to `problems`."""
    hints = typing.get_type_hints(options)
    names = {name.replace("-", "_"): name for name in values}
    chosen: dict[str, Any] = {}
    for field, name in names.items():
        if twice := [other for other in values if other != name and other.replace("-", "_") == field]:
            problems.append(f"{prefix}{name}: given twice, also as {prefix}{twice[0]}")
    for field, name in names.items():
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
                problems.append(f"{prefix}{name}: expected a table, found {value!r}")
        elif not _fits(value, hint):
            problems.append(f"{prefix}{name}: expected {_name(hint)}, found {value!r}")
        else:
            chosen[field] = _convert(value, hint)
    try:
        return options(**chosen)
    except ValueError as error:
        problems.append(str(error))
        return options()


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


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value
