"""Command lines from dataclasses: a TOML file gives values, and flags on the command line have precedence over it.

    python scripts/train.py --config run.toml --learning-rate 1e-4

`config_file` reads the file. An option that was renamed is an error that gives its new name.

`run` is the one way from a command line to an exit code, for every command and every program of scripts/.
"""

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from qlora_jax.config_file import from_toml, is_required
from qlora_jax.errors import OptionError
from qlora_jax.interrupts import Interrupts
from qlora_jax.renamed_options import MEANT, RENAMED_OPTIONS, new_value

__all__ = ["parse", "run", "to_dict"]

T = TypeVar("T")


def run(
    main: Callable[[T], object],
    options: type[T],
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    program: str | None = None,
    saved: Callable[[T], str] | None = None,
) -> int:
    """Parse a command line, call `main` with the options and return the exit code.

    The exit code is what `main` returns where that is an integer, else 0. A ValueError (all errors of the package
    are), an OSError or a failed process becomes one line on stderr and exit code 1. Ctrl-C becomes exit code 130 and SIGTERM
    143, whatever error a library makes of them.

    Args:
        main: takes an instance of `options`.
        description: text at the head of the help.
        arguments: the command line without the name of the program; `sys.argv` if None.
        program: name of the program in its help; taken from `sys.argv` if None.
        saved: returns what of the command's work is saved, for the message of an interruption. The command then ends at
            once, except in blocks of `interrupts`; otherwise KeyboardInterrupt is raised in it.
    """
    with Interrupts() as interrupts:
        try:
            try:
                parsed = parse(options, description=description, arguments=arguments, program=program)
                if saved is not None:
                    interrupts.describe, interrupts.at_once = partial(saved, parsed), True
                result = main(parsed)
            except (ValueError, OSError, subprocess.SubprocessError) as error:
                if interrupts.received is not None:
                    raise
                print(f"error: {error}", file=sys.stderr)
                return 1
        except BaseException as error:
            if interrupts.received is None and not isinstance(error, KeyboardInterrupt):
                raise
            return interrupts.say(error)
    return result if isinstance(result, int) else 0


def parse(
    options: type[T],
    *,
    description: str | None,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
) -> T:
    """Return the options of a command line, with the values of `--config FILE` (TOML) as defaults where one is given.

    Raises:
        OptionError: the config file is missing, is not TOML, or has keys or types that the options do not have; or an
            option has a new name.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config, arguments = _split_config(arguments)
    _check_flags(options, arguments)
    arguments = _with_lists_added_up(arguments, _options_of(options))
    required = any(is_required(field) for field in dataclasses.fields(options))  # type: ignore[arg-type]
    default: Any = tyro.MISSING_NONPROP if required else options()
    if config is not None:
        default = from_toml(options, config)
    # tyro makes a flag of each key of a default that is a mapping, and none of the mapping itself.
    arguments = _with_values(arguments, _optional_switches(_options_of(options)))
    parsed = tyro.cli(
        Annotated[options, tyro.conf.OmitArgPrefixes],  # type: ignore[valid-type]
        prog=program,
        args=arguments,
        default=_without_mappings(default) if dataclasses.is_dataclass(default) else default,
        description=f"{description}\n\n--config FILE.toml sets any of these options; flags have precedence over it.",
    )
    return _with_mappings(parsed, default) if dataclasses.is_dataclass(default) else parsed


def _without_mappings(options: Any) -> Any:
    """Return the options with every mapping empty."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    changed = {
        name: _without_mappings(value) if dataclasses.is_dataclass(value) else {}
        for name, value in values.items()
        if dataclasses.is_dataclass(value) or isinstance(value, dict)
    }
    return dataclasses.replace(options, **changed)


def _with_mappings(options: Any, default: Any) -> Any:
    """Return the options with the mappings of `default` where their own are empty."""
    changed = {}
    for field in dataclasses.fields(options):
        value, before = getattr(options, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_mappings(value, before)
        elif value == {}:
            changed[field.name] = before
    return dataclasses.replace(options, **changed)


def to_dict(options: Any) -> dict[str, Any]:
    """Return the options as nested dictionaries and lists, which JSON can represent."""
    return _plain(dataclasses.asdict(options))


def _options_of(options: type[Any]) -> dict[str, Any]:
    """Return the types of all options by name, those of groups included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(options).items():
        found |= _options_of(hint) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else {name: hint}
    return found


def _check_flags(options: type[Any], arguments: Sequence[str]) -> None:
    """Raise OptionError for a flag, or a value after it, that was renamed, or a value that is none of its choices."""
    names = _options_of(options)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if not argument.startswith("--"):
            continue
        flag, equals, value = argument.partition("=")
        old = flag.removeprefix("--").replace("-", "_")
        value = value if equals else following
        if old in names and (changed := new_value(old, value)) is not None:
            raise OptionError(f"{flag} {value}: was renamed to {flag} {changed}")
        choices = typing.get_args(names[old]) if typing.get_origin(names.get(old)) is typing.Literal else ()
        if choices and value and not value.startswith("-") and value not in map(str, choices):
            hint = f"; did you mean --{MEANT[old]} {value}?" if old in MEANT else ""
            raise OptionError(f"{flag}: expected one of {', '.join(map(str, choices))}, found {value!r}{hint}")
        new = RENAMED_OPTIONS.get(old)
        if new in names and old not in names:
            raise OptionError(f"{flag}: was renamed to --{new.replace('_', '-')}")


def _with_lists_added_up(arguments: list[str], options: dict[str, Any]) -> list[str]:
    """Return the command line with the values of a list's repeated flag after its first one; tyro would use the last alone.

    Raises:
        OptionError: an option of one value is given more than once.
    """
    flags: list[list[str]] = [[]]  # what comes before the first flag, and then each flag with its values
    for argument in arguments:
        if argument.startswith("--"):
            flags.append([argument])
        else:
            flags[-1].append(argument)
    first: dict[str, list[str]] = {}
    for given in flags[1:]:
        flag = given[0].partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        name = name if name in options else name.removeprefix("no_")
        if name not in options:  # tyro has an error for it
            continue
        before = first.setdefault(name, given)
        if before is given:
            continue
        if not _is_list(options[name]):
            raise OptionError(f"{flag}: expected once, found twice: {' '.join(before)} and {' '.join(given)}")
        for one in (before, given):
            one[:1] = one[0].split("=", 1)
        before += given[1:]
        given.clear()
    return [argument for given in flags for argument in given]


def _is_list(hint: Any) -> bool:
    """Return whether an option takes several values."""
    return typing.get_origin(hint) in (tuple, list, dict) or any(map(_is_list, typing.get_args(hint)))


def _optional_switches(options: dict[str, Any]) -> set[str]:
    """Return the names of the flags whose value is yes, no or None."""
    return {name.replace("_", "-") for name, hint in options.items() if set(typing.get_args(hint)) == {bool, type(None)}}


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """Return the command line with `--x` and `--no-x` of these switches written as `--x=True` and `--x=False`.

    tyro expects a value after a switch that may be None.
    """
    spelled = {f"--{name}": f"--{name}=True" for name in switches} | {f"--no-{name}": f"--{name}=False" for name in switches}
    pairs = zip(arguments, [*arguments[1:], "--"], strict=False)
    return [spelled.get(a, a) if following.startswith("-") else a for a, following in pairs]


def _split_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return the value of `--config`, if any, and the rest of the command line."""
    config, rest = None, []
    queue = iter(arguments)
    for argument in queue:
        name, _, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        value = value or next(queue, "")
        if not value or config is not None:
            raise OptionError("--config: expected one file, found " + ("none" if not value else "two"))
        config = Path(value)
    return config, rest


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
