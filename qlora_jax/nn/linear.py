"""Linear: a frozen weight, 4-bit or dense, with an optional adapter.

    y = x W (+ bias)                 without an adapter
    y = adapter(x, this layer)       with an adapter: LoRA and its variants add to the above, (IA)³ scales it (`peft`)

The adapter is created in the constructor and never added afterwards, so that a model can be built abstractly with
`nnx.eval_shape`, stacked with `jax.vmap` and split by type: `nnx.LoRAParam` is trainable, `nnx.Param` is frozen.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from qlora_jax.nn.context import LayerContext
from qlora_jax.nn.delta import Delta, value_of
from qlora_jax.nn.parallel import ReplicatedVariable
from qlora_jax.nn.residuals import checkpoint_name
from qlora_jax.quant import Quantization, matmul, quantize

_PLAIN = LayerContext()


class AdapterConstant(ReplicatedVariable):
    """A frozen value of an adapter that its constructor computes and that no checkpoint contains."""


class WeightConstant(ReplicatedVariable):
    """A frozen value of an adapter that is computed from the layer's frozen weight while that weight is loaded."""


@runtime_checkable
class ReadsWeight(Protocol):
    """An adapter that has `WeightConstant`s."""

    def read_weight(self, weight: Any) -> None:
        """Set the `WeightConstant`s.

        Args:
            weight: the frozen weight, an array or `QuantizedTensor` `[in, out]`; `[layers, in, out]` if this module is the
                adapter of a whole stack.
        """
        ...


class LinearAdapter(Protocol):
    """An `nnx.Module` that computes the output of an adapted linear layer; its `nnx.LoRAParam`s are trainable."""

    def __call__(self, x: Float[Array, "*rows k"], linear: "Linear", context: LayerContext) -> Float[Array, "*rows n"]:
        """Return the adapted layer's output, `[..., out]` in the dtype of x.

        Args:
            x: `[..., in]`.
            linear: the layer; `linear.base(x)` is its output without the adapter.
            context: the random key of the dropout and the adapter ids of the rows.
        """
        ...


class MakesAdapter(Protocol):
    """The configuration of the adapter of a linear layer, or of the same linear layer in every layer of a stack."""

    def make(self, in_features: int, out_features: int, *, layer: int | Array, rngs: nnx.Rngs) -> LinearAdapter:
        """Return a new adapter for one layer; within a stack this is traced, and `layer` is an int32 scalar."""
        ...


class Linear(nnx.Module):
    """A linear layer, `[..., in_features] -> [..., out_features]`.

    Attributes:
        weight: `nnx.Param` holding a `QuantizedTensor` or an array `[in, out]`.
        bias: `nnx.Param` `[out]`, or None.
        bias_delta: trainable difference of the bias, float32 `[out]`; None: the bias does not train.
        adapter: the trainable adapter, or None.
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
        """Create a layer with random weights and a bias of zeros.

        Args:
            in_features: features of the input.
            out_features: features of the output.
            use_bias: whether there is a bias.
            quantization: how to store the weight; None: dense in `dtype`.
            adapter: the configuration of the adapter, such as a `LoRA`, whose options about names of modules have no effect
                here; None: no adapter.
            layer: index of this layer in its stack, int32 scalar.
            dtype: dtype of a dense weight and of the bias. The computation runs in the dtype of the input.
            rngs: random number generators; the stream `params` is used.
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

    def base(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        """Return the layer's output without the adapter, `[..., out]`, for x `[..., in]`."""
        return self.with_bias(matmul(x, self.weight.get_value()))

    def with_bias(self, y: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """Return y `[..., out]` plus the bias, if there is one."""
        return y if self.bias is None else y + value_of(self.bias, self.bias_delta).astype(y.dtype)

    def __call__(self, x: Float[Array, "*rows k"], context: LayerContext = _PLAIN) -> Float[Array, "*rows n"]:
        """Map x `[..., in]` to `[..., out]` in the dtype of x; with a random key, the adapter's dropout is applied."""
        y = self.base(x) if self.adapter is None else self.adapter(x, self, context)
        return checkpoint_name(y, "linear")
