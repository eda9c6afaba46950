"""The cells of a comparison: variants of a run, each with several seeds.

A variant is written as its parts, separated by slashes, in any order after the method. A part that is left out has its
default:

    lora/nf4+dq/r16/all-linear      method / storage of the base / rank / targets, which are separated by commas
    lora/none/q_proj,v_proj         LoRA on a dense base, on two kinds of layers
    full                            full fine-tuning, whose base is dense, without rank or targets
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from qlora_jax.errors import OptionError
from qlora_jax.peft import ALL_LINEAR
from qlora_jax.peft import METHODS as PEFT_METHODS
from qlora_jax.quant import DataType

METHODS: tuple[str, ...] = tuple(PEFT_METHODS)
STORAGES = ("none", *(f"{name}{end}" for name in get_args(DataType) for end in ("", "+dq")))
RANKED = ("lora", "dora", "rslora")  # methods that have a rank
TARGETED = (*RANKED, "ia3")  # methods that choose among linear layers
DENSE = ("full",)  # methods whose base is not quantised


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to fine-tune.

    Attributes:
        storage: storage of the linear layers of the base: "none", or a 4-bit type, with "+dq" for double quantisation.
        rank: None for methods without one.
        targets: names of linear layers; () for methods without this choice.
    """

    method: str
    storage: str
    rank: int | None
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        rank = [] if self.rank is None else [f"r{self.rank}"]
        return "/".join([self.method, self.storage, *rank, *([",".join(self.targets)] if self.targets else [])])

    def flags(self) -> list[str]:
        """Return the flags of train.py for this variant."""
        flags = ["--method", "lora" if self.method in RANKED else self.method]
        flags += {"dora": ["--use-dora"], "rslora": ["--use-rslora"]}.get(self.method, [])
        data_type, _, doubled = self.storage.partition("+")
        flags += ["--data-type", data_type]
        if data_type != "none":
            flags.append("--double-quantization" if doubled else "--no-double-quantization")
        if self.rank is not None:
            flags += ["--rank", str(self.rank)]
        if self.targets:
            flags += ["--target-modules", *self.targets]
        return flags


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of the comparison."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name.replace('/', '--').replace(',', '+')}--seed{self.seed}"

    def flags(self, common: Sequence[str], rates: Mapping[str, float]) -> list[str]:
        """Return the flags of train.py for this run.

        Args:
            common: the flags of all runs.
            rates: learning rates by method.
        """
        flags = [*common, *self.variant.flags(), "--seed", str(self.seed)]
        if self.variant.method in rates:
            flags += ["--learning-rate", str(rates[self.variant.method])]
        return flags


def parse_variant(text: str, *, rank: int = 16) -> Variant:
    """Return a variant by its name.

    Raises:
        OptionError: the method or a part is unknown, or the method does not have such a part.
    """
    method, *parts = text.split("/")
    known = (*METHODS, *(name for name in RANKED if name not in METHODS))
    if method not in known:
        raise OptionError(f"variant {text!r}: unknown method {method!r}; expected one of {', '.join(known)}")
    found: dict[str, Any] = {}
    for part in parts:
        kind = "storage" if part in STORAGES else "rank" if re.fullmatch(r"r\d+", part) else "targets"
        if kind in found:
            raise OptionError(
                f"variant {text!r}: expected one {kind}, found {part!r} too; storages are {', '.join(STORAGES)}"
            )
        found[kind] = int(part[1:]) if kind == "rank" else part
    takes = {"storage": method not in DENSE or found.get("storage") == "none", "rank": method in RANKED}
    takes["targets"] = method in TARGETED
    for kind, taken in takes.items():
        if kind in found and not taken:
            raise OptionError(f"variant {text!r}: {method} takes no {kind}, found {found[kind]}")
    return Variant(
        method,
        found.get("storage", "none" if method in DENSE else "nf4+dq"),
        found.get("rank", rank) if method in RANKED else None,
        tuple(found["targets"].split(",")) if "targets" in found else (ALL_LINEAR,) if method in RANKED else (),
    )


def product(methods: Sequence[str], storages: Sequence[str], ranks: Sequence[int], targets: Sequence[str]) -> list[Variant]:
    """Return all combinations of these values; parts that a method does not have are left out, without repetitions.

    Raises:
        OptionError: a name is unknown.
    """
    names = []
    for method, storage, rank, target in itertools.product(methods, storages, ranks, targets):
        parts = [method]
        parts += [storage] if method not in DENSE else []
        parts += [f"r{rank}"] if method in RANKED else []
        parts += [target] if method in TARGETED and not (method not in RANKED and target == ALL_LINEAR) else []
        names.append("/".join(parts))
    return [parse_variant(name) for name in dict.fromkeys(names)]
