"""The product of few rows with a 4-bit matrix on a CPU: some columns at a time.

    for each tile of columns:   y[:, tile] = x @ dequantize(w[:, tile])

A tile of float32 numbers, about a megabyte, is multiplied while it is in the core's cache; the whole matrix would be written
to memory and read back, 16 times the packed bytes. In bfloat16, too, numbers stay float32: to round them would take longer
than a product of a few rows does. For more rows than decoding has, the product itself takes the time.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.tensor import QuantizedTensor, block_scales, dequantize_in_vectors

_VALUES = 2**18  # of a tile
_VECTOR = 16  # float32 numbers of the widest vector unit


def matmul(x: Array, w: QuantizedTensor) -> Array:
    """x `[M, in]` times a matrix in the column layout, in the dtype of x."""
    rows, columns = w.shape
    width = tile_width(rows, columns)
    scales, exact = jax.lax.optimization_barrier(block_scales(w)), x.astype(jnp.float32)

    def of_tile(_: None, start: Array) -> tuple[None, Array]:
        codes, tile_scales = (jax.lax.dynamic_slice_in_dim(array, start, width, axis=1) for array in (w.codes, scales))
        values = dequantize_in_vectors(codes, tile_scales, w.data_type)
        return None, einsum("nk,km->nm", exact, values)

    _, parts = jax.lax.scan(of_tile, None, width * jnp.arange(columns // width))
    return parts.swapaxes(0, 1).reshape(x.shape[0], columns).astype(x.dtype)


def tile_width(rows: int, columns: int) -> int:
    """Columns of a tile: as many as divide the matrix evenly in whole vectors and make about `_VALUES`; else all."""
    most = max(4 * _VECTOR, _VALUES // rows)
    widths = [width for width in range(_VECTOR, min(most, columns) + 1, _VECTOR) if columns % width == 0]
    return max(widths, default=columns)
