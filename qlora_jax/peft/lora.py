"""The configuration of LoRA, with the fields of PEFT's LoraConfig; lora_linear.py and dora.py compute the adapters."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, shortened
from qlora_jax.peft.dora import MAGNITUDE, DoRALinear, DoRASpec
from qlora_jax.peft.initialization import initialization_error, reads_weights
from qlora_jax.peft.lora_config import read_lora, write_lora
from qlora_jax.peft.lora_embedding import EMBEDDING_A, EMBEDDING_B, EmbeddingSpec
from qlora_jax.peft.lora_linear import LORA_BIAS, LoRALinear, LoRASpec
from qlora_jax.peft.method import EMBEDDING_KEYS, Bias, Method
from qlora_jax.peft.patterns import END, FULL, LAYER, pattern_error
from qlora_jax.peft.targets import ALL_LINEAR, choose, known_names, pattern_matches, renamed_targets

Number = TypeVar("Number", int, float)
MOST_ALPHA = 1e6  # far above that of any adapter; beyond it, the file is damaged


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
        modules_to_save: ends of the names of embeddings, output heads, norms and linear layers that train in full.
        bias: the biases of the base that train: "none", "lora_only" (those of the targets) or "all".
        lora_bias: whether B has a bias, by which the scaled update is shifted.
        ensure_weight_tying: whether a head that is tied to the token embedding stays so: what trains of one is that of both.
        layer_replication: ranges of layers (start, end) of which the model is made; empty: its own layers.
        trainable_token_indices: token ids whose rows of the input embedding train; or pairs (end of the name of an embedding
            or output head, token ids).
        from_files: see `Method`.

    Raises:
        OptionError: rank < 1, alpha <= 0 or too large, dropout outside [0, 1), no target, an invalid regular expression, a
            pattern given twice, layers_to_transform beside a regular expression, or an initialization that is unknown or
            contradicts another field.
    """

    name: ClassVar = "lora"
    title: ClassVar = "A LoRA adapter"
    summary: ClassVar = "two matrices beside each linear layer"
    peft_type: ClassVar = "LORA"
    adapts_embeddings: ClassVar = True

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
    bias: Bias = "none"
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    layer_replication: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"of_files": True})
    from_files: bool = dataclasses.field(default=False, compare=False, repr=False, metadata={"of_files": True})

    def __post_init__(self) -> None:
        for where, rank in (
            ("rank", self.rank),
            *((f"rank_pattern {shortened(name)}", r) for name, r in self.rank_pattern),
        ):
            if rank < 1:
                raise OptionError(f"LoRA {where}: expected at least 1, found {rank}")
        for where, alpha in (
            ("alpha", self.alpha),
            *((f"alpha_pattern {shortened(name)}", a) for name, a in self.alpha_pattern),
        ):
            if not 0 < alpha <= MOST_ALPHA:
                raise OptionError(f"LoRA {where}: expected a number above 0, at most {MOST_ALPHA:g}, found {alpha}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"LoRA dropout: expected 0 <= dropout < 1, found {self.dropout}")
        if self.bias not in get_args(Bias):
            raise OptionError(f"LoRA bias: expected one of {', '.join(get_args(Bias))}, found {shortened(self.bias)}")
        if self.lora_bias and self.use_dora:
            raise OptionError("LoRA lora_bias: expected none beside use_dora, found both")
        if any(start < 0 or end <= start for start, end in self.layer_replication):
            raise OptionError(f"LoRA layer_replication: expected pairs 0 <= start < end, found {self.layer_replication}")
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
            where = "LoRA trainable_token_indices" + (f" {shortened(name)}" if name else "")
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
                f"LoRA use_dora: expected no init_lora_weights that changes the base beside it, found {shortened(name)}"
            )
        if self.loftq_iter < 1 or (self.loftq_iter > 1 and name != "loftq"):
            raise OptionError(f"LoRA loftq_iter: expected at least 1, and 1 without loftq, found {self.loftq_iter}")

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            names = [name for name, _ in getattr(self, field)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise OptionError(f"LoRA {field}: expected each pattern once, found {shortened(twice[0], 200)} twice")
        patterns = [(field, name, END) for field in ("rank_pattern", "alpha_pattern") for name, _ in getattr(self, field)]
        patterns += [("layers_pattern", name, LAYER) for name in self.layers_pattern]
        patterns += [("exclude_modules", self.exclude_modules, FULL)] if isinstance(self.exclude_modules, str) else []
        patterns += [("target", self.target_modules, FULL)] if isinstance(self.target_modules, str) else []
        for field, pattern, form in patterns:
            if error := pattern_error(pattern, form):
                raise OptionError(f"LoRA {field} {pattern[:200]!r}: {error}")

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

    def renamed(self, modules: Mapping[str, str]) -> "LoRA":
        """See `Method`."""
        targets = renamed_targets(self, modules)
        changed: dict[str, Any] = {}
        for field, default in (("rank_pattern", self.rank), ("alpha_pattern", self.alpha)):
            patterns = getattr(self, field)
            own = tuple(
                (re.escape(ours), value)
                for theirs, ours in modules.items()
                if (value := _first_match(patterns, theirs, default)) != _first_match(patterns, ours, default)
            )
            if own:
                names = {name for name, _ in own}
                changed[field] = (*own, *((name, value) for name, value in patterns if name not in names))
        if targets is not None:
            return dataclasses.replace(self, **changed).with_targets(targets)
        return dataclasses.replace(self, **changed) if changed else self

    def with_targets(self, modules: Sequence[str]) -> "LoRA":
        """See `Method`."""
        anywhere = {"exclude_modules": (), "layers_to_transform": (), "layers_pattern": ()}
        return dataclasses.replace(self, target_modules=tuple(modules), **anywhere)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (
            *("lora_A.weight", "lora_B.weight"),
            *((MAGNITUDE,) if self.use_dora else ()),
            *((LORA_BIAS,) if self.lora_bias else ()),
            *(EMBEDDING_A, EMBEDDING_B),
        )

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        if suffix in (MAGNITUDE, LORA_BIAS):
            return None if len(shape) == 1 else "expected a vector"
        if len(shape) != 2:
            return "expected a matrix"
        rank, found = self.rank_of(module), shape[0 if suffix in ("lora_A.weight", EMBEDDING_A) else 1]
        return None if found == rank else f"expected r = {rank} as in the configuration"

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        if EMBEDDING_A in tensors:
            update = (tensors[EMBEDDING_B].astype(np.float32) @ tensors[EMBEDDING_A].astype(np.float32)).T
        else:
            update = tensors["lora_B.weight"].astype(np.float32) @ tensors["lora_A.weight"].astype(np.float32)
        update = np.multiply(update, np.float32(self.scaling_of(module)), out=update)
        update += weight.astype(np.float32, copy=False)
        if MAGNITUDE in tensors:
            norm = np.linalg.norm(update, axis=1)
            update *= (tensors[MAGNITUDE].astype(np.float32) / np.where(norm > 0, norm, 1))[:, None]
        return update

    def merged_bias(self, bias: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        if LORA_BIAS not in tensors:
            return bias
        return bias.astype(np.float32) + np.float32(self.scaling_of(module)) * tensors[LORA_BIAS].astype(np.float32)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """See `Method`."""
        return cls(**read_lora(config))

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        return write_lora(self, modules)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, Any]":
        """See `Method`. The values are `LoRASpec`s, `DoRASpec`s and, of embeddings, `EmbeddingSpec`s."""
        chosen = choose(self, layers)
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, _ in () if self.from_files else patterns:
                if not any(pattern_matches(pattern, name) for name in chosen):
                    raise OptionError(
                        f"LoRA {field} {shortened(pattern)} matches no linear layer that gets an adapter; "
                        f"{known_names(layers)}"
                    )
        specs: dict[str, Any] = {}
        for key, stacked in layers.items():
            if chosen.isdisjoint(stacked):
                continue
            ranks = tuple(self.rank_of(name) if name in chosen else 0 for name in stacked)
            scalings = tuple(self.scaling_of(name) if name in chosen else 0.0 for name in stacked)
            spec = LoRASpec(ranks, scalings, self.dropout, self.init_lora_weights, self.lora_bias)
            if key in EMBEDDING_KEYS:
                self._check_embedding(stacked[0])
                specs[key] = EmbeddingSpec(spec, head=key == "lm_head")
            else:
                specs[key] = DoRASpec(spec) if self.use_dora else spec
        return specs

    def _check_embedding(self, module: str) -> None:
        """Raise OptionError where the adapter of an embedding or output head is not one that `EmbeddingSpec` describes."""
        if self.use_dora or self.lora_bias or self.reads_original_weights:
            name = "use_dora" if self.use_dora else "lora_bias" if self.lora_bias else f"{self.init_lora_weights}"
            raise OptionError(f"LoRA {name}: expected linear layers of the decoder layers as targets, found {module}")

    def make(
        self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> LoRALinear | DoRALinear:
        """Return the adapter of a single layer outside a model; it has no name, so no pattern or target applies."""
        spec = LoRASpec((self.rank,), (self.scaling,), self.dropout, self.init_lora_weights, self.lora_bias)
        return (DoRASpec(spec) if self.use_dora else spec).make(in_features, out_features, layer=layer, rngs=rngs)

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# The command line has an option for every field that is not only found in files.
LoRA.lora_options = tuple(field.name for field in dataclasses.fields(LoRA) if not field.metadata.get("of_files"))


def _first_match(patterns: tuple[tuple[str, Number], ...], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if pattern_matches(pattern, module)), default)
