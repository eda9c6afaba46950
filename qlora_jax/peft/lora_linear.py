"""LoRA (Hu et al. 2021) in a linear layer, or in a stack of them.

    y = x W (+ bias) + s * (dropout(x) A) B        A [in, r], B [r, out]; s = alpha / r, or alpha / sqrt(r) for rsLoRA

By default A is initialized uniformly in ±1/sqrt(in) (Kaiming uniform with a = sqrt(5)) and B with zeros, so that a new
adapter changes nothing.

Layers are stacked, and r and alpha may differ from layer to layer. All matrices of a stack have the largest r. A layer with
a smaller r, or without an adapter, is padded with columns of A and rows of B, for which s is 0 (`LoRASpec.factors`). The
padding therefore affects neither the output nor any gradient, whatever the optimizer writes into it: the gradients of A and
of B both contain the factor s.
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

from qlora_jax.nn import AdapterConstant, LayerContext, Linear, checkpoint_name
from qlora_jax.peft.initialization import orthogonal
from qlora_jax.peft.method import FilePart
from qlora_jax.quant import matmul

LORA_BIAS = "lora_B.bias"  # the suffix of the tensor's name in adapter files


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """The LoRA adapter of a linear layer, or of a stack of them.

    Attributes:
        ranks: r of each layer; 0: the layer has no adapter.
        scalings: the factor s of each layer.
        dropout: fraction of the inputs that is zeroed while training.
        initialization: value of `init_lora_weights`. Those that need more than a random key (initialization.py) start here
            with A uniform and B zero.
        bias: whether B has a bias b: y = x W + s * ((x A) B + b).
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout: float
    initialization: bool | str = True
    bias: bool = False

    @property
    def rank(self) -> int:
        """The inner size of A and B."""
        return max(self.ranks)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same rank and scaling."""
        return len(set(zip(self.ranks, self.scalings, strict=True))) == 1

    def factors(self) -> np.ndarray:
        """Return float32 `[layers, rank]`: the factor s for each column of A, 0 for padding."""
        used = np.arange(self.rank) < np.asarray(self.ranks)[:, None]
        return np.where(used, np.asarray(self.scalings, np.float32)[:, None], np.float32(0))

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "LoRALinear":
        """Return a new adapter for one layer of the stack."""
        return LoRALinear(in_features, out_features, spec=self, layer=layer, rngs=rngs)


@runtime_checkable
class LowRankAdapter(Protocol):
    """The adapter of a linear layer with LoRA's A and B: `LoRALinear` and `dora.DoRALinear`."""

    spec: LoRASpec
    lora_a: nnx.LoRAParam[Array]
    lora_b: nnx.LoRAParam[Array]


class LoRALinear(nnx.Module):
    """The LoRA adapter of one linear layer.

    Attributes:
        lora_a, lora_b: float32 `nnx.LoRAParam` `[in, r]` and `[r, out]`.
        spec: the ranks and scalings of all layers of the stack.
        factors: float32 `AdapterConstant` `[r]` with the factor s of each column of A, or None if all layers of the stack
            have the same rank and scaling.
        lora_bias: float32 `nnx.LoRAParam` `[out]`, the bias of B; None where B has none.
        bias_factor: float32 `AdapterConstant`, the factor s of the bias, where `factors` are not None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, spec: LoRASpec, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> None:
        self.spec = spec
        a, b, factors = initialize_lora(spec, in_features, out_features, layer=layer, rngs=rngs)
        self.factors = None if factors is None else AdapterConstant(factors)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.lora_bias = nnx.LoRAParam(jnp.zeros((out_features,), jnp.float32)) if spec.bias else None
        factor = None if factors is None or not spec.bias else jnp.asarray(spec.scalings, jnp.float32)[layer]
        self.bias_factor = None if factor is None else AdapterConstant(factor)

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        scaling = self.spec.scalings[0] if self.factors is None else self.factors[...]
        update = lora_update(x, self.lora_a[...], self.lora_b[...], scaling, self.spec.dropout, context.key)
        if self.lora_bias is not None:
            factor = self.spec.scalings[0] if self.bias_factor is None else self.bias_factor[...]
            update = update + (factor * self.lora_bias[...]).astype(update.dtype)
        return linear.base(x) + update

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        return lora_file_parts(self.spec)


def initialize_lora(
    spec: LoRASpec, in_features: int, out_features: int, *, layer: int | Array, rngs: nnx.Rngs
) -> tuple[Array, Array, Array | None]:
    """Return (A, B, factors) of a new adapter; factors is None if all layers of the stack have the same rank and scaling."""
    key, b = rngs.params(), jnp.zeros((spec.rank, out_features), jnp.float32)
    factors = None if spec.uniform else jnp.asarray(spec.factors())[layer]
    if spec.initialization == "orthogonal":
        a, b = _orthogonal(spec, key, in_features, out_features, layer)
    elif spec.initialization == "gaussian":
        rank = spec.rank if factors is None else jnp.maximum(jnp.asarray(spec.ranks)[layer], 1)
        a = jax.random.normal(key, (in_features, spec.rank)) / rank
    else:
        a = init_lora_a(key, in_features, spec.rank)
    if factors is not None:
        a = jnp.where(factors[None, :] > 0, a, 0)
    return a, b, factors


def _orthogonal(spec: LoRASpec, key: Array, in_features: int, out_features: int, layer: int | Array) -> tuple[Array, Array]:
    """Return orthogonal A and B of the layer's own rank, padded with zeros to the largest rank."""
    ranks = sorted({*spec.ranks} - {0})
    made = [orthogonal(key, in_features, out_features, rank) for rank in ranks]
    a = jnp.stack([jnp.pad(a, ((0, 0), (0, spec.rank - rank))) for rank, (a, _) in zip(ranks, made, strict=True)])
    b = jnp.stack([jnp.pad(b, ((0, spec.rank - rank), (0, 0))) for rank, (_, b) in zip(ranks, made, strict=True)])
    own = jnp.asarray([ranks.index(rank) if rank else 0 for rank in spec.ranks])[layer]
    return a[own], b[own]


def lora_file_parts(spec: LoRASpec) -> Iterator[FilePart]:
    """Yield the parts of `lora_a` and `lora_b` of a stack that adapter files hold as A and B."""
    for layer, rank in enumerate(spec.ranks):
        if rank:
            yield FilePart(layer, "lora_A.weight", "lora_a", (slice(None), slice(rank)), transposed=True)
            yield FilePart(layer, "lora_B.weight", "lora_b", (slice(rank), slice(None)), transposed=True)
            if spec.bias:
                yield FilePart(layer, LORA_BIAS, "lora_bias")


def init_lora_a(key: Array, in_features: int, rank: int) -> Array:
    """Return A, float32 `[in, r]`, uniform in ±1/sqrt(in)."""
    bound = 1.0 / math.sqrt(in_features)
    return jax.random.uniform(key, (in_features, rank), jnp.float32, -bound, bound)


def lora_update(
    x: Array, a: Array, b: Array, scaling: float | Array, dropout: float = 0.0, key: Array | None = None
) -> Array:
    """Return scaling * (dropout(x) A) B, `[..., out]` in the dtype of x.

    Args:
        x: `[..., in]`.
        a: A, `[in, r]`.
        b: B, `[r, out]`.
        scaling: one factor, or one for each column of A, float32 `[r]`.
        dropout: fraction of x that is zeroed.
        key: random key of the dropout; None: no dropout.
    """
    x = apply_dropout(x, dropout, key)
    if isinstance(scaling, Array):
        scaling = scaling.astype(x.dtype)
    inner = checkpoint_name(matmul(x, a), "lora")
    return matmul(inner * scaling, b)


def apply_dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a fraction `rate` of x and divide the rest by 1 - rate; return x itself if key is None or rate is 0."""
    if key is None or rate == 0.0:
        return x
    mask = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(mask, x / (1.0 - rate), 0).astype(x.dtype)
