"""LoRA (Hu et al. 2021) in a linear layer, or in a stack of them.

    y = x W (+ bias) + s * (dropout(x) A) B        A [in, r], B [r, out]; s = alpha / r, or alpha / sqrt(r) for rsLoRA

A starts uniform in ±1/sqrt(in) (Kaiming uniform with a = sqrt(5)), B at zero, so that a fresh adapter changes nothing.

Layers are stacked, and r and alpha may differ from one to the other. The matrices of a stack all have the largest r; a layer
with a smaller one, or with none, has zeros in the other columns of A and rows of B, and there s is 0 (`LoRASpec.factors`):
neither the output nor any gradient knows of the padding, whatever the optimizer does to it: A gets s times what B lets
through, B gets s times what A lets through.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.nn import AdapterConstant, Linear, checkpoint_name
from qlora_jax.peft.initialization import orthogonal
from qlora_jax.peft.method import FilePart
from qlora_jax.quant import matmul


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """The place of an adapter in a linear layer, or in a stack of them.

    Attributes:
        ranks: r of each layer; 0: no adapter there.
        scalings: the factor on the update of each layer.
        dropout: share of the inputs that is zeroed while training.
        start: how A and B start, as far as a random key tells (start.py); A uniform and B zero otherwise.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float
    start: bool | str = True

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

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "LoRALinear":
        """The adapter of one layer of the stack."""
        return LoRALinear(in_features, out_features, spec=self, layer=layer, rngs=rngs)


@runtime_checkable
class LowRankAdapter(Protocol):
    """The adapter of a linear layer with LoRA's A and B: `LoRALinear` and `dora.DoRALinear`."""

    spec: LoRASpec
    lora_a: nnx.LoRAParam[Array]
    lora_b: nnx.LoRAParam[Array]


class LoRALinear(nnx.Module):
    """The adapter of a layer.

    Attributes:
        lora_a, lora_b: float32 `nnx.LoRAParam` `[in, r]` and `[r, out]`.
        spec: the ranks and scalings of the adapter, in a stack those of all its layers.
        factors: float32 `AdapterConstant` `[r]` where they differ within the stack, or None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, spec: LoRASpec, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> None:
        self.spec = spec
        a, b, factors = start(spec, in_features, out_features, layer=layer, rngs=rngs)
        self.factors = None if factors is None else AdapterConstant(factors)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)

    def __call__(self, x: Array, linear: Linear, key: Array | None) -> Array:
        scaling = self.spec.scalings[0] if self.factors is None else self.factors[...]
        update = lora_update(x, self.lora_a[...], self.lora_b[...], scaling, self.spec.dropout, key)
        return linear.base(x) + update

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        return lora_file_parts(self.spec)


def start(
    spec: LoRASpec, in_features: int, out_features: int, *, layer: int | Array, rngs: nnx.Rngs
) -> tuple[Array, Array, Array | None]:
    """(A, B, factors on the columns of A where they differ within the stack) of a fresh adapter."""
    key, b = rngs.params(), jnp.zeros((spec.rank, out_features), jnp.float32)
    factors = None if spec.uniform else jnp.asarray(spec.factors())[layer]
    if spec.start == "orthogonal":
        a, b = _orthogonal(spec, key, in_features, out_features, layer)
    elif spec.start == "gaussian":
        rank = spec.rank if factors is None else jnp.maximum(jnp.asarray(spec.ranks)[layer], 1)
        a = jax.random.normal(key, (in_features, spec.rank)) / rank
    else:
        a = init_lora_a(key, in_features, spec.rank)
    if factors is not None:
        a = jnp.where(factors[None, :] > 0, a, 0)
    return a, b, factors


def _orthogonal(spec: LoRASpec, key: Array, in_features: int, out_features: int, layer: int | Array) -> tuple[Array, Array]:
    """A and B of the layer's own rank, in zeros up to the largest."""
    ranks = sorted({*spec.ranks} - {0})
    made = [orthogonal(key, in_features, out_features, rank) for rank in ranks]
    a = jnp.stack([jnp.pad(a, ((0, 0), (0, spec.rank - rank))) for rank, (a, _) in zip(ranks, made, strict=True)])
    b = jnp.stack([jnp.pad(b, ((0, spec.rank - rank), (0, 0))) for rank, (_, b) in zip(ranks, made, strict=True)])
    own = jnp.asarray([ranks.index(rank) if rank else 0 for rank in spec.ranks])[layer]
    return a[own], b[own]


def lora_file_parts(spec: LoRASpec) -> Iterator[FilePart]:
    """Where the files' A and B lie in the `lora_a` and `lora_b` of a stack."""
    for layer, rank in enumerate(spec.ranks):
        if rank:
            yield FilePart(layer, "lora_A.weight", "lora_a", (slice(None), slice(rank)), transposed=True)
            yield FilePart(layer, "lora_B.weight", "lora_b", (slice(rank), slice(None)), transposed=True)


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
    x = drop(x, dropout, key)
    if isinstance(scaling, Array):
        scaling = scaling.astype(x.dtype)
    inner = checkpoint_name(matmul(x, a), "lora")
    return matmul(inner * scaling, b)


def drop(x: Array, share: float, key: Array | None) -> Array:
    """Dropout: a share of x zeroed and the rest scaled up; x itself without a key or with a share of 0."""
    if key is None or share == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - share, x.shape)
    return jnp.where(keep, x / (1.0 - share), 0).astype(x.dtype)
