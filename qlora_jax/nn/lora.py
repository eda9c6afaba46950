"""LoRA (Hu et al. 2021): the description of an adapter, and what it adds to a linear layer.

    y = x W + s * (dropout(x) A) B        A [in, r], B [r, out]; s = alpha / r, or alpha / sqrt(r) for rsLoRA

A starts uniform in ±1/sqrt(in) (Kaiming uniform with a = sqrt(5)), B at zero, so that a fresh adapter changes nothing.

Layers are stacked, and r and alpha may differ from one to the other. The matrices of a stack all have the largest r; a layer
with a smaller one, or with none, has zeros in the other columns of A and rows of B, and s there is 0 (`Slot.factors`). So
neither the output nor any gradient knows of the padding, whatever the optimizer does to it: A gets s times what B lets
through, B gets s times what A lets through.
"""

import dataclasses
import math
import re
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.quant import matmul

ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)


class LoRAScaling(nnx.Variable):
    """The frozen factors on the adapters of a stack whose ranks or scalings differ."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The adapter's shape, in the terms of PEFT's LoraConfig (nn.targets holds its rules of matching).

    Attributes:
        rank: r, the inner size of the adapter.
        alpha: the numerator of the scaling.
        dropout: share of the adapter's inputs that is zeroed while training.
        target_modules: "all-linear", names (or last parts of names), or one regular expression over whole names.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).
        exclude_modules: names (or last parts) or one regular expression of what gets none all the same.
        layers_to_transform: numbers of the layers that get one; none: all of them.
        layers_pattern: names of the list of layers whose numbers count, e.g. "layers"; none: any.
        rank_pattern: (regular expression of the last parts of a name, r there); the first that matches counts.
        alpha_pattern: the same for alpha.
        modules_to_save: ends of the names of token tables, heads and norms that train as a whole.
        trainable_token_indices: tokens whose rows of the token table train; or, of each table, (end of its name, tokens).

    Raises:
        ValueError: rank < 1, alpha <= 0, dropout outside [0, 1), no target, no regular expression, a pattern given twice, or
            layers_to_transform beside a regular expression.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for where, rank in (("rank", self.rank), *((f"rank_pattern {name!r}", r) for name, r in self.rank_pattern)):
            if rank < 1:
                raise ValueError(f"LoRA {where}: expected at least 1, found {rank}")
        for where, alpha in (("alpha", self.alpha), *((f"alpha_pattern {name!r}", a) for name, a in self.alpha_pattern)):
            if not 0 < alpha < math.inf:
                raise ValueError(f"LoRA {where}: expected a number above 0, found {alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout: expected 0 <= dropout < 1, found {self.dropout}")
        if not self.target_modules:
            raise ValueError("LoRA target_modules: expected names, a regular expression or 'all-linear', found none")
        self._check_patterns()
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR and self.layers_to_transform:
            raise ValueError("LoRA layers_to_transform: expected names as target_modules, found a regular expression")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError(
                f"LoRA layers_pattern {self.layers_pattern}: expected layers_to_transform beside it, found none"
            )
        if any(layer < 0 for layer in self.layers_to_transform):
            raise ValueError(f"LoRA layers_to_transform: expected numbers from 0 on, found {self.layers_to_transform}")

        for table, tokens in self.token_rows():
            where = "LoRA trainable_token_indices" + (f" {table!r}" if table else "")
            if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens):
                raise ValueError(f"{where}: expected different numbers from 0 on, found {list(tokens)}")

    def token_rows(self) -> tuple[tuple[str | None, tuple[int, ...]], ...]:
        """`trainable_token_indices` as (end of a table's name, or None for the token table, tokens) of each table."""
        tables = tuple((entry[0], entry[1]) for entry in self.trainable_token_indices if isinstance(entry, tuple))
        tokens = tuple(entry for entry in self.trainable_token_indices if isinstance(entry, int))
        return (*((None, tokens) for _ in tokens[:1]), *tables)

    def _check_patterns(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            names = [name for name, _ in getattr(self, field)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"LoRA {field}: expected each pattern once, found {twice[0]!r} twice")
        patterns = [(field, name) for field in ("rank_pattern", "alpha_pattern") for name, _ in getattr(self, field)]
        patterns += [("layers_pattern", name) for name in self.layers_pattern]
        patterns += [("exclude_modules", self.exclude_modules)] if isinstance(self.exclude_modules, str) else []
        patterns += [("target", self.target_modules)] if isinstance(self.target_modules, str) else []
        for field, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"LoRA {field} {pattern!r}: no regular expression: {error}") from error

    @property
    def scaling(self) -> float:
        """The factor on the update where no pattern says otherwise."""
        return self._scaling(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """r of the module of that full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor on the update of the module of that full name."""
        return self._scaling(self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha))

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether PEFT's rules apply an entry of rank_pattern or alpha_pattern to the module of that full name."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: tuple[tuple[str, Number], ...], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if pattern_matches(pattern, module)), default)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of an adapter in a linear layer, or in a stack of them.

    Attributes:
        ranks: r of each layer; 0: no adapter there.
        scalings: the factor on the update of each layer.
        dropout: share of the inputs that is zeroed while training.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float

    @property
    def rank(self) -> int:
        """The inner size of A and B."""
        return max(self.ranks)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same rank and scaling."""
        return len(set(zip(self.ranks, self.scalings, strict=True))) == 1

    def factors(self) -> np.ndarray:
        """float32 `[layers, rank]`: the factor on each product with a column of A, 0 for padding."""
        used = np.arange(self.rank) < np.asarray(self.ranks)[:, None]
        return np.where(used, np.asarray(self.scalings, np.float32)[:, None], np.float32(0))


def init_lora_a(key: Array, in_features: int, rank: int) -> Array:
    bound = 1.0 / math.sqrt(in_features)
    return jax.random.uniform(key, (in_features, rank), jnp.float32, -bound, bound)


def lora_update(
    x: Array, a: Array, b: Array, scaling: float | Array, dropout: float = 0.0, key: Array | None = None
) -> Array:
    """scaling * (dropout(x) A) B in the dtype of x.

    Args:
        x: `[..., in]`; a: `[in, r]`; b: `[r, out]`.
        scaling: one factor, or one for each column of A, float32 `[r]`.
        key: random key of the dropout; without one nothing is dropped.
    """
    if key is not None and dropout > 0.0:
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - dropout), 0).astype(x.dtype)
    if isinstance(scaling, Array):
        scaling = scaling.astype(x.dtype)
    inner = checkpoint_name(matmul(x, a), "lora")
    return matmul(inner * scaling, b)
