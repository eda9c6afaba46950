"""The product of few rows with a 4-bit matrix on a CPU, computed for one tile of columns at a time.

    for each tile of columns:   y[:, tile] = x @ dequantize(w[:, tile])

A tile of float32 numbers, about a megabyte, is multiplied while it is in the core's cache. The complete dense matrix would
have to be written to memory and read back, which is 16 times the packed bytes. The numbers are float32 even if x is
bfloat16, because rounding them would take longer than the product with a few rows. With more rows than in decoding, the
product itself takes most of the time, and tiles do not help.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.tensor import QuantizedTensor, block_scales, dequantize_in_vectors

_VALUES = 2**18  # number of values in a tile
_VECTOR = 16  # float32 numbers in the widest vector registers


def matmul(x: Array, w: QuantizedTensor) -> Array:
    """Return x `[M, in]` times a matrix `[in, out]` in the column layout, `[M, out]` in the dtype of x."""
    rows, columns = w.shape
    width = tile_width(rows, columns)
    scales, exact = jax.lax.optimization_barrier(block_scales(w)), x.astype(jnp.float32)

    def multiply_tile(_: None, start: Array) -> tuple[None, Array]:
        codes, tile_scales = (jax.lax.dynamic_slice_in_dim(array, start, width, axis=1) for array in (w.codes, scales))
        values = dequantize_in_vectors(codes, tile_scales, w.data_type)
        return None, einsum("nk,km->nm", exact, values)

    _, parts = jax.lax.scan(multiply_tile, None, width * jnp.arange(columns // width))
    return parts.swapaxes(0, 1).reshape(x.shape[0], columns).astype(x.dtype)


def tile_width(rows: int, columns: int) -> int:
    """Return the number of columns of a tile.

    It is a multiple of the vector size that divides the columns and gives about `_VALUES` values, or else all columns.
    """
    most = max(4 * _VECTOR, _VALUES // rows)
    widths = [width for width in range(_VECTOR, min(most, columns) + 1, _VECTOR) if columns % width == 0]
    return max(widths, default=columns)
