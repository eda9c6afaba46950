"""The operands that the kernels of all platforms have in common."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.quant.codebooks import DataType
from qlora_jax.quant.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Static:
    """The static properties of a kernel's matrix, known when the kernel is compiled.

    Attributes:
        data_type: data type of the codes.
        block_size: number of values that share a scale.
        scale_rows: number of scales in a column.
        double_quantized: whether the scales are 8-bit codes.
    """

    data_type: DataType
    block_size: int
    scale_rows: int
    double_quantized: bool


def static(w: QuantizedTensor) -> Static:
    """Return the static properties of the matrices of a stack."""
    return Static(w.data_type, w.block_size, w.scales.shape[1], w.double_quantized)


def stacked(w: QuantizedTensor, layer: Array | None) -> tuple[QuantizedTensor, Array]:
    """Return (a stack, the index of the matrix in it as int32 `[1]`); without a layer, w becomes a stack of one matrix."""
    if layer is None:
        return jax.tree.map(lambda leaf: leaf[None], w), jnp.zeros((1,), jnp.int32)
    return w, jnp.asarray(layer, jnp.int32).reshape(1)
