"""The product with a 4-bit matrix as Pallas TPU kernels, which read only packed bytes from memory.

    forward   y[M, N]  = x[M, K] W          grid (columns, rows of x)         W[K, tile] in vector memory
    gradient  dx[M, K] = dy[M, N] W^T       grid (half, rows of W, rows)      W[tile, N] in vector memory

A byte holds row j in its high nibble and row j + K/2 in its low one, so x is read as two blocks, the left and the right
half:

    y = x[:, :K/2] high(codes) + x[:, K/2:] low(codes)

A packed tile is dequantised once, at the first block of rows, and multiplied with all blocks of rows. If there is only one
block of rows (decoding), the values go directly to the matrix unit, chunk by chunk.

Codes are looked up as in tpu_lookup.py, and the scales of a tile of columns are computed once (tpu_scales.py).

A stack of matrices `[layers, ...]` is passed to the kernel as a whole, with the index of the layer; the block specs select
the layer. If XLA sliced the layer out first, the packed bytes would be read, written and read again.
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

from qlora_jax.quant.kernels.operands import Static, stacked, static
from qlora_jax.quant.kernels.tpu_lookup import lookup_tables, scaled_values
from qlora_jax.quant.kernels.tpu_scales import scale_operands, write_scales
from qlora_jax.quant.tensor import QuantizedTensor

_LANES = 128
_ROWS = 256  # the most rows of x in a block
_FEW_ROWS = 64  # up to this number of rows there is one block
_TILE_BYTES = 2**20  # of packed codes in a grid step: large enough for fast copies, small enough for a quick start
_MOST_UNROLLED = 4096  # rows of W, if the halves of x do not begin at a lane 0
_VMEM_BUDGET = 40 * 2**20  # of the 64 MiB (v5p) or 128 MiB (v5e, v6e) of vector memory
_VMEM_LIMIT = 56 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one grid step.

    Attributes:
        rows: number of rows of x or dy.
        tile: number of columns of W in the forward pass, of packed rows of W in the gradient.
        chunk: number of packed rows that are unpacked at a time.
    """

    rows: int
    tile: int
    chunk: int


def unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the kernels do not support this matrix (or stack) with x of `dtype`, or None if they do."""
    rows, columns = w.shape[-2:]
    if w.flat_shape is not None:
        return "the flat layout"
    if w.block_size not in (64, 128):
        return f"blocks of {w.block_size}: expected 64 or 128"
    if columns % _LANES:
        return f"a matrix [{rows}, {columns}]: expected a multiple of {_LANES} columns"
    if (rows // 2) % _LANES and rows > _MOST_UNROLLED:
        return f"a matrix [{rows}, {columns}]: expected at most {_MOST_UNROLLED} rows or a multiple of {2 * _LANES}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"x in {jnp.dtype(dtype).name}: expected float32 or bfloat16"
    return None


def transposed_unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the kernel of the gradient does not support this matrix (or stack), or None if it does."""
    if w.shape[-2] % (2 * _LANES):
        return f"the gradient with a matrix {list(w.shape[-2:])}: expected a multiple of {2 * _LANES} rows"
    return unsupported_reason(w, dtype)


def matmul(x: Array, w: QuantizedTensor, layer: Array | None = None, *, interpret: Any = False) -> Array:
    """Return x `[M, in]` times W in the dtype of x; if `w` is a stack, `layer`, int32 scalar, is the index of the matrix."""
    w, index = in_hbm(w, layer, interpret)
    count, columns = x.shape[0], w.shape[-1]
    tiles = forward_tiles(count, w, x.dtype)
    inner = w.codes.shape[1]
    if inner % _LANES:  # the halves of x are blocks only as arrays of their own
        halves = [pl.BlockSpec((tiles.rows, inner), lambda n, m, _: (m, 0))] * 2
        parts = [x[:, :inner], x[:, inner:]]
    else:
        halves = [pl.BlockSpec((tiles.rows, inner), lambda n, m, _, half=half: (m, half)) for half in range(2)]
        parts = [x, x]
    scales, scale_specs = scale_operands(w, index, tiles.tile, lambda n, m, *_: n)
    one_block = count <= tiles.rows
    scratch = [pltpu.VMEM((w.scales.shape[1], tiles.tile), jnp.float32)]
    if not one_block:
        scratch.append(pltpu.VMEM((2 * inner, tiles.tile), x.dtype))
    return pl.pallas_call(
        partial(_forward, w=static(w), tiles=tiles, one_block=one_block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(columns, tiles.tile), pl.cdiv(count, tiles.rows)),
            in_specs=[
                *halves,
                pl.BlockSpec((1, inner, tiles.tile), lambda n, m, layer: (layer[0], 0, n)),
                *scale_specs,
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.tile), lambda n, m, _: (m, n)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((count, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT),
        name="matmul_4bit",
        interpret=interpret,
    )(index, *parts, w.codes, *scales)


def matmul_transposed(dy: Array, w: QuantizedTensor, layer: Array | None = None, *, interpret: Any = False) -> Array:
    """Return dy `[M, out]` times the transposed W in the dtype of dy."""
    w, index = in_hbm(w, layer, interpret)
    count, columns = dy.shape
    inner = w.codes.shape[1]
    tiles = gradient_tiles(count, w, dy.dtype)
    scales, scale_specs = scale_operands(w, index, columns, lambda *_: 0)
    blocks = inner // tiles.tile
    return pl.pallas_call(
        partial(_gradient, w=static(w), tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2, blocks, pl.cdiv(count, tiles.rows)),
            in_specs=[
                pl.BlockSpec((tiles.rows, columns), lambda half, k, m, _: (m, 0)),
                pl.BlockSpec((1, tiles.tile, columns), lambda half, k, m, layer: (layer[0], k, 0)),
                *scale_specs,
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.tile), lambda half, k, m, _: (m, half * blocks + k)),
            scratch_shapes=[
                pltpu.VMEM((w.scales.shape[1], columns), jnp.float32),
                pltpu.VMEM((tiles.tile, columns), dy.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((count, 2 * inner), dy.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        name="matmul_4bit_transposed",
        interpret=interpret,
    )(index, dy, w.codes, *scales)


def forward_tiles(count: int, w: QuantizedTensor, dtype: Any) -> Tiles:
    """Return the tiles of `matmul`: about a megabyte of codes in a grid step, and all operands fit into vector memory."""
    inner, columns = w.codes.shape[-2:]
    width = jnp.dtype(dtype).itemsize
    rows = count if count <= _FEW_ROWS else _ROWS
    group = math.gcd(w.block_size, inner)
    sizes = (128, 256) if inner % _LANES == 0 else range(group, 257, group)
    chunk = max(size for size in sizes if inner % size == 0)
    tile = _LANES
    while 2 * tile <= columns and 2 * tile * inner <= (_TILE_BYTES if count <= _FEW_ROWS else 4 * _TILE_BYTES):
        tile *= 2
    while rows > 64 and _forward_bytes(rows, tile, inner, width) > _VMEM_BUDGET:
        rows, tile = (rows // 2, tile) if tile == _LANES or rows * 2 > tile else (rows, tile // 2)
    return Tiles(rows, tile, chunk)


def gradient_tiles(count: int, w: QuantizedTensor, dtype: Any) -> Tiles:
    """Return the tiles of `matmul_transposed`."""
    inner, columns = w.codes.shape[-2:]
    width = jnp.dtype(dtype).itemsize
    rows, tile = min(_ROWS, -(-count // 16) * 16), max(size for size in (128, 256, 512) if inner % size == 0)

    def needed(rows: int, tile: int) -> int:
        return columns * (2 * tile + width * tile + 2 * width * rows + 6 * w.scales.shape[-2]) + 8 * rows * tile

    while rows > 32 and needed(rows, tile) > _VMEM_BUDGET:
        rows, tile = (rows // 2, tile) if tile == _LANES or rows >= tile else (rows, tile // 2)
    if count < rows:
        rows = count
    return Tiles(rows, tile, min(tile, 128))


def _forward_bytes(rows: int, tile: int, inner: int, width: int) -> int:
    return 2 * inner * tile + 2 * inner * tile * width + 4 * rows * inner * width + 8 * rows * tile


def in_hbm(w: QuantizedTensor, layer: Array | None, interpret: Any) -> tuple[QuantizedTensor, Array]:
    """Return the result of `stacked`, with a stack constrained to HBM.

    XLA does not know that the kernel reads only one layer of the stack. If the stack fits into vector memory, XLA would copy
    all of it there for every layer.
    """
    if layer is not None and not interpret:
        codes, scales = (pltpu.with_memory_space_constraint(leaf, pltpu.HBM) for leaf in (w.codes, w.scales))
        w = dataclasses.replace(w, codes=codes, scales=scales)
    return stacked(w, layer)


def _dot(x: Array, w: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, w, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _forward(
    _: Any, left: Any, right: Any, codes: Any, scales: Any, *refs: Any, w: Static, tiles: Tiles, one_block: bool
) -> None:
    rest, (out, scratch, *dense) = refs[:2] if w.double_quantized else (), refs[2:] if w.double_quantized else refs
    inner, chunk, shift = codes.shape[1], tiles.chunk, w.block_size.bit_length() - 1
    group = math.gcd(w.block_size, inner)  # rows that share a scale in both halves: a block, or half of one
    first_column = pl.program_id(0) * tiles.tile

    def unpacked(number: Any) -> tuple[Array, Array]:
        """Return the dequantised chunk with this number: the rows in the high nibbles, and those in the low ones."""
        packed = codes[0, pl.ds(pl.multiple_of(number * chunk, chunk), chunk), :].astype(jnp.int32)
        starts = [number * chunk + start for start in range(0, chunk, group)]
        high = scaled_values(packed >> 4, scratch, [start >> shift for start in starts], slice(None), tables)
        low = scaled_values(packed & 15, scratch, [(inner + start) >> shift for start in starts], slice(None), tables)
        return high.astype(left.dtype), low.astype(left.dtype)

    if one_block:
        write_scales(scales, rest, scratch, slice(None), first_column, w)
        tables = lookup_tables(w.data_type, tiles.tile)

        def add(number: Any, total: Array) -> Array:
            high, low = unpacked(number)
            at = pl.ds(pl.multiple_of(number * chunk, chunk), chunk)
            return total + _dot(left[:, at], high) + _dot(right[:, at], low)

        total = jnp.zeros(out.shape, jnp.float32)
        if chunk % _LANES == 0:
            total = jax.lax.fori_loop(0, inner // chunk, add, total)
        else:  # slices of x that do not begin at a lane 0 must be static
            for number in range(inner // chunk):
                high, low = unpacked(number)
                at = pl.ds(number * chunk, chunk)
                total += _dot(left[:, at], high) + _dot(right[:, at], low)
        out[...] = total.astype(out.dtype)
        return

    matrix = dense[0]
    tables = lookup_tables(w.data_type, tiles.tile)

    @pl.when(pl.program_id(1) == 0)
    def _unpack() -> None:
        write_scales(scales, rest, scratch, slice(None), first_column, w)

        def write(number: Any, carry: None) -> None:
            high, low = unpacked(number)
            matrix[pl.ds(pl.multiple_of(number * chunk, chunk), chunk), :] = high
            matrix[pl.ds(pl.multiple_of(inner + number * chunk, chunk), chunk), :] = low
            return carry

        jax.lax.fori_loop(0, inner // chunk, write, None)

    out[...] = (_dot(left[...], matrix[:inner]) + _dot(right[...], matrix[inner:])).astype(out.dtype)


def _gradient(_: Any, dy: Any, codes: Any, scales: Any, *refs: Any, w: Static, tiles: Tiles) -> None:
    rest, (out, scratch, matrix) = refs[:2] if w.double_quantized else (), refs[2:] if w.double_quantized else refs
    half, block, rows = (pl.program_id(axis) for axis in range(3))
    chunk, columns = tiles.chunk, codes.shape[2]
    width = max(size for size in (128, 256, 512) if columns % size == 0)  # number of columns unpacked at a time

    def by_columns(body: Any) -> None:
        def one(number: Any, carry: None) -> None:
            body(number * width, pl.ds(pl.multiple_of(number * width, width), width))
            return carry

        jax.lax.fori_loop(0, columns // width, one, None)

    @pl.when((half == 0) & (block == 0) & (rows == 0))
    def _scale() -> None:
        by_columns(lambda first, at: write_scales(scales, rest, scratch, at, first, w))

    @pl.when(rows == 0)
    def _unpack() -> None:
        tables = lookup_tables(w.data_type, width)

        def unpack(_: Any, at: Any) -> None:
            for number in range(tiles.tile // chunk):
                packed = codes[0, pl.ds(number * chunk, chunk), at].astype(jnp.int32)
                code = jnp.where(half == 0, packed >> 4, packed & 15)
                scale = half * (w.scale_rows // 2) + block * (tiles.tile // w.block_size) + number * chunk // w.block_size
                scale_rows = [scale + group for group in range(chunk // w.block_size)]
                values = scaled_values(code, scratch, scale_rows, at, tables)
                matrix[pl.ds(number * chunk, chunk), at] = values.astype(matrix.dtype)

        by_columns(unpack)

    out[...] = _dot(dy[...], matrix[...], (1, 1)).astype(out.dtype)
