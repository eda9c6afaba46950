"""(IA)³ (Liu et al. 2022): a vector scales what a linear layer gives, or what it takes.

    y = l ⊙ (x W (+ bias))        l [out]: keys and values, as a rule
    y = (l ⊙ x) W (+ bias)        l [in]: modules of the feed-forward

l is one at first. The model holds l - 1, so that an adapter of zeros is the base model; files hold l, `[out, 1]` or
`[1, in]`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.nn import AdapterConstant, Linear
from qlora_jax.peft.fields import Fields, as_list, as_names, is_list, is_names
from qlora_jax.peft.method import FilePart, Method, ModelShape
from qlora_jax.peft.option import Option
from qlora_jax.peft.targets import ALL_LINEAR, choose, known_names

# (target_modules, feedforward_modules) that PEFT 0.21 takes for a model_type where none are named.
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (("q_proj", "v_proj", "down_proj"), ("down_proj",))
    ),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "t5": (("k", "v", "wo"), ("wo",)),
}
_SUFFIX = "ia3_l"
_READ = frozenset(("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "init_ia3_weights"))


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """The adapter, in the terms of PEFT's IA3Config (targets.py holds its rules of matching).

    Attributes:
        target_modules: "all-linear", names (or last parts of names), or one regular expression over whole names; None:
            what PEFT takes for the model's family.
        feedforward_modules: ends of names, or one regular expression over whole names, of those whose input is scaled; None:
            what PEFT takes for the family.
        exclude_modules: names (or last parts) or one regular expression of what gets none all the same.
        modules_to_save: ends of the names of token tables, heads and norms that train as a whole.
        init_ia3_weights: whether the vectors start at one; otherwise they are drawn from a normal distribution.

    Raises:
        OptionError: no target, or no regular expression.
    """

    name: ClassVar = "ia3"
    title: ClassVar = "An IA3 adapter"
    summary: ClassVar = "vectors that scale the inputs or outputs of linear layers (PEFT's usual ones by default)"
    peft_type: ClassVar = "IA3"
    options: ClassVar = (
        Option(
            "feedforward_modules",
            tuple[str, ...],
            (),
            "Of ia3: ends of the names of linear layers whose input is scaled, not their output; PEFT's usual ones if left "
            "out.",
        ),
    )
    lora_options: ClassVar = ("target_modules", "exclude_modules", "modules_to_save")

    target_modules: str | tuple[str, ...] | None = None
    feedforward_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise OptionError("IA3 target_modules: expected names, a regular expression or 'all-linear', found none")
        for field in ("target_modules", "feedforward_modules", "exclude_modules"):
            value = getattr(self, field)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise OptionError(f"IA3 {field} {value!r}: no regular expression: {error}") from error

    def for_model(self, shape: ModelShape) -> "IA3":
        """See `Method`."""
        if self.target_modules is not None and self.feedforward_modules is not None:
            return self
        if shape.family not in DEFAULTS:
            known = ", ".join(sorted(DEFAULTS))
            raise UnsupportedError(
                f"IA3: expected target_modules and feedforward_modules, found none, and a {shape.family} has no usual ones "
                f"({known} have)"
            )
        targets, feedforward = DEFAULTS[shape.family]
        targets = targets if self.target_modules is None else self.target_modules
        if self.feedforward_modules is not None:
            return dataclasses.replace(self, target_modules=targets)
        if isinstance(targets, tuple):
            feedforward = tuple(name for name in targets if name.rpartition(".")[2] in feedforward)
        return dataclasses.replace(self, target_modules=targets, feedforward_modules=feedforward)

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "IA3":
        """See `Method`. All linear layers, the default of LoRA, stand for PEFT's usual ones here."""
        usual = values["target_modules"] == ALL_LINEAR
        return cls(
            target_modules=None if usual else values["target_modules"],
            feedforward_modules=values["feedforward_modules"] or None,
            exclude_modules=values["exclude_modules"],
            modules_to_save=values["modules_to_save"],
        )

    @property
    def default_learning_rate(self) -> float:
        """The learning rate of the paper."""
        return 3e-3

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (_SUFFIX,)

    @property
    def layers_to_transform(self) -> tuple[int, ...]:
        return ()

    @property
    def layers_pattern(self) -> tuple[str, ...]:
        return ()

    def is_feedforward(self, module: str) -> bool:
        """Whether the input of the module of that full name is scaled; a list holds ends of names here, not parts."""
        return _is_feedforward(self.feedforward_modules or (), module)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, Scales]":
        """See `Method`."""
        if self.target_modules is None or self.feedforward_modules is None:
            raise OptionError("IA3: expected target_modules and feedforward_modules, found none: for_model chooses them")
        chosen = choose(self, layers)  # pyright: ignore[reportArgumentType]
        named = self.feedforward_modules
        for name in (named,) if isinstance(named, str) else named:
            if not any(_is_feedforward(named if isinstance(named, str) else (name,), module) for module in chosen):
                raise OptionError(f"IA3 feedforward_modules {name!r} matches no target; {known_names(layers)}")
        found = {}
        for key, stacked in layers.items():
            mine = [name for name in stacked if name in chosen]
            if not mine:
                continue
            inputs = {self.is_feedforward(name) for name in mine}
            if len(inputs) > 1:
                raise OptionError(f"IA3 feedforward_modules: expected all modules like {stacked[0]} or none, found some")
            found[key] = Scales(tuple(name in chosen for name in stacked), inputs == {True}, not self.init_ia3_weights)
        return found

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        feedforward = self.is_feedforward(module)
        if len(shape) == 2 and shape[0 if feedforward else 1] == 1:
            return None
        return f"expected {'[1, in]' if feedforward else '[out, 1]'}"

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        return weight.astype(np.float32) * tensors[_SUFFIX].astype(np.float32)

    def merged_bias(self, bias: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        bias = bias.astype(np.float32)
        return bias if self.is_feedforward(module) else bias * tensors[_SUFFIX].astype(np.float32)[:, 0]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "IA3":
        """See `Method`."""
        fields = Fields(config, read=_READ, expected={"fan_in_fan_out": (False, None)})
        names = "names or one regular expression"
        targets = fields.get("target_modules", lambda x: x is None or is_names(x), names)
        feedforward = fields.get("feedforward_modules", lambda x: x is None or is_names(x), names)
        excluded = fields.get("exclude_modules", is_names, names, [])
        saved = fields.get("modules_to_save", lambda x: is_list(x, lambda y: isinstance(y, str)), "names of modules", [])
        start = fields.get("init_ia3_weights", lambda x: isinstance(x, bool), "true or false", True)
        fields.check()
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = ALL_LINEAR
        return cls(
            target_modules=None if targets is None else as_names(targets),
            feedforward_modules=None if feedforward is None else as_names(feedforward),
            exclude_modules=as_names(excluded),
            modules_to_save=tuple(saved),
            init_ia3_weights=start,
        )

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        targets, feedforward = self.target_modules, self.feedforward_modules
        if targets == ALL_LINEAR:
            targets = tuple({name.rsplit(".", 1)[-1] for name in modules})
        if isinstance(targets, tuple) and isinstance(feedforward, tuple):  # PEFT wants the very names of targets
            feedforward = tuple(name for name in targets if name.endswith(feedforward))
        return {
            "exclude_modules": as_list(self.exclude_modules),
            "fan_in_fan_out": False,
            "feedforward_modules": feedforward if isinstance(feedforward, str) else sorted(feedforward or ()),
            "init_ia3_weights": self.init_ia3_weights,
            "modules_to_save": as_list(self.modules_to_save),
            "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
        }


def _is_feedforward(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Makes the vector of a linear layer, or of each of a stack.

    Attributes:
        used: for each layer of the stack, whether it has one.
        feedforward: whether it scales the input.
        random: whether it starts from a normal distribution.
    """

    used: tuple[bool, ...] = (True,)
    feedforward: bool = False
    random: bool = False

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "IA3Linear":
        """The vector of one layer."""
        return IA3Linear(in_features if self.feedforward else out_features, scales=self, layer=layer, rngs=rngs)


class IA3Linear(nnx.Module):
    """The vector of a layer.

    Attributes:
        change: float32 `nnx.LoRAParam` `[1, features]`, what the vector is more than one.
        used: float32 `AdapterConstant`, 0 in the layers of a stack that have none, or None where all have one.
    """

    def __init__(self, features: int, *, scales: Scales, layer: int | Array = 0, rngs: nnx.Rngs) -> None:
        self.scales, shape = scales, (1, features)
        start = jax.random.normal(rngs.params(), shape, jnp.float32) - 1 if scales.random else jnp.zeros(shape, jnp.float32)
        self.change = nnx.LoRAParam(start)
        used = None if all(scales.used) else jnp.asarray(np.asarray(scales.used, np.float32))[layer]
        self.used = None if used is None else AdapterConstant(used)

    def __call__(self, x: Array, linear: Linear, key: Array | None) -> Array:
        change = self.change[...][0]
        scale = 1 + (change if self.used is None else change * self.used[...])
        if self.scales.feedforward:
            return linear.base((x * scale).astype(x.dtype))
        return (linear.base(x) * scale).astype(x.dtype)

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        for layer, used in enumerate(self.scales.used):
            if used:
                yield FilePart(layer, _SUFFIX, "change", transposed=not self.scales.feedforward, offset=1.0)
