"""(IA)³ (Liu et al. 2022): a trainable vector scales the output or the input of a linear layer.

    y = l ⊙ (x W (+ bias))        l [out]: usually for keys and values
    y = (l ⊙ x) W (+ bias)        l [in]: for modules of the feed-forward network

l is initialized with ones. The model holds l - 1, so that an adapter of zeros is the base model; adapter files hold l,
`[out, 1]` or `[1, in]`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, shortened
from qlora_jax.nn import AdapterConstant, LayerContext, Linear
from qlora_jax.peft.fields import Fields, as_list, as_names, is_list, is_names
from qlora_jax.peft.method import FilePart, Method, ModelShape
from qlora_jax.peft.option import Option
from qlora_jax.peft.patterns import match_name, pattern_error
from qlora_jax.peft.targets import ALL_LINEAR, choose, known_names, renamed_targets

# The (target_modules, feedforward_modules) that PEFT 0.21 uses for each model_type if none are named.
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
    """(IA)³, with the fields of PEFT's IA3Config (targets.py implements its rules of matching names).

    Attributes:
        target_modules: "all-linear", names (or last parts of names), or one regular expression over full names; None:
            PEFT's default for the model's family.
        feedforward_modules: ends of names, or one regular expression over full names, of the targets whose input is scaled
            instead of their output; None: PEFT's default for the model's family.
        exclude_modules: names (or last parts of names) or one regular expression of modules that get no adapter.
        modules_to_save: ends of the names of embeddings, output heads and norms that train in full.
        init_ia3_weights: whether the vectors are initialized with ones; otherwise they are drawn from a normal distribution.

    Raises:
        OptionError: no target, or an invalid regular expression.
    """

    name: ClassVar = "ia3"
    title: ClassVar = "An IA3 adapter"
    summary: ClassVar = "vectors that scale the inputs or outputs of linear layers (PEFT's usual ones by default)"
    peft_type: ClassVar = "IA3"
    suffixes: ClassVar = (_SUFFIX,)
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
    from_files: bool = dataclasses.field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.target_modules is not None and not self.target_modules:
            raise OptionError("IA3 target_modules: expected names, a regular expression or 'all-linear', found none")
        for field in ("target_modules", "feedforward_modules", "exclude_modules"):
            value = getattr(self, field)
            if isinstance(value, str) and (error := pattern_error(value)):
                raise OptionError(f"IA3 {field} {value[:200]!r}: {error}")

    def for_model(self, shape: ModelShape) -> "IA3":
        """See `Method`."""
        if self.target_modules is not None and self.feedforward_modules is not None:
            return self
        if shape.family not in DEFAULTS:
            known = ", ".join(sorted(DEFAULTS))
            raise OptionError(
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
        """See `Method`. All linear layers, LoRA's default, stand for PEFT's usual ones here."""
        usual = values["target_modules"] == ALL_LINEAR
        return cls(
            target_modules=None if usual else values["target_modules"],
            feedforward_modules=values["feedforward_modules"] or None,
            exclude_modules=values["exclude_modules"],
            modules_to_save=values["modules_to_save"],
        )

    def renamed(self, modules: Mapping[str, str]) -> "IA3":
        """See `Method`."""
        targets = None if self.target_modules is None else renamed_targets(self, modules)  # pyright: ignore[reportArgumentType]
        if targets is None:
            return self
        feedforward = tuple(ours for theirs, ours in modules.items() if self.is_feedforward(theirs))
        return dataclasses.replace(self, target_modules=targets, feedforward_modules=feedforward)

    def with_targets(self, modules: Sequence[str]) -> "IA3":
        """See `Method`."""
        feedforward = tuple(name for name in modules if self.is_feedforward(name))
        return dataclasses.replace(self, target_modules=tuple(modules), feedforward_modules=feedforward, exclude_modules=())

    @property
    def default_learning_rate(self) -> float:
        """The learning rate of the paper."""
        return 3e-3

    @property
    def layers_to_transform(self) -> tuple[int, ...]:
        return ()

    @property
    def layers_pattern(self) -> tuple[str, ...]:
        return ()

    def is_feedforward(self, module: str) -> bool:
        """Return whether the input of the module with this full name is scaled; a list may hold any ends of names."""
        return _is_feedforward(self.feedforward_modules or (), module)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, IA3Spec]":
        """See `Method`."""
        if self.target_modules is None or self.feedforward_modules is None:
            raise ValueError("IA3: expected target_modules and feedforward_modules, found none: for_model chooses them")
        chosen = choose(self, layers)  # pyright: ignore[reportArgumentType]
        named = () if self.from_files else self.feedforward_modules
        for name in (named,) if isinstance(named, str) else named:
            if not any(_is_feedforward(named if isinstance(named, str) else (name,), module) for module in chosen):
                raise OptionError(f"IA3 feedforward_modules {shortened(name, 200)} matches no target; {known_names(layers)}")
        found = {}
        for path, stacked in layers.items():
            mine = [name for name in stacked if name in chosen]
            if not mine:
                continue
            inputs = {self.is_feedforward(name) for name in mine}
            if len(inputs) > 1:
                raise OptionError(f"IA3 feedforward_modules: expected all modules like {stacked[0]} or none, found some")
            found[path] = IA3Spec(tuple(name in chosen for name in stacked), inputs == {True}, not self.init_ia3_weights)
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
        fields = Fields(config, read=_READ, inert=frozenset(("fan_in_fan_out",)))  # of Conv1D layers
        names = "names or one regular expression"
        targets = fields.get("target_modules", lambda x: x is None or is_names(x), names)
        feedforward = fields.get("feedforward_modules", lambda x: x is None or is_names(x), names)
        excluded = fields.get("exclude_modules", is_names, names, [])
        saved = fields.get("modules_to_save", lambda x: is_list(x, lambda y: isinstance(y, str)), "names of modules", [])
        ones = fields.get("init_ia3_weights", lambda x: isinstance(x, bool), "true or false", True)
        fields.check()
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = ALL_LINEAR
        return cls(
            target_modules=None if targets is None else as_names(targets),
            feedforward_modules=None if feedforward is None else as_names(feedforward),
            exclude_modules=as_names(excluded),
            modules_to_save=tuple(saved),
            init_ia3_weights=ones,
            from_files=True,
        )

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        targets, feedforward = self.target_modules, self.feedforward_modules
        if targets == ALL_LINEAR:
            targets = tuple({name.rsplit(".", 1)[-1] for name in modules})
        if isinstance(targets, tuple) and isinstance(feedforward, tuple):  # PEFT requires names that are among the targets
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
        return match_name(names, module) is not None
    return any(module.endswith(name) for name in names)


@dataclasses.dataclass(frozen=True)
class IA3Spec:
    """The (IA)³ vector of a linear layer, or of each layer of a stack.

    Attributes:
        used: for each layer of the stack, whether it has a vector.
        feedforward: whether the vector scales the input instead of the output.
        random: whether the vector is initialized from a normal distribution instead of with ones.
    """

    used: tuple[bool, ...] = (True,)
    feedforward: bool = False
    random: bool = False

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "IA3Linear":
        """Return a new vector for one layer."""
        return IA3Linear(in_features if self.feedforward else out_features, spec=self, layer=layer, rngs=rngs)


class IA3Linear(nnx.Module):
    """The (IA)³ vector of one linear layer.

    Attributes:
        change: float32 `nnx.LoRAParam` `[1, features]`, the vector minus one.
        used: float32 `AdapterConstant`, 1 if the layer has a vector, else 0; None if all layers of the stack have one.
    """

    def __init__(self, features: int, *, spec: IA3Spec, layer: int | Array = 0, rngs: nnx.Rngs) -> None:
        self.spec, shape = spec, (1, features)
        change = jax.random.normal(rngs.params(), shape, jnp.float32) - 1 if spec.random else jnp.zeros(shape, jnp.float32)
        self.change = nnx.LoRAParam(change)
        used = None if all(spec.used) else jnp.asarray(np.asarray(spec.used, np.float32))[layer]
        self.used = None if used is None else AdapterConstant(used)

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        change = self.change[...][0]
        scale = 1 + (change if self.used is None else change * self.used[...])
        if self.spec.feedforward:
            return linear.base((x * scale).astype(x.dtype))
        return (linear.base(x) * scale).astype(x.dtype)

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        for layer, used in enumerate(self.spec.used):
            if used:
                yield FilePart(layer, _SUFFIX, "change", transposed=not self.spec.feedforward, offset=1.0)
