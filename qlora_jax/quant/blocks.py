"""The conversion between bitsandbytes' layout of a quantised matrix and the layout in tensor.py, bit for bit.

    codes    row-major over [out, in], two codes in a byte, the first in the high nibble
    scales   one for each block, in the order of the blocks; `scale_absmax` has one for each 256 of them

The layouts differ only in the order of codes and scales, so the conversion changes no value.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt8

from qlora_jax.quant.codebooks import DataType
from qlora_jax.quant.tensor import QuantizedTensor, pack, unpack


@partial(jax.jit, static_argnames=("shape", "data_type", "block_size", "dtype"))
def from_blocks(
    packed: UInt8[Array, " bytes"],
    scales: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    scale_absmax: Float32[Array, " groups"] | None,
    scale_offset: Float32[Array, ""] | None,
    *,
    shape: tuple[int, int],
    data_type: DataType,
    block_size: int,
    dtype: DTypeLike,
) -> QuantizedTensor:
    """Return a matrix that bitsandbytes stores in the layout of `QuantizedTensor`.

    Args:
        packed: uint8 `[(in * out + 1) // 2]`, the codes.
        scales: `[blocks]`, uint8 with double quantisation, else float32.
        scale_absmax: float32 `[ceil(blocks / 256)]` with double quantisation, else None.
        scale_offset: float32 scalar with double quantisation, else None.
        shape: (in, out).
        data_type: the data type of the codes.
        block_size: number of values that share a scale.
        dtype: dtype that `dequantize` returns by default.
    """
    rows, columns = shape
    codes = jnp.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: rows * columns]
    codes = pack(codes.reshape(columns, rows).T, block_size)
    flat = rows % block_size != 0
    return QuantizedTensor(
        codes=codes,
        scales=scales if flat else scales.reshape(columns, rows // block_size).T,
        scale_absmax=scale_absmax,
        scale_offset=scale_offset,
        data_type=data_type,
        block_size=block_size,
        dtype=jnp.dtype(dtype),
        flat_shape=shape if flat else None,
    )


@jax.jit
def to_blocks(
    q: QuantizedTensor,
) -> tuple[UInt8[Array, " bytes"], UInt8[Array, " blocks"] | Float32[Array, " blocks"]]:
    """Return (packed, scales) of one matrix in bitsandbytes' layout; `scale_absmax` and `scale_offset` do not change."""
    rows, columns = q.shape
    codes = unpack(q)
    codes = (codes.T if q.flat_shape is None else codes).reshape(-1)[: rows * columns]
    pairs = jnp.pad(codes, (0, codes.size % 2)).reshape(-1, 2)
    packed = (pairs[:, 0] << 4) | pairs[:, 1]
    return packed, q.scales if q.flat_shape is not None else q.scales.T.reshape(-1)
