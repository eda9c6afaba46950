"""The configuration of LoRA, with the fields of PEFT's LoraConfig; lora_linear.py and dora.py compute the adapters."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.peft.dora import MAGNITUDE, DoRALinear, DoRASpec
from qlora_jax.peft.initialization import initialization_error, reads_weights
from qlora_jax.peft.lora_config import read_lora, write_lora
from qlora_jax.peft.lora_linear import LoRALinear, LoRASpec
from qlora_jax.peft.method import Method
from qlora_jax.peft.targets import ALL_LINEAR, choose, known_names, pattern_matches

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al. 2021), with the fields of PEFT's LoraConfig (targets.py implements its rules of matching names).

    Attributes:
        rank: r, the inner size of the adapter.
        alpha: the numerator of the scaling.
        dropout: fraction of the adapter's inputs that is zeroed while training.
        target_modules: "all-linear", names (or last parts of names), or one regular expression over full names.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
        use_dora: train the norms of the weight's columns separately (dora.py).
        exclude_modules: names (or last parts of names) or one regular expression of modules that get no adapter.
        layers_to_transform: numbers of the layers that get an adapter; empty: all layers.
        layers_pattern: names of the list of layers that `layers_to_transform` counts in, e.g. "layers"; empty: any list.
        rank_pattern: pairs (regular expression of the last parts of a name, r of the modules that match); the first that
            matches applies.
        alpha_pattern: pairs (regular expression, alpha), by the same rule.
        init_lora_weights: initialization of A and B (initialization.py).
        loftq_iter: number of alternating steps of LoftQ.
        modules_to_save: ends of the names of embeddings, output heads and norms that train in full.
        trainable_token_indices: token ids whose rows of the input embedding train; or pairs (end of the name of an embedding
            or output head, token ids).

    Raises:
        OptionError: rank < 1, alpha <= 0, dropout outside [0, 1), no target, an invalid regular expression, a pattern given
            twice, layers_to_transform beside a regular expression, or an initialization that is unknown or contradicts
            another field.
    """

    name: ClassVar = "lora"
    title: ClassVar = "A LoRA adapter"
    summary: ClassVar = "two matrices beside each linear layer"
    peft_type: ClassVar = "LORA"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...] = ()
    init_lora_weights: bool | str = True
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        for where, rank in (("rank", self.rank), *((f"rank_pattern {name!r}", r) for name, r in self.rank_pattern)):
            if rank < 1:
                raise OptionError(f"LoRA {where}: expected at least 1, found {rank}")
        for where, alpha in (("alpha", self.alpha), *((f"alpha_pattern {name!r}", a) for name, a in self.alpha_pattern)):
            if not 0 < alpha < math.inf:
                raise OptionError(f"LoRA {where}: expected a number above 0, found {alpha}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"LoRA dropout: expected 0 <= dropout < 1, found {self.dropout}")
        if not self.target_modules:
            raise OptionError("LoRA target_modules: expected names, a regular expression or 'all-linear', found none")
        self._check_patterns()
        self._check_initialization()
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR and self.layers_to_transform:
            raise OptionError("LoRA layers_to_transform: expected names as target_modules, found a regular expression")
        if self.layers_pattern and not self.layers_to_transform:
            raise OptionError(
                f"LoRA layers_pattern {self.layers_pattern}: expected layers_to_transform beside it, found none"
            )
        if any(layer < 0 for layer in self.layers_to_transform):
            raise OptionError(f"LoRA layers_to_transform: expected numbers from 0 on, found {self.layers_to_transform}")

        for name, tokens in self.trainable_tokens():
            where = "LoRA trainable_token_indices" + (f" {name!r}" if name else "")
            if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens):
                raise OptionError(f"{where}: expected different numbers from 0 on, found {list(tokens)}")

    def trainable_tokens(self) -> tuple[tuple[str | None, tuple[int, ...]], ...]:
        """See `Method`."""
        named = tuple((entry[0], entry[1]) for entry in self.trainable_token_indices if isinstance(entry, tuple))
        tokens = tuple(entry for entry in self.trainable_token_indices if isinstance(entry, int))
        return (*((None, tokens) for _ in tokens[:1]), *named)

    def _check_initialization(self) -> None:
        name = self.init_lora_weights
        if error := initialization_error(name):
            raise OptionError(f"LoRA init_lora_weights: {error}")
        odd = [rank for rank in (self.rank, *(rank for _, rank in self.rank_pattern)) if rank % 2]
        if name == "orthogonal" and odd:
            raise OptionError(f"LoRA init_lora_weights orthogonal: expected even ranks, found {odd[0]}")
        if self.use_dora and reads_weights(name):
            raise OptionError(
                f"LoRA use_dora: expected no init_lora_weights that changes the base beside it, found {name!r}"
            )
        if self.loftq_iter < 1 or (self.loftq_iter > 1 and name != "loftq"):
            raise OptionError(f"LoRA loftq_iter: expected at least 1, and 1 without loftq, found {self.loftq_iter}")

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            names = [name for name, _ in getattr(self, field)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise OptionError(f"LoRA {field}: expected each pattern once, found {twice[0]!r} twice")
        patterns = [(field, name) for field in ("rank_pattern", "alpha_pattern") for name, _ in getattr(self, field)]
        patterns += [("layers_pattern", name) for name in self.layers_pattern]
        patterns += [("exclude_modules", self.exclude_modules)] if isinstance(self.exclude_modules, str) else []
        patterns += [("target", self.target_modules)] if isinstance(self.target_modules, str) else []
        for field, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"LoRA {field} {pattern!r}: no regular expression: {error}") from error

    @property
    def scaling(self) -> float:
        """The factor s on the update A B of the modules that no pattern matches."""
        return self._scaling(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """Return r of the module with this full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor s on the update A B of the module with this full name."""
        return self._scaling(self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha))

    @property
    def changes_base(self) -> bool:
        """Whether the initialization changes the base weights, so that A and B alone do not fit the original weights."""
        return self.reads_original_weights and (self.init_lora_weights, self.loftq_iter) != ("loftq", 1)

    @property
    def reads_original_weights(self) -> bool:
        """Whether A and B are initialized from the original weights (pissa, loftq)."""
        return reads_weights(self.init_lora_weights)

    @property
    def reads_inputs(self) -> bool:
        """Whether A is initialized from the layers' inputs on the training data (eva)."""
        return self.init_lora_weights == "eva"

    def with_dropout(self, dropout: float) -> "LoRA":
        """See `Method`."""
        return dataclasses.replace(self, dropout=dropout)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("lora_A.weight", "lora_B.weight", *((MAGNITUDE,) if self.use_dora else ()))

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        if suffix == MAGNITUDE:
            return None if len(shape) == 1 else "expected a vector"
        if len(shape) != 2:
            return "expected a matrix"
        rank, found = self.rank_of(module), shape[self.suffixes.index(suffix)]
        return None if found == rank else f"expected r = {rank} as in the configuration"

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        a, b, *magnitude = (tensors[suffix].astype(np.float32) for suffix in self.suffixes)
        update = b @ a
        update *= np.float32(self.scaling_of(module))
        update += weight.astype(np.float32, copy=False)
        for m in magnitude:
            norm = np.linalg.norm(update, axis=1)
            update *= (m / np.where(norm > 0, norm, 1))[:, None]
        return update

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """See `Method`."""
        return cls(**read_lora(config))

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        return write_lora(self, modules)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, LoRASpec] | dict[str, DoRASpec]":
        """See `Method`."""
        chosen = choose(self, layers)
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, _ in patterns:
                if not any(pattern_matches(pattern, name) for name in chosen):
                    raise OptionError(
                        f"LoRA {field} {pattern!r} matches no linear layer that gets an adapter; {known_names(layers)}"
                    )
        specs = {}
        for key, stacked in layers.items():
            if chosen.isdisjoint(stacked):
                continue
            ranks = tuple(self.rank_of(name) if name in chosen else 0 for name in stacked)
            scalings = tuple(self.scaling_of(name) if name in chosen else 0.0 for name in stacked)
            specs[key] = LoRASpec(ranks, scalings, self.dropout, self.init_lora_weights)
        return {key: DoRASpec(spec) for key, spec in specs.items()} if self.use_dora else specs

    def make(
        self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> LoRALinear | DoRALinear:
        """Return the adapter of a single layer outside a model; it has no name, so no pattern or target applies."""
        spec = LoRASpec((self.rank,), (self.scaling,), self.dropout, self.init_lora_weights)
        return (DoRASpec(spec) if self.use_dora else spec).make(in_features, out_features, layer=layer, rngs=rngs)

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# The command line has an option for every field.
LoRA.lora_options = tuple(field.name for field in dataclasses.fields(LoRA))


def _first_match(patterns: tuple[tuple[str, Number], ...], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if pattern_matches(pattern, module)), default)
