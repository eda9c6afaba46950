"""The product with a 4-bit matrix as a Pallas kernel for NVIDIA GPUs (Triton), which reads only packed bytes from memory.

    y[M, N] = x[M, K] W          grid (tiles of 128 columns, parts of K, blocks of at most 64 rows of x)

A byte holds row j in its high nibble and row j + K/2 in its low one, and each block of 64 (or 128) rows of a column shares a
scale. A program processes its part of K block by block. A block of packed rows contains one block of the upper and one block
of the lower half of W:

    y += (x[:, j : j + 64] high(codes)) * scales of the upper block + (x[:, K/2 + j : …] low(codes)) * those of the lower one

A scale (exact in float32) is multiplied with a sum of 64 products and not with each value. XLA sums the parts of K. With few
rows of x, the columns of W are along the long side of the matrix units: y^T = W^T x^T.

lookup_ptx.py looks codes up. If x is float32, a value is the sum of three bfloat16 numbers, which is exact.

The order of columns. A thread needs columns g, g + 8, g + 64 and g + 72 of a tile. The columns are permuted so that these
are neighbours in memory (`_permutation`), because shared memory is read by words and not by bytes.

With double quantisation, scales are looked up in the map of 256 values, and the absmax of each group of 256 scales is read
from memory. Both are read one step before they are used. A stack of matrices is passed to the kernel as a whole, with the
index of the layer to read.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from qlora_jax.quant.codebooks import DataType, codebook, dynamic_map
from qlora_jax.quant.kernels.lookup_ptx import lookup_ptx, tables
from qlora_jax.quant.kernels.operands import Static, stacked, static
from qlora_jax.quant.tensor import QuantizedTensor

TILE = 128  # columns of W in a tile
_MOST_ROWS = 64  # the most rows of x in a program
_LEAST_BLOCKS = 4  # the fewest blocks of packed rows in a part of K


@dataclasses.dataclass(frozen=True)
class Grid:
    """The division of a product into programs.

    Attributes:
        rows: number of rows of x in a program, a power of two.
        parts: number of parts of K.
        blocks: number of blocks of packed rows in a part.
        unroll: number of blocks in a step of the loop.
        piece: number of rows of a block that are multiplied at a time.
        warps: number of warps of a program.
        stages: number of stages of the pipeline that loads from memory.
    """

    rows: int
    parts: int
    blocks: int
    unroll: int
    piece: int
    warps: int
    stages: int


def unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the kernel does not support this matrix (or stack) with x of `dtype`, or None if it does."""
    rows, columns = w.shape[-2:]
    if w.flat_shape is not None:
        return "the flat layout"
    if w.block_size not in (64, 128):
        return f"blocks of {w.block_size}: expected 64 or 128"
    if rows % w.block_size or columns % TILE:
        return f"a matrix [{rows}, {columns}]: expected multiples of {w.block_size} and {TILE}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"x in {jnp.dtype(dtype).name}: expected float32 or bfloat16"
    if jnp.dtype(dtype) == jnp.float32 and w.block_size != 64:  # would need more shared memory than small GPUs have
        return f"x in float32 with blocks of {w.block_size}: expected 64"
    if 2**31 < w.codes.size <= 2**32:  # Pallas uses 32-bit indices up to this size, which Triton treats as signed
        return f"a stack of {w.codes.size / 2**30:.1f} GiB: expected at most 2 or more than 4"
    return None


def matmul(x: Array, w: QuantizedTensor, layer: Array | None = None, *, interpret: bool = False) -> Array:
    """Return x `[M, in]` times W in the dtype of x; if `w` is a stack, `layer`, int32 scalar, is the index of the matrix."""
    w, index = stacked(w, layer)
    count, columns = x.shape[0], w.shape[-1]
    grid = grid_of(count, w, x.dtype)
    operands = [index, x, w.codes, w.scales]
    if w.scale_absmax is not None and w.scale_offset is not None:
        layers = w.codes.shape[0]
        operands += [w.scale_absmax.reshape(layers, 1, -1), w.scale_offset.reshape(layers, 1, 1), jnp.asarray(dynamic_map())]
    if interpret:
        operands.append(jnp.asarray(codebook(w.data_type)))
    y = pl.pallas_call(
        partial(_product, w=static(w), grid=grid, interpreted=interpret),
        grid=(columns // TILE, grid.parts, pl.cdiv(count, grid.rows)),
        out_shape=jax.ShapeDtypeStruct((grid.parts, count, columns), x.dtype if grid.parts == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=grid.warps, num_stages=grid.stages),
        name="matmul_4bit",
        interpret=interpret,
    )(*operands)
    return y[0] if grid.parts == 1 else y.sum(0).astype(x.dtype)


def grid_of(count: int, w: QuantizedTensor, dtype: DTypeLike) -> Grid:
    """Return the programs for `count` rows of x.

    There are enough programs to fill a large GPU, and fewer parts of K for more rows, because the parts have to be summed.
    """
    exact = jnp.dtype(dtype) == jnp.float32  # does not use the matrix units; sums and operands fill the registers
    rows = min(16 if exact else _MOST_ROWS, max(8, 1 << (count - 1).bit_length()))
    size = rows_of_block(w.block_size, w.codes.shape[-2])
    blocks = w.codes.shape[-2] // size
    programs = w.shape[-1] // TILE * -(-count // rows)
    wanted = max(128, 4096 // rows)
    parts = max(
        n
        for n in range(1, blocks + 1)
        if n == 1 or (blocks % n == 0 and blocks // n >= _LEAST_BLOCKS and programs * n <= wanted)
    )
    unroll = 2 if w.block_size == 64 and rows < 64 and not exact and (blocks // parts) % 2 == 0 else 1
    # The stages fit into the 99 KiB of shared memory of small GPUs.
    stages = (2 if w.block_size == 64 else 1) if exact else 3 if rows * w.block_size > 4096 else 4
    return Grid(rows, parts, blocks // parts, unroll, min(32 if exact else 64, size), 4 if rows < 32 else 8, stages)


def rows_of_block(block_size: int, packed_rows: int) -> int:
    """Return the number of packed rows that share a scale in both halves: a block, or half of one.

    It is half of a block if the lower half of the matrix begins in the middle of a block.
    """
    return math.gcd(block_size, packed_rows)


def _product(index: Any, x: Any, codes: Any, scales: Any, *refs: Any, w: Static, grid: Grid, interpreted: bool) -> None:
    *rest, out = refs
    absmax, offset, dynamic = rest[:3] if w.double_quantized else (out, out, out)  # not read without double quantisation
    values = partial(_from_table, rest[-1]) if interpreted else partial(_values, data_type=w.data_type)
    layer, inner, shift = index[0], codes.shape[1], w.block_size.bit_length() - 1
    size = rows_of_block(w.block_size, inner)
    first_column = pl.program_id(0) * TILE
    first_block = pl.program_id(1) * grid.blocks
    first_row = pl.program_id(2) * grid.rows
    inside = (first_row + jnp.arange(grid.rows) < x.shape[0])[:, None]
    columns = first_column + _permutation()
    subtracted = offset[layer, 0, 0] if w.double_quantized else 0.0

    def read_scales(block: Array) -> tuple[tuple[Array, ...], ...]:
        """Return (codes, absmax), or (scales,), of the upper and of the lower rows of a block of packed rows."""

        def read(row: Array) -> tuple[Array, ...]:
            found = triton.load(scales.at[layer, row, columns])
            if not w.double_quantized:
                return (found,)
            return found, triton.load(absmax.at[layer, 0, (columns * w.scale_rows + row) >> 8])  # groups of 256

        return read((block * size) >> shift), read((inner + block * size) >> shift)

    def scale(found: Array, group: Array | None = None) -> Array:
        if group is None:
            return found[:, None]
        return (triton.load(dynamic.at[found.astype(jnp.int32)]) * group + subtracted)[:, None]

    def dot(matrix: Array, row: Array) -> Array:
        """Return rows of W, transposed, times the transposed columns of x from `row` on: `[columns, rows of x]`."""
        part = triton.load(x.at[pl.ds(first_row, grid.rows), pl.ds(row, grid.piece)], mask=inside, other=0.0)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot(_permute(matrix).T, part.T, precision=precision, preferred_element_type=jnp.float32)

    def step(number: Array, carry: Any) -> Any:
        total, ready = carry
        next_scales = []
        for index in range(grid.unroll):
            block = first_block + number * grid.unroll + index
            next_scales.append(read_scales(jnp.minimum(block + grid.unroll, inner // size - 1)))
            sums = []
            for piece in range(0, size, grid.piece):
                row = block * size + piece
                high, low = values(codes[layer, pl.ds(row, grid.piece), pl.ds(first_column, TILE)], dtype=x.dtype)
                sums.append((dot(high, row), dot(low, inner + row)))
            for half, ones in enumerate(zip(*sums, strict=True)):
                total += sum(ones[1:], ones[0]) * scale(*ready[index][half])
        return total, next_scales

    ready = [read_scales(first_block + index) for index in range(grid.unroll)]
    start = jnp.zeros((TILE, grid.rows), jnp.float32)
    total, _ = jax.lax.fori_loop(0, grid.blocks // grid.unroll, step, (start, ready))
    y = _permute_back(total.astype(out.dtype)).T
    triton.store(out.at[pl.program_id(1), pl.ds(first_row, grid.rows), pl.ds(first_column, TILE)], y, mask=inside)


# The permutation of a tile's columns, by the bits of a column's index, the highest first: (warp, warp, g, g, g, b, a) in
# memory corresponds to (b, warp, warp, a, g, g, g) in the threads' order.


def _permute(block: Array) -> Array:
    """Permute the columns of `[k, TILE]` from memory order to the threads' order."""
    parts = block.reshape(-1, TILE // 32, 8, 2, 2)
    return parts.transpose(0, 3, 1, 4, 2).reshape(-1, TILE)


def _permute_back(block: Array) -> Array:
    """Permute the rows of `[TILE, m]` from the threads' order to memory order."""
    parts = block.reshape(2, TILE // 32, 2, 8, -1)
    return parts.transpose(1, 3, 0, 2, 4).reshape(TILE, -1)


def _permutation() -> Array:
    """Return, for each column in the threads' order, its index in memory."""
    n = jnp.arange(TILE)
    warp, g, a, b = (n >> 4) & (TILE // 32 - 1), n & 7, (n >> 3) & 1, n // (TILE // 2)
    return warp * 32 + g * 4 + b * 2 + a


def _from_table(table: Any, packed: Array, *, dtype: Any) -> tuple[Array, Array]:
    """Return the values of the (high, low) nibbles of packed bytes from a table in memory; for interpret mode."""
    packed = packed.astype(jnp.int32)
    return triton.load(table.at[packed >> 4]).astype(dtype), triton.load(table.at[packed & 15]).astype(dtype)


def _values(packed: Array, *, data_type: DataType, dtype: Any) -> tuple[Array, Array]:
    """Compute `_from_table` in registers, by PTX instructions."""
    pairs = [
        triton.elementwise_inline_asm(
            lookup_ptx(table),
            args=[packed],
            constraints="=r,=r,=r,=r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int32)],
        )[0]
        for table in tables(data_type, dtype)
    ]
    if dtype == jnp.bfloat16:
        high, low = (jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype) for half in (pairs[0] >> 16, pairs[0]))
        return high, low
    large, middle, small = ((pair & -(2**16), pair << 16) for pair in pairs)

    def add(half: int) -> Array:
        upper, rest, last = (jax.lax.bitcast_convert_type(part[half], dtype) for part in (large, middle, small))
        return upper + (rest + last)

    return add(0), add(1)
