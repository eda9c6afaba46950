"""DoRA (Liu et al. 2024): LoRA, with the norm of each column of the adapted weight trained as a separate parameter.

    V = W + s A B                   [in, out]: the frozen weight, 4-bit or dense, plus LoRA's update; one column per output
    y = (m / ||V||) * (x V) (+ bias)         m, ||V|| [out]; ||V|| counts as a constant in the gradient (section 4.3)
    with dropout d:   y = x W + (m / ||V|| * (d(x) V) - d(x) W) (+ bias)            as in PEFT

The trainable parameter is m - ||W||, which starts at zero, so that an adapter of zeros is the base model; its gradient is
that of m. Adapter files hold m (`nn.delta` does the same for parameters that train in full).

||V|| changes with every step, but V is never computed:

    ||V||^2 = ||W||^2 + 2 <W, s A B> + ||s A B||^2               for each column
    <W, s A B> = sum over r of (A' W) * (s B)                    A' W [r, out] is a product of r rows with the frozen weight
    ||s A B||^2 = sum over r of (s B) * (A' A (s B))

So a layer needs the memory of a usual product (at most one dense matrix at a time) and the time of r more rows of x. ||W||
`[out]` is computed once from the weight as it is stored. It takes four bytes for each output; computing it again would
dequantise the matrix a second time in each pass. While decoding, the product with A' costs as much as a second step; a
merged model avoids this cost.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.nn import AdapterConstant, LayerContext, Linear, WeightConstant, checkpoint_name
from qlora_jax.peft.lora_linear import LoRASpec, apply_dropout, initialize_lora, lora_file_parts, lora_update
from qlora_jax.peft.method import FilePart
from qlora_jax.quant import MixedStack, QuantizedTensor, dequantize, matmul


@dataclasses.dataclass(frozen=True)
class DoRASpec:
    """The DoRA adapter of a linear layer or of a stack of them; it has the fields of a LoRA adapter."""

    spec: LoRASpec

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "DoRALinear":
        """Return a new adapter for one layer of the stack."""
        return DoRALinear(in_features, out_features, spec=self.spec, layer=layer, rngs=rngs)


class DoRALinear(nnx.Module):
    """The DoRA adapter of one linear layer.

    Attributes:
        lora_a, lora_b, spec, factors: as in `LoRALinear`.
        lora_magnitude: float32 `nnx.LoRAParam` `[out]`, m - ||W||.
        weight_norm: float32 `WeightConstant` `[out]`, the norm ||W|| of each column.
    """

    def __init__(
        self, in_features: int, out_features: int, *, spec: LoRASpec, layer: int | Array = 0, rngs: nnx.Rngs
    ) -> None:
        self.spec = spec
        a, b, factors = initialize_lora(spec, in_features, out_features, layer=layer, rngs=rngs)
        self.factors = None if factors is None else AdapterConstant(factors)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        self.lora_magnitude = nnx.LoRAParam(jnp.zeros((out_features,), jnp.float32))
        self.weight_norm = WeightConstant(jnp.zeros((out_features,), jnp.float32))

    def read_weight(self, weight: Any) -> None:
        """See `nn.ReadsWeight`."""
        self.weight_norm.set_value(column_norms(weight))

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        weight, dropped = linear.weight.get_value(), apply_dropout(x, self.spec.dropout, context.key)
        update = lora_update(dropped, self.lora_a[...], self.lora_b[...], self._scaling())
        base = matmul(dropped, weight)
        # The gradient of m reads this sum, and it cannot be computed from the layer's result.
        directed = checkpoint_name(base + update, "linear")
        scale = self._scale(weight, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        # In float32, because bfloat16 numbers near 1 are 0.4 % apart.
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
        """Return m / ||V||, float32 `[out]`; 1 if the layer has no adapter."""
        scaling, norm = self._scaling(), self.weight_norm[...]
        a, b = (jax.lax.stop_gradient(variable[...]) for variable in (self.lora_a, self.lora_b))
        b = b * (scaling[:, None] if isinstance(scaling, Array) else scaling)
        crossed = matmul(a.T.astype(dtype), weight).astype(jnp.float32)
        inner = jnp.einsum("ir,is->rs", a, a, precision="highest")
        own = jnp.einsum("rs,so->ro", inner, b, precision="highest")
        total = jnp.sqrt(jnp.maximum(norm * norm + (b * (2 * crossed + own)).sum(0), 0))
        total = checkpoint_name(jnp.where(total > 0, total, 1), "lora")  # a column of zeros remains zero
        scale = (norm + self.lora_magnitude[...]) / total
        return scale if self.factors is None else jnp.where(self.factors[...].max() > 0, scale, 1)


MAGNITUDE = "lora_magnitude_vector"  # the suffix of the tensor's name in adapter files; it has no `.weight`


@jax.jit
def column_norms(weight: Any) -> Array:
    """Return the norms of the columns, float32 `[..., out]`, of a dense or 4-bit weight `[..., in, out]`.

    The matrices of a stack are dequantised one at a time.
    """
    if isinstance(weight, MixedStack):
        return jnp.stack([column_norms(weight.matrix(layer)) for layer in range(weight.shape[0])])
    if weight.ndim > 2:
        return jax.lax.map(column_norms, weight)
    dense = dequantize(weight, jnp.float32) if isinstance(weight, QuantizedTensor) else weight.astype(jnp.float32)
    return jnp.sqrt((dense * dense).sum(0))
