"""The product with a 4-bit matrix as a Pallas kernel for NVIDIA's Hopper GPUs (Mosaic GPU), for products of many rows.

    y[M, N]  = x[M, K] W           grid (tiles of 128 columns of W, tiles of rows of x)
    dx[M, K] = dy[M, N] W^T        grid (tiles of 64 packed rows of W, tiles of rows of dy)

The dense matrix exists tile by tile in shared memory only, so that a product reads packed bytes, scales and x, and writes y.
A program multiplies a tile of up to 256 rows. It consists of three warpgroups, which work at the same time:

    loads        TMA copies of packed tiles [64, 128] and their scales, three of them ahead, and of tiles of x, two ahead
    two halves   each converts half of a packed tile to bfloat16 in shared memory, and multiplies half of the rows by all of
                 it

A byte holds row j in its high nibble and row j + K/2 in its low one: a packed tile is two dense tiles [64, 128], which are
kept one above the other, `[128, 128]`. The forward product multiplies the columns j… and j + K/2… of x by the upper and by
the lower one. The transposed product sums over the 128 columns, in two steps of 64, and yields columns j… and j + K/2… of
dx.

    step s:     convert tile s, while the matrix unit multiplies tile s - 1
                wait for the own product of tile s - 1, then for the other half: now tile s is complete, and nobody reads
                tile s - 1
                start the products of tile s

Codes are looked up as in gpu.py (`lookup_ptx`), four bytes at a time, in the codebook rounded to bfloat16. A value is
multiplied by its float32 scale and rounded. XLA computes the scales, `[K/block, N]`, which are a sixteenth of the packed
bytes with each byte read and written.

Mosaic GPU is imported when a program needs the kernel, since that takes seconds. In interpret mode the lookup is a chain of
selects, and the transposed product gets transposed tiles, as the interpreter has no transposed operands; all else is the
same program.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from qlora_jax.quant.codebooks import DataType
from qlora_jax.quant.kernels.hopper_lookup import looked_up_values, selected_values, word_layout
from qlora_jax.quant.kernels.operands import stacked
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.tensor import QuantizedTensor, block_scales

PACKED_ROWS = 64  # of a tile of codes
COLUMNS = 128  # of a tile of codes
_HALF = 64  # columns of x, or of the result, that belong to one half of the packed rows or of the columns
_AHEAD_X, _AHEAD_CODES = 2, 3  # tiles in shared memory; they fit into the 227 KiB of a program
TILES_OF_ROWS = (128, 256)
_LOADS = 2  # the number of the warpgroup that loads


@dataclasses.dataclass(frozen=True)
class Product:
    """The static properties of a product.

    Attributes:
        rows: number of rows of x in a program, 128 or 256.
        row_tiles: number of tiles of rows.
        packed_rows: number of packed rows of W, half of its rows.
        columns: number of columns of W.
        block_size: number of values that share a scale.
        data_type: data type of the codes.
        transposed: whether W is transposed.
        interpreted: whether the kernel is interpreted.
    """

    rows: int
    row_tiles: int
    packed_rows: int
    columns: int
    block_size: int
    data_type: DataType
    transposed: bool
    interpreted: bool

    @property
    def tiles(self) -> int:
        """The number of tiles of result columns."""
        return self.packed_rows // PACKED_ROWS if self.transposed else self.columns // COLUMNS

    @property
    def steps(self) -> int:
        """The number of tiles of codes that a program multiplies by."""
        return self.columns // COLUMNS if self.transposed else self.packed_rows // PACKED_ROWS

    def codes(self, tile: Any, step: Any) -> tuple[Any, Any]:
        """Return (the first packed row, the first column) of a tile of codes."""
        row, column = (tile, step) if self.transposed else (step, tile)
        return row * PACKED_ROWS, column * COLUMNS

    def input_column(self, step: Any, half: int) -> Any:
        """Return the first of the 64 columns of x that a half of step's products multiplies."""
        if self.transposed:
            return step * COLUMNS + half * _HALF
        return step * PACKED_ROWS + half * self.packed_rows

    def output_column(self, tile: Any, half: int) -> Any:
        """Return the first of the 64 columns of the result that a half of a tile of results is."""
        if self.transposed:
            return tile * PACKED_ROWS + half * self.packed_rows
        return tile * COLUMNS + half * _HALF


def unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the kernel does not support this matrix (or stack) with x of `dtype`, or None if it does."""
    rows, columns = w.shape[-2:]
    if w.flat_shape is not None:
        return "the flat layout"
    if w.block_size % PACKED_ROWS:
        return f"blocks of {w.block_size}: expected a multiple of {PACKED_ROWS}"
    if rows % (2 * PACKED_ROWS) or columns % COLUMNS:
        return f"a matrix [{rows}, {columns}]: expected multiples of {2 * PACKED_ROWS} and {COLUMNS}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x in {jnp.dtype(dtype).name}: expected bfloat16"
    return None


def matmul(
    x: Array, w: QuantizedTensor, layer: Array | None = None, *, rows: int | None = None, interpret: Any = None
) -> Array:
    """Return x `[M, in]` times W in bfloat16; if `w` is a stack, `layer`, int32 scalar, is the index of the matrix.

    Args:
        x: bfloat16.
        w: a matrix or a stack that the kernel supports.
        layer: see above.
        rows: number of rows of a tile, one of `TILES_OF_ROWS`; None: what suits M.
        interpret: None, or the parameters of Mosaic GPU's interpret mode.
    """
    return _product(x, w, layer, rows=rows or rows_of_tile(x.shape[0]), transposed=False, interpret=interpret)


def matmul_transposed(
    dy: Array, w: QuantizedTensor, layer: Array | None = None, *, rows: int | None = None, interpret: Any = None
) -> Array:
    """Return dy `[M, out]` times the transposed W, like `matmul`."""
    return _product(dy, w, layer, rows=rows or rows_of_tile(dy.shape[0]), transposed=True, interpret=interpret)


def rows_of_tile(count: int) -> int:
    """Return the number of rows of a program for `count` rows: 256, or 128 where a good part of 256 would be padding."""
    return 256 if -(-count // 128) % 2 == 0 or count > 1024 else 128


@functools.partial(jax.jit, static_argnames=("rows", "transposed", "interpret"))  # a program lowers it once for each shape
def _product(x: Array, w: QuantizedTensor, layer: Array | None, *, rows: int, transposed: bool, interpret: Any) -> Array:
    from jax.experimental.pallas import mosaic_gpu as gpu

    w, index = stacked(w, layer)
    count = x.shape[0]
    row_tiles = -(-count // rows)
    product = Product(
        rows, row_tiles, w.codes.shape[1], w.shape[-1], w.block_size, w.data_type, transposed, interpret is not None
    )
    if padding := row_tiles * rows - count:
        x = jnp.pad(x, ((0, padding), (0, 0)))
    swizzled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    result_columns = w.shape[-2] if transposed else w.shape[-1]
    y: Array = gpu.kernel(
        functools.partial(_kernel, product=product, gpu=gpu),
        out_type=jax.ShapeDtypeStruct((row_tiles * rows, result_columns), jnp.bfloat16),
        grid=(product.tiles * row_tiles,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="matmul_4bit_transposed" if transposed else "matmul_4bit",
        scratch_types={
            "x_tiles": gpu.SMEM((_AHEAD_X, 2, rows, _HALF), jnp.bfloat16, transforms=swizzled),
            "code_tiles": gpu.SMEM((_AHEAD_CODES, PACKED_ROWS, COLUMNS), jnp.uint8),
            "scale_tiles": gpu.SMEM((_AHEAD_CODES, 2, COLUMNS), jnp.float32),
            "dense": gpu.SMEM((2, 2 * PACKED_ROWS, COLUMNS), jnp.bfloat16, transforms=swizzled),
            "x_loaded": gpu.Barrier(num_arrivals=2, num_barriers=_AHEAD_X),
            "x_used": gpu.Barrier(num_arrivals=2, num_barriers=_AHEAD_X),
            "codes_loaded": gpu.Barrier(num_arrivals=3, num_barriers=_AHEAD_CODES),
            "codes_used": gpu.Barrier(num_arrivals=2, num_barriers=_AHEAD_CODES),
            "converted": gpu.Barrier(num_arrivals=2),
        },
        compiler_params=gpu.CompilerParams(unsafe_no_auto_barriers=True),  # the barriers above order all accesses
        interpret=interpret,
    )(index, x, w.codes, block_scales(StackedTensor(w, index[0]).matrix()))
    return y[:count] if padding else y


def _kernel(index: Any, x: Any, codes: Any, scales: Any, out: Any, *, product: Product, gpu: Any, **scratch: Any) -> None:
    """Run one program: a tile of results, in three warpgroups."""
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    first_row = lax.rem(program, product.row_tiles) * product.rows
    tile = lax.div(program, product.row_tiles)

    @pl.when(warpgroup == _LOADS)
    def _load() -> None:
        gpu.set_max_registers(40, action="decrease")
        _load_tiles((index[0], x, codes, scales), (tile, first_row), product, gpu, scratch)

    @pl.when(warpgroup != _LOADS)
    def _compute() -> None:
        gpu.set_max_registers(232, action="increase")
        rows = product.rows // 2
        total = pl.run_scoped(
            functools.partial(_multiply, warpgroup=warpgroup, product=product, gpu=gpu, scratch=scratch),
            gpu.ACC((rows, COLUMNS), jnp.float32),
        )
        own = pl.ds(warpgroup * rows, rows)
        halves = [scratch["x_tiles"].at[0, half, own] for half in range(2)]  # no product reads them any more
        for half, staged in enumerate(halves):
            staged[...] = total[:, half * _HALF : (half + 1) * _HALF].astype(jnp.bfloat16)
        gpu.commit_smem()
        for half, staged in enumerate(halves):
            to = out.at[pl.ds(first_row + warpgroup * rows, rows), pl.ds(product.output_column(tile, half), _HALF)]
            gpu.copy_smem_to_gmem(staged, to)
        gpu.wait_smem_to_gmem(0)


def _load_tiles(operands: Any, place: Any, product: Product, gpu: Any, scratch: Any) -> None:
    """Copy the tiles of all steps into shared memory, each as soon as the tile in its place is no longer used."""
    (layer, x, codes, scales), (tile, first_row) = operands, place

    def load(step: Any, carry: None) -> None:
        slot = lax.rem(step, _AHEAD_CODES)
        _when(step >= _AHEAD_CODES, lambda: gpu.barrier_wait(scratch["codes_used"].at[slot]))
        row, column = product.codes(tile, step)
        columns, loaded = pl.ds(column, COLUMNS), scratch["codes_loaded"].at[slot]
        gpu.copy_gmem_to_smem(codes.at[layer, pl.ds(row, PACKED_ROWS), columns], scratch["code_tiles"].at[slot], loaded)
        for half in range(2):
            scale_row = lax.div(row + half * product.packed_rows, product.block_size)
            gpu.copy_gmem_to_smem(scales.at[scale_row, columns], scratch["scale_tiles"].at[slot, half], loaded)
        slot = lax.rem(step, _AHEAD_X)
        _when(step >= _AHEAD_X, lambda: gpu.barrier_wait(scratch["x_used"].at[slot]))
        for half in range(2):
            part = x.at[pl.ds(first_row, product.rows), pl.ds(product.input_column(step, half), _HALF)]
            gpu.copy_gmem_to_smem(part, scratch["x_tiles"].at[slot, half], scratch["x_loaded"].at[slot])
        return carry

    lax.fori_loop(0, product.steps, load, None)


def _multiply(total: Any, *, warpgroup: Any, product: Product, gpu: Any, scratch: Any) -> Array:
    """Return the products of half of the rows, summed in float32 over all steps: `[rows / 2, 128]`."""
    steps, rows = product.steps, pl.ds(warpgroup * (product.rows // 2), product.rows // 2)
    dense, x_tiles = scratch["dense"], scratch["x_tiles"]

    def meet() -> None:
        """Wait for the other half, which waits for this one."""
        gpu.barrier_arrive(scratch["converted"])
        gpu.barrier_wait(scratch["converted"])

    def step(number: Any, carry: None) -> None:
        slot, x_slot, place = lax.rem(number, _AHEAD_CODES), lax.rem(number, _AHEAD_X), lax.rem(number, 2)
        gpu.barrier_wait(scratch["codes_loaded"].at[slot])
        _convert(slot, dense.at[place], warpgroup, product, gpu, scratch)
        _when(number + _AHEAD_CODES < steps, lambda: gpu.barrier_arrive(scratch["codes_used"].at[slot]))
        gpu.commit_smem()
        gpu.wgmma_wait(0)
        meet()
        before = number - 1
        released = scratch["x_used"].at[lax.rem(before + _AHEAD_X, _AHEAD_X)]
        _when((before >= 0) & (before + _AHEAD_X < steps), lambda: gpu.barrier_arrive(released))
        gpu.barrier_wait(scratch["x_loaded"].at[x_slot])
        for half in range(2):
            part = pl.ds(half * _HALF, _HALF)
            turned = product.transposed and not product.interpreted
            gpu.wgmma(
                total,
                x_tiles.at[x_slot, half, rows],
                dense.at[place, :, part].T if turned else dense.at[place, part],
            )
        return carry

    lax.fori_loop(0, steps, step, None)
    gpu.wgmma_wait(0)
    meet()
    result: Array = total[...]
    return result


def _convert(slot: Any, dense: Any, warpgroup: Any, product: Product, gpu: Any, scratch: Any) -> None:
    """Write half of the rows of a tile of codes, as the bfloat16 values of both nibbles, to the dense tiles."""
    rows = PACKED_ROWS // 2
    first, layout = warpgroup * rows, word_layout(gpu)
    packed = scratch["code_tiles"].at[slot, pl.ds(first, rows)]
    scales = [scratch["scale_tiles"].at[slot, half] for half in range(2)]
    if product.interpreted:
        values, scales = selected_values(packed[...], product.data_type), [scale[...] for scale in scales]
    else:
        values = looked_up_values(gpu.layout_cast(packed[...], layout), product.data_type, gpu)
        scales = [gpu.layout_cast(scale[...], layout.reduce(0)) for scale in scales]
    for half, (value, scale) in enumerate(zip(values, scales, strict=True)):
        spread = lax.broadcast_in_dim(scale, (rows, COLUMNS), (1,))
        spread = spread if product.interpreted else gpu.layout_cast(spread, layout)
        scaled = (value.astype(jnp.float32) * spread).astype(jnp.bfloat16)
        to = pl.ds(half * PACKED_ROWS + first, rows)
        if product.transposed and product.interpreted:
            dense[:, to] = scaled.T
        else:
            dense[to] = scaled


def _when(condition: Any, then: Any) -> None:
    pl.when(condition)(then)
