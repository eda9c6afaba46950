"""The dequantisation of a 4-bit matrix as a Pallas TPU kernel, for products of many rows, which XLA computes.

    grid (columns, packed rows)         packed [rows, tile] -> dense [2, rows, tile]

A byte holds row j in its high nibble and row j + K/2 in its low one, so the kernel writes the matrix as `[2, K/2, N]`, the
rows of the high nibbles and those of the low ones, which is `[K, N]` without a copy. It reads packed bytes and scales and
writes dense values, each once: 2.5 bytes per value in bfloat16. XLA's own dequantisation spreads the float32 scales out in
memory first, which is more than the dense matrix.

A product of many rows is limited by the matrix unit, and XLA's product of two dense matrices keeps that unit busy. Reading
the dense matrix again takes less time than the product then.

The scales of a tile of columns are computed once, at its first rows (tpu_scales.py). Blocks may begin in the middle of the
lower half's first row (K/2 need not be a multiple of the block size), so scales belong to groups of half a block there.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qlora_jax.quant.kernels.operands import Static, static
from qlora_jax.quant.kernels.tpu import in_hbm
from qlora_jax.quant.kernels.tpu_lookup import lookup_tables, scaled_values
from qlora_jax.quant.kernels.tpu_scales import scale_operands, spans_of, write_scales
from qlora_jax.quant.tensor import QuantizedTensor

_LANES = 128
_SUBLANES = 32  # rows of a register of bytes
_LEAST = 128  # packed rows, and columns, of the smallest matrix that is worth a kernel
_MOST_ROWS = 1024  # packed rows in a tile
_TILE_BYTES = 2**21  # of dense values in a grid step
_WASTE = 1 / 16  # the largest share of a tile's rows or columns that may lie outside of the matrix


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one grid step.

    Attributes:
        rows: number of packed rows.
        columns: number of columns.
        chunk: number of packed rows that are unpacked at a time.
        group: number of successive rows that share a scale in both halves.
        width: number of columns that are unpacked at a time.
    """

    rows: int
    columns: int
    chunk: int
    group: int
    width: int


def unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the kernel does not support this matrix (or stack) in `dtype`, or None if it does."""
    rows, columns = w.shape[-2:]
    if w.flat_shape is not None:
        return "the flat layout"
    if rows < 2 * _LEAST or columns < _LEAST:
        return f"a matrix [{rows}, {columns}]: expected at least [{2 * _LEAST}, {_LEAST}]"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"values in {jnp.dtype(dtype).name}: expected float32 or bfloat16"
    return None


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def dequantize(w: QuantizedTensor, layer: Array | None = None, *, dtype: DTypeLike, interpret: Any = False) -> Array:
    """Return the dense matrix `[in, out]`; if `w` is a stack, `layer`, int32 scalar, is the index of the matrix."""
    w, index = in_hbm(w, layer, interpret)
    inner, columns = w.codes.shape[1:]
    tiles = tiles_of(w, dtype)
    scales, scale_specs = scale_operands(w, index, tiles.columns, lambda n, *_: n)
    dense = pl.pallas_call(
        partial(_dequantize, w=static(w), tiles=tiles, inner=inner),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(columns, tiles.columns), pl.cdiv(inner, tiles.rows)),
            in_specs=[
                pl.BlockSpec((1, tiles.rows, tiles.columns), lambda n, k, layer: (layer[0], k, n)),
                *scale_specs,
            ],
            out_specs=pl.BlockSpec((2, tiles.rows, tiles.columns), lambda n, k, _: (0, k, n)),
            scratch_shapes=[pltpu.VMEM((w.scales.shape[1], tiles.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((2, inner, columns), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved_bytes(w, dtype)),
        name="dequantize_4bit",
        interpret=interpret,
    )(index, w.codes, *scales)
    return dense.reshape(2 * inner, columns)


def moved_bytes(w: QuantizedTensor, dtype: DTypeLike) -> int:
    """Return the bytes that the kernel reads and writes for one matrix of a stack."""
    inner, columns = w.codes.shape[-2:]
    rows = w.scales.shape[-2]
    absmax = 4 * spans_of(rows) if w.double_quantized else 0
    packed = inner + rows * w.scales.dtype.itemsize + absmax
    return columns * (packed + 2 * inner * jnp.dtype(dtype).itemsize)


def tiles_of(w: QuantizedTensor, dtype: DTypeLike) -> Tiles:
    """Return the tiles of `dequantize`: about two megabytes of dense values in a grid step."""
    inner, columns = w.codes.shape[-2:]
    group = math.gcd(w.block_size, inner)  # the block size, or half of it
    # A tile begins with a block of the upper half, or is a part of one.
    most = _MOST_ROWS // 2
    unit = w.block_size if w.block_size <= min(inner, most) else min(group, most)
    rows = _size(inner, unit, _MOST_ROWS)
    # Mosaic does not load a single register's width at a dynamic row out of a wider tile: wider tiles have an even number.
    lanes = _LANES if columns < 2 * _LANES else 2 * _LANES
    tile = _size(columns, lanes, max(_TILE_BYTES // (2 * rows * jnp.dtype(dtype).itemsize), lanes))
    chunk = min(max(group, _SUBLANES), _LANES)
    return Tiles(rows, tile, chunk, min(group, chunk), math.gcd(tile, 256))


def _size(total: int, unit: int, most: int) -> int:
    """Return the largest multiple of `unit` up to `most` such that tiles of that size waste little of their last one."""
    sizes = range(unit, max(min(most, total), unit) + 1, unit)
    waste = {size: pl.cdiv(total, size) * size / total - 1 for size in sizes}
    allowed = max(_WASTE, min(waste.values()))
    return max(size for size in sizes if waste[size] <= allowed)


def _dequantize(_: Any, codes: Any, scales: Any, *refs: Any, w: Static, tiles: Tiles, inner: int) -> None:
    rest, (out, scratch) = refs[:2] if w.double_quantized else (), refs[2:] if w.double_quantized else refs
    first_column, first_row = pl.program_id(0) * tiles.columns, pl.program_id(1) * tiles.rows
    last_scale = w.scale_rows - 1
    shift = w.block_size.bit_length() - 1

    @pl.when(pl.program_id(1) == 0)
    def _scale() -> None:
        def write(number: Any, carry: None) -> None:
            column = number * tiles.width
            at = pl.ds(pl.multiple_of(column, tiles.width), tiles.width)
            write_scales(scales, rest, scratch, at, first_column + column, w)
            return carry

        jax.lax.fori_loop(0, tiles.columns // tiles.width, write, None)

    tables = lookup_tables(w.data_type, tiles.width)

    def unpack(number: Any, carry: None) -> None:
        at = pl.ds(pl.multiple_of(number * tiles.chunk, tiles.chunk), tiles.chunk)
        row = first_row + number * tiles.chunk
        starts = [row + offset for offset in range(0, tiles.chunk, tiles.group)]
        for column in range(0, tiles.columns, tiles.width):
            columns = pl.ds(column, tiles.width)
            packed = codes[0, at, columns].astype(jnp.int32)
            for half, code in enumerate((packed >> 4, packed & 15)):
                # The last tile may extend beyond the matrix, where there are no scales.
                scale_rows = [jnp.minimum((half * inner + start) >> shift, last_scale) for start in starts]
                values = scaled_values(code, scratch, scale_rows, columns, tables)
                out[half, at, columns] = values.astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, tiles.rows // tiles.chunk, unpack, None)
