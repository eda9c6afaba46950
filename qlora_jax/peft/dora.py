"""DoRA (Liu et al. 2024): LoRA whose result has columns of a length that is trained by itself.

    V = W + s A B                   [in, out]: a column for each output, frozen in 4 bits or dense, plus LoRA's update
    y = (m / ||V||) * (x V) (+ bias)         m, ||V|| [out]; ||V|| is a constant to differentiation (the paper's section 4.3)
    with dropout d:   y = x W + (m / ||V|| * (d(x) V) - d(x) W) (+ bias)            as PEFT does it

What trains of m is its difference from ||W||, which starts at zero: an adapter of zeros is the base model, fresh or zeroed,
and the optimizer sees the gradient of m. Files hold m (`nn.delta` does the same for whole parameters).

||V|| changes with every step, yet V is never made:

    ||V||^2 = ||W||^2 + 2 <W, s A B> + ||s A B||^2               by columns
    <W, s A B> = sum over r of (A' W) * (s B)                    A' W [r, out] is a product of r rows with the frozen weight
    ||s A B||^2 = sum over r of (s B) * (A' A (s B))

so a layer holds what any product with it holds, at most one dense matrix at a time, and pays for r more rows of x. ||W||
`[out]` is made once, from the weight as it is stored: four bytes for each output, where making it anew would dequantise the
matrix a second time in each pass. In decoding the product with A' is the cost of a second step; a merged model has none.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.nn import AdapterConstant, Linear, WeightConstant, checkpoint_name
from qlora_jax.peft.lora_linear import LoRASpec, drop, lora_file_parts, lora_update, start
from qlora_jax.peft.method import FilePart
from qlora_jax.quant import QuantizedTensor, dequantize, matmul


@dataclasses.dataclass(frozen=True)
class DoRASpec:
    """The place of DoRA in a linear layer or in a stack of them, which is that of a LoRA."""

    spec: LoRASpec

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "DoRALinear":
        """The adapter of one layer of the stack."""
        return DoRALinear(in_features, out_features, spec=self.spec, layer=layer, rngs=rngs)


class DoRALinear(nnx.Module):
    """The adapter of a layer.

    Attributes:
        lora_a, lora_b, spec, factors: those of `LoRALinear`.
        lora_magnitude: float32 `nnx.LoRAParam` `[out]`, m - ||W||.
        weight_norm: float32 `WeightConstant` `[out]`, ||W|| by columns.
    """

    def __init__(
        self, in_features: int, out_features: int, *, spec: LoRASpec, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> None:
        self.spec = spec
        a, b, factors = start(spec, in_features, out_features, layer=layer, rngs=rngs)
        self.factors = None if factors is None else AdapterConstant(factors)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.lora_magnitude = nnx.LoRAParam(jnp.zeros((out_features,), jnp.float32))
        self.weight_norm = WeightConstant(jnp.zeros((out_features,), jnp.float32))

    def read_weight(self, weight: Any) -> None:
        """See `nn.ReadsWeight`."""
        self.weight_norm.set_value(column_norms(weight))

    def __call__(self, x: Array, linear: Linear, key: Array | None) -> Array:
        weight, dropped = linear.weight.get_value(), drop(x, self.spec.dropout, key)
        update = lora_update(dropped, self.lora_a[...], self.lora_b[...], self._scaling())
        base = matmul(dropped, weight)
        # The gradient of m reads it, and the layer's own result does not give it back.
        directed = checkpoint_name(base + update, "linear")
        scale = self._scale(weight, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        # In float32: a bfloat16 scale near 1 would have steps of 0.4 %.
        y = scale * directed.astype(jnp.float32)
        if dropped is not x:
            y = matmul(x, weight).astype(jnp.float32) + (y - base.astype(jnp.float32))
        return linear.with_bias(y.astype(x.dtype))

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        yield from lora_file_parts(self.spec)
        for layer, rank in enumerate(self.spec.ranks):
            if rank:
                yield FilePart(layer, MAGNITUDE, "lora_magnitude", changes_own="weight_norm")

    def _scaling(self) -> float | Array:
        return self.spec.scalings[0] if self.factors is None else self.factors[...]

    def _scale(self, weight: Any, dtype: DTypeLike) -> Array:
        """float32 `[out]`, m / ||V||; 1 where the layer has no adapter."""
        scaling, norm = self._scaling(), self.weight_norm[...]
        a, b = (jax.lax.stop_gradient(variable[...]) for variable in (self.lora_a, self.lora_b))
        b = b * (scaling[:, None] if isinstance(scaling, Array) else scaling)
        crossed = matmul(a.T.astype(dtype), weight).astype(jnp.float32)
        inner = jnp.einsum("ir,is->rs", a, a, precision="highest")
        own = jnp.einsum("rs,so->ro", inner, b, precision="highest")
        total = jnp.sqrt(jnp.maximum(norm * norm + (b * (2 * crossed + own)).sum(0), 0))
        total = checkpoint_name(jnp.where(total > 0, total, 1), "lora")  # a column of zeros stays one
        scale = (norm + self.lora_magnitude[...]) / total
        return scale if self.factors is None else jnp.where(self.factors[...].max() > 0, scale, 1)


MAGNITUDE = "lora_magnitude_vector"  # what follows a module's name in the files, without `.weight`


@jax.jit
def column_norms(weight: Any) -> Array:
    """float32 lengths of the columns, `[..., out]`, of a weight `[..., in, out]`, dense or in 4 bits; one dense matrix at a
    time."""
    if weight.ndim > 2:
        return jax.lax.map(column_norms, weight)
    dense = dequantize(weight, jnp.float32) if isinstance(weight, QuantizedTensor) else weight.astype(jnp.float32)
    return jnp.sqrt((dense * dense).sum(0))
