"""What the kernels of all platforms are told of their matrix."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.quant.codebooks import DataType
from qlora_jax.quant.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Static:
    """What a kernel knows of its matrix when it is compiled."""

    data_type: DataType
    block_size: int
    scale_rows: int
    double_quantized: bool


def static(w: QuantizedTensor) -> Static:
    """Of a stack of matrices."""
    return Static(w.data_type, w.block_size, w.scales.shape[1], w.double_quantized)


def stacked(w: QuantizedTensor, layer: Array | None) -> tuple[QuantizedTensor, Array]:
    """A stack, of one matrix where it was none, and int32 `[1]`, the number of the matrix in it."""
    if layer is None:
        return jax.tree.map(lambda leaf: leaf[None], w), jnp.zeros((1,), jnp.int32)
    return w, jnp.asarray(layer, jnp.int32).reshape(1)
