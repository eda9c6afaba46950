"""The selection of the modules that get an adapter, by PEFT's rules (`check_target_module_exists` and `get_pattern_key` of
PEFT 0.21).

    target_modules        a list holds full names or their last parts; a string is a regular expression that has to match
                          the full name; "all-linear" selects every linear layer except the output head
    exclude_modules       the same two forms; an excluded module gets no adapter even if it is a target
    layers_to_transform   restricts the modules that a list's last parts select to those whose layer number is listed
    rank_pattern, …       the first regular expression that matches the end of the name, from a dot on, applies

PEFT ignores an entry that selects nothing. Here it is an error, because a misspelt name would silently leave a layer
untrained; except in the configuration of an adapter that exists (`from_files`), whose tensors say what it adapts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from qlora_jax.errors import OptionError
from qlora_jax.peft.method import EMBEDDING_KEYS
from qlora_jax.peft.patterns import END, LAYER, match_name

ALL_LINEAR = "all-linear"


class Targets(Protocol):
    """The fields of a method that select linear modules, by PEFT's names; `lora.LoRA` describes each of them."""

    @property
    def target_modules(self) -> str | tuple[str, ...]: ...
    @property
    def exclude_modules(self) -> str | tuple[str, ...]: ...
    @property
    def layers_to_transform(self) -> tuple[int, ...]: ...
    @property
    def layers_pattern(self) -> tuple[str, ...]: ...
    @property
    def from_files(self) -> bool: ...


def name_matches(names: Sequence[str], module: str) -> bool:
    """Return whether a list of names holds the module's full name or last parts of it."""
    return any(module == name or module.endswith("." + name) for name in names)


def module_matches(targets: Targets, module: str) -> bool:
    """Return whether the linear module with this full name, e.g. "model.layers.0.self_attn.q_proj", gets an adapter."""
    excluded = targets.exclude_modules
    if match_name(excluded, module) if isinstance(excluded, str) else name_matches(excluded, module):
        return False
    wanted = targets.target_modules
    if wanted == ALL_LINEAR:
        return _is_transformed(targets, module)
    if isinstance(wanted, str):
        return match_name(wanted, module) is not None
    return module in wanted or (name_matches(wanted, module) and _is_transformed(targets, module))


def choose(targets: Targets, layers: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the full names of the modules that get an adapter.

    Args:
        targets: the selecting fields of a method.
        layers: see `Method.targets`. "all-linear" selects none of `EMBEDDING_KEYS`.

    Raises:
        OptionError: a name, a pattern or a layer number selects nothing.
    """
    names, kind = [name for stacked in layers.values() for name in stacked], type(targets).__name__
    linear = {name for key, stacked in layers.items() if key not in EMBEDDING_KEYS for name in stacked}
    wanted = linear if targets.target_modules == ALL_LINEAR else names
    chosen = {name for name in wanted if module_matches(targets, name)}
    if targets.from_files:
        return chosen

    def check(field: str, entries: str | tuple[str, ...]) -> None:
        if entries == ALL_LINEAR:
            return
        for entry in [entries] if isinstance(entries, str) else entries:
            if not any(match_name(entry, n) if isinstance(entries, str) else name_matches([entry], n) for n in names):
                raise OptionError(f"{kind} {field} {entry!r} matches no linear layer; {known_names(layers)}")

    check("target", targets.target_modules)
    check("exclude_modules", targets.exclude_modules)
    numbers = {_layer_number(targets, name) for name in chosen}
    if absent := sorted(set(targets.layers_to_transform) - numbers):
        raise OptionError(f"{kind} layers_to_transform: no linear layer among the targets is in layer {absent[0]}")
    if not chosen:
        raise OptionError(
            f"{kind} exclude_modules {targets.exclude_modules!r}: nothing is left of {targets.target_modules!r}"
        )
    return chosen


def known_names(layers: Mapping[str, Sequence[str]]) -> str:
    """Return a list of the linear modules that the model has, for error messages."""
    names = {name.rsplit(".", 1)[-1] for stacked in layers.values() for name in stacked}
    return "their names end in: " + ", ".join(sorted(names))


def pattern_matches(pattern: str, module: str) -> bool:
    """Return whether an entry of rank_pattern or alpha_pattern applies to the module with this full name."""
    return match_name(pattern, module, END) is not None


def _is_transformed(targets: Targets, module: str) -> bool:
    return not targets.layers_to_transform or _layer_number(targets, module) in targets.layers_to_transform


def _layer_number(targets: Targets, module: str) -> int | None:
    """Return the layer number in a module's name: the first number after the name of a list of layers, or None."""
    for pattern in targets.layers_pattern:
        if match := match_name(pattern, module, LAYER):
            return int(match["number"])
    if not targets.layers_pattern and (match := re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", module)):
        return int(match["number"])
    return None


def renamed_targets(targets: Targets, modules: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the targets that select by our names of modules what `targets` selects by the names in an adapter's files.

    Args:
        modules: our names by those of the files; see `Method.renamed`.

    Returns:
        full names; None where `targets` selects the same by our names.
    """
    wanted = [ours for theirs, ours in modules.items() if module_matches(targets, theirs) or module_matches(targets, ours)]
    return None if all(module_matches(targets, ours) for ours in wanted) else tuple(wanted)
