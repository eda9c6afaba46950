"""The options of many runs: a TOML file with the options of all tenants, and a table for each tenant with its own.

    output = "runs/tenants"           each tenant has a folder in it
    [model]                           any option of train.py, for all tenants
    model = "meta-llama/Llama-3.1-8B"
    [tenants.alice.data]              and for one of them
    data = "alice.jsonl"

A tenant's run is an ordinary `Options`, so that every option means what it means for train.py. What tenants cannot have of
their own, or not yet, is an error that names the tenant and the option.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from qlora_jax.config_file import from_values, read_toml
from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.health import HealthOptions
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.options.reporting import WatchOptions
from qlora_jax.finetune.tenants.rounds import ARRAYS
from qlora_jax.peft.bank import check_held

__all__ = ["ManyOptions", "TenantsFile", "read_tenants", "tenant_problems"]

_ANY_RANK = 1 << 30  # the bank takes the largest rank of its tenants
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class ManyOptions:
    """Train the adapters of many tenants at once over one frozen base."""

    tenants: tyro.conf.Positional[Path] = Path("TENANTS.toml")
    """TOML file: output, slots, rows and host_states; options of train.py for all; a table [tenants.NAME] for each."""
    overwrite: bool = False
    """Delete the runs that the tenants' folders hold."""

    def read(self) -> "TenantsFile":
        """Return the contents of the file; see `read_tenants`."""
        return read_tenants(self.tenants, overwrite=self.overwrite)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The options that belong to no tenant."""

    output: Path = Path("runs/tenants")
    slots: int = 0
    rows: int = 8
    host_states: bool = False


@dataclasses.dataclass(frozen=True)
class TenantsFile:
    """The contents of a file of tenants.

    Attributes:
        output: the folder in which each tenant has one of its name.
        slots: how many tenants are on the device at the same time; others wait for a slot, in their order.
        rows: rows of a micro-batch, which tenants share.
        host_states: whether the others do not wait: all train at the same time and take turns in the slots, and the states
            of those that have none are in pinned host memory.
        tenants: the options of each tenant's run, by its name.
    """

    output: Path
    slots: int
    rows: int
    host_states: bool
    tenants: dict[str, Options]


def read_tenants(path: Path, *, overwrite: bool = False) -> TenantsFile:
    """Return the contents of a file of tenants, checked as far as names and options show.

    Raises:
        OptionError: the file is missing or no TOML; keys or values that do not fit; something that a tenant cannot have, or
            another base than that of the others. All problems are in one message.
    """
    values = read_toml(path)
    place, tables = f"config file {path}", values.pop("tenants", None)
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise OptionError(f"{place}: expected a table [tenants.NAME] for each tenant, found none")
    groups = {name: values.pop(name) for name in list(values) if isinstance(values[name], dict)}
    shared = from_values(_Shared, values, place)
    for name in ("slots", "rows"):
        if getattr(shared, name) < (name == "rows"):
            raise OptionError(f"{place}: {name}: expected at least {int(name == 'rows')}, found {getattr(shared, name)}")
    problems: list[str] = []
    tenants: dict[str, Options] = {}
    for name, table in tables.items():
        if not _NAME.fullmatch(name):
            problems.append(f"tenants.{name}: expected a name of letters, digits, '.', '_' and '-', which names its folder")
            continue
        own = {"samples": 0, "output": str(shared.output / name), "overwrite": overwrite, "memory_check": False}
        merged = _merged(groups, table)
        if given := [key for key in ("output", "overwrite") if key in merged.get("run", {})]:
            problems.append(f"tenants.{name}.run.{given[0]}: expected none, since the folder is output/NAME")
        merged["run"] = own | {key: value for key, value in merged.get("run", {}).items() if key not in ("output",)}
        try:
            tenants[name] = from_values(Options, merged, f"tenants.{name}")
        except OptionError as error:
            problems.append(str(error))
    problems += [f"tenants.{name}: {problem}" for name, options in tenants.items() for problem in tenant_problems(options)]
    if not problems:
        first, base = next(iter(tenants.items()))
        for name, options in tenants.items():
            if _base(options) != _base(base):
                problems.append(f"tenants.{name}: expected the base of {first} (model, context), found another")
    if problems:
        raise OptionError(f"{place}: " + "; ".join(problems))
    slots = min(shared.slots or len(tenants), len(tenants))
    return TenantsFile(shared.output, slots, shared.rows, shared.host_states, tenants)


def _merged(all_tenants: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of options with a tenant's own values in them."""
    names = [*all_tenants, *(name for name in own if name not in all_tenants)]
    merged: dict[str, Any] = {}
    for name in names:
        both = (all_tenants.get(name, {}), own.get(name, {}))
        merged[name] = {**both[0], **both[1]} if all(isinstance(table, dict) for table in both) else both[1]
    return merged


def _base(options: Options) -> Any:
    """Return the options that decide on the base and its program, which all tenants share."""
    return dataclasses.replace(options.model, adapter=None), options.context


def tenant_problems(options: Options) -> Iterator[str]:
    """Yield what a tenant of many cannot have, though a run of its own could."""
    try:
        options.check()
        check_held("its adapter", options.method(), _ANY_RANK)
    except ValueError as error:
        yield str(error)
    optimizer, plain = options.optimizer, WatchOptions()
    refused = {
        "optimizer.optimizer": (optimizer.optimizer, "adamw"),
        "optimizer.host_offload": (optimizer.host_offload, False),
        "optimizer.host_adapter": (optimizer.host_adapter, False),
        "optimizer.neftune_alpha": (optimizer.neftune_alpha, 0.0),
        "lora.dropout": (options.lora.dropout, 0.0),
        "lora.special_tokens": (options.lora.special_tokens, ()),
        "context.attention_groups": (options.context.groups, 1),
        "run.early_stopping_patience": (options.run.early_stopping_patience, 0),
        "run.mesh": (options.run.mesh, None),
        "data.chat_template": (options.data.chat_template, None),
        **{f"watch.{field.name}": (getattr(options.watch, field.name), getattr(plain, field.name)) for field in _WATCHED},
        **{f"health.{f.name}": (getattr(options.health, f.name), f.default) for f in dataclasses.fields(HealthOptions)},
    }
    for name, (found, expected) in refused.items():
        if found != expected:
            yield f"{name}: expected {expected!r} among many tenants, found {found!r}"
    if options.objective.objective not in ARRAYS:
        yield f"objective: expected one of {', '.join(ARRAYS)} among many tenants, found {options.objective.objective}"
    if options.objective.objective == "dpo" and options.starts_from_adapter():
        yield "objective dpo: expected a new adapter among many tenants, whose reference is the base, found one that goes on"
    if options.lora.init_lora_weights == "eva":
        yield "lora.init_lora_weights: expected an initialization without the data among many tenants, found 'eva'"


_WATCHED = [field for field in dataclasses.fields(WatchOptions) if field.name in ("mmlu", "sample_every", "report_to")]
