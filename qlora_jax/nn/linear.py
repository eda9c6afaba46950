"""Linear: a frozen weight, in 4 bits or dense, with an optional adapter.

    y = x W (+ bias)                 without an adapter
    y = adapter(x, this layer)       with one: LoRA and its relatives add to the above, IA3 scales it (`peft`)

The adapter is made in the constructor, never put in afterwards, so that a model can be built abstractly with
`nnx.eval_shape`, stacked with `jax.vmap` and split by type: `nnx.LoRAParam` is what trains, `nnx.Param` is frozen.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.nn.delta import Delta, value_of
from qlora_jax.nn.parallel import Whole
from qlora_jax.nn.residuals import checkpoint_name
from qlora_jax.quant import Quantization, matmul, quantize


class AdapterConstant(Whole):
    """A frozen value of an adapter: made with it, not part of any checkpoint."""


class WeightConstant(Whole):
    """A frozen value of an adapter that follows from the layer's frozen weight, and is set where that is read."""


@runtime_checkable
class ReadsWeight(Protocol):
    """An adapter that has `WeightConstant`s."""

    def read_weight(self, weight: Any) -> None:
        """Sets them. weight: an array or `QuantizedTensor` `[in, out]`, or `[layers, in, out]` where the adapters of a stack
        are one module."""
        ...


class LinearAdapter(Protocol):
    """An `nnx.Module` that computes a linear layer's output. What it trains is `nnx.LoRAParam`."""

    def __call__(self, x: Array, linear: "Linear", key: Array | None) -> Array:
        """x `[..., in]` to `[..., out]` in the dtype of x; `linear.base(x)` is the frozen layer's output, `key` a random key
        while training."""
        ...


class MakesAdapter(Protocol):
    """What describes an adapter of a linear layer, or of the same layer in all of a stack."""

    def make(self, in_features: int, out_features: int, *, layer: int | Array, rngs: nnx.Rngs) -> LinearAdapter:
        """The adapter of one layer; traced, with `layer` an int32 scalar, where it is one of a stack."""
        ...


class Linear(nnx.Module):
    """`[..., in_features] -> [..., out_features]`.

    Attributes:
        weight: `nnx.Param` holding a `QuantizedTensor` or an array `[in, out]`.
        bias: `nnx.Param` `[out]`, or None.
        bias_delta: what training adds to it; None: nothing.
        adapter: what trains, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        quantization: Quantization | None = None,
        adapter: MakesAdapter | None = None,
        layer: int | Array = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A layer with random weights.

        Args:
            quantization: how to store the weight; None keeps it dense in `dtype`.
            adapter: what makes the adapter, such as a `LoRA`, of which only what concerns a layer by itself counts; None for
                a plain frozen layer.
            layer: which layer of the stack this is, int32 scalar.
            dtype: dtype of a dense weight and of the bias. The computation runs in the dtype of the input.
        """
        key = rngs.params()
        weight = jax.random.normal(key, (in_features, out_features), dtype) * in_features**-0.5
        if quantization is not None:
            weight = quantize(weight, quantization.data_type, quantization.block_size, quantization.double_quantization)
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None
        self.bias_delta: Delta | None = None
        made = None if adapter is None else adapter.make(in_features, out_features, layer=layer, rngs=rngs)
        self.adapter: LinearAdapter | None = made
        if isinstance(made, ReadsWeight):
            made.read_weight(weight)

    def base(self, x: Array) -> Array:
        """The frozen layer's output for x `[..., in]`."""
        return self.with_bias(matmul(x, self.weight.get_value()))

    def with_bias(self, y: Array) -> Array:
        """A product with the weight, and the bias where there is one."""
        return y if self.bias is None else y + value_of(self.bias, self.bias_delta).astype(y.dtype)

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """x `[..., in]` to `[..., out]` in the dtype of x; `key` turns the adapter's dropout on."""
        y = self.base(x) if self.adapter is None else self.adapter(x, self, key)
        return checkpoint_name(y, "linear")
