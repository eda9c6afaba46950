"""QuantizedTensor: a matrix in 4 bits, and the way into and out of it.

The logical matrix is `[in, out]`, as `x @ w` wants it. Its values are grouped into blocks of `block_size` that run along
`in`, row-major over the `[out, in]` transpose: the grouping of bitsandbytes, so that codes are equal bit for bit.

    scaled  = x * (1 / absmax of its block)                 float32; the reciprocal, not a division
    code    = index of the nearest value of the codebook    borders are midpoints; a tie goes to the lower value
    x'      = codebook[code] * absmax                       float32, cast last

Double quantisation (QLoRA, section 3) stores the block maxima in 8 bits: their mean is subtracted, and blocks of 256 of the
rest are written as codes of the signed dynamic map times one float32 absmax: 4.127 bits a value in all at block size 64.

Two layouts hold the codes, two to a byte:

    columns   in % block_size == 0. codes uint8 [in/2, out]: row j holds row j of the matrix in the high nibble and row
              j + in/2 in the low one, so that both halves unpack without shuffling lanes, as the kernels read them
              (docs/notes/layouts.md compares others). scales [in/block_size, out].
    flat      any other size, where blocks run across columns. codes uint8 [blocks, block_size/2]: the first half of a block
              is in the high nibbles, the second in the low ones. scales [blocks].

Leading axes, if any, stack whole matrices: the same class works under vmap, scan, eval_shape and sharding.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.quant.codebooks import BLOCK_SIZES, DATA_TYPES, SCALE_BLOCK_SIZE, DataType, borders, codebook, dynamic_map
from qlora_jax.quant.dynamic import lookup_dynamic

Implementation = Literal["auto", "xla", "pallas"]
_RUN = 2048  # values that are summed in a row
_CHUNK = 2**20  # values quantised at a time: bounds the float32 temporaries while a large matrix is quantised


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "scale_absmax", "scale_offset"),
    meta_fields=("data_type", "block_size", "dtype", "flat_shape", "implementation"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A frozen `[..., in, out]` matrix in slots of 4 bits a value.

    Attributes:
        codes: uint8, two codes a byte, in the layout that the module describes.
        scales: one per block: uint8 codes of the dynamic map under double quantisation, else float32 absmax.
        scale_absmax: float32 `[..., ceil(blocks / 256)]` under double quantisation, in the order of the blocks; else None.
        scale_offset: float32 `[...]`, the mean that was subtracted from the scales; None without double quantisation.
        data_type: one of `DATA_TYPES`.
        block_size: values that share a scale.
        dtype: what `dequantize` returns by default.
        flat_shape: (in, out) in the flat layout; None in the column layout, where the shape follows from `codes`.
        implementation: how `matmul` multiplies with it, unless told otherwise: by XLA, by a kernel, or as it sees fit.
    """

    codes: Array
    scales: Array
    scale_absmax: Array | None
    scale_offset: Array | None
    data_type: DataType
    block_size: int
    dtype: Any
    flat_shape: tuple[int, int] | None
    implementation: Implementation = "auto"

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.codes.shape
        return (*stack, *(self.flat_shape or (2 * rows, columns)))

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def double_quantized(self) -> bool:
        return self.scale_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all leaves counted."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / int(np.prod(self.shape))


@partial(jax.jit, static_argnames=("data_type", "block_size", "double_quantization", "dtype"))
def quantize(
    w: Array,
    data_type: DataType = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
    dtype: DTypeLike | None = None,
) -> QuantizedTensor:
    """Quantise a `[..., in, out]` matrix of floats.

    Codes equal those of bitsandbytes' CPU path bit for bit, the 8-bit scales included (its CUDA path searches the 8-bit map
    on unrounded values, so that about two scales in a thousand differ there by one step).

    Args:
        w: float16, bfloat16 or float32.
        dtype: dtype that `dequantize` returns by default; that of `w` if None.

    Raises:
        ValueError: unknown data type or block size, or fewer than two axes.
    """
    if data_type not in DATA_TYPES:
        raise ValueError(f"unknown data type {data_type!r}; expected one of {', '.join(DATA_TYPES)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"unknown block size {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if w.ndim < 2:
        raise ValueError(f"expected a matrix [..., in, out], found shape {w.shape}")
    quantize_matrix = partial(_quantize_matrix, data_type=data_type, block_size=block_size)
    quantize_scales = _quantize_scales
    stack = w.shape[:-2]
    for _ in stack:  # not at all for one matrix: a batch of one costs XLA's CPU backend a transposed copy of it
        quantize_matrix, quantize_scales = jax.vmap(quantize_matrix), jax.vmap(quantize_scales)
    packed, absmax = quantize_matrix(w)
    if double_quantization:
        scales, scale_absmax, scale_offset = quantize_scales(absmax)
    else:
        scales, scale_absmax, scale_offset = absmax, None, None
    rows, columns = w.shape[-2:]
    flat = _is_flat(rows, block_size)
    if not flat:  # from the order of the blocks to the place of each block in the matrix
        scales = jnp.swapaxes(scales.reshape(*stack, columns, rows // block_size), -1, -2)
    return QuantizedTensor(
        codes=packed,
        scales=scales,
        scale_absmax=scale_absmax,
        scale_offset=scale_offset,
        data_type=data_type,
        block_size=block_size,
        dtype=jnp.dtype(w.dtype if dtype is None else dtype),
        flat_shape=(rows, columns) if flat else None,
    )


def with_double_quantization(q: QuantizedTensor) -> QuantizedTensor:
    """A matrix in the column layout whose float32 scales are quantised as `quantize` does it; others as they are."""
    if q.double_quantized or q.flat_shape is not None:
        return q
    scales, scale_absmax, scale_offset = _quantize_scales(q.scales.T.reshape(-1))
    scales = scales.reshape(q.scales.shape[::-1]).T
    return dataclasses.replace(q, scales=scales, scale_absmax=scale_absmax, scale_offset=scale_offset)


def dequantize(q: QuantizedTensor, dtype: DTypeLike | None = None) -> Array:
    """The float matrix `[..., in, out]` that `q` stands for, in `dtype` (that of `q` if None)."""
    stack = q.codes.shape[:-2]
    one = partial(_dequantize_matrix, dtype=jnp.dtype(q.dtype if dtype is None else dtype))
    for _ in stack:
        one = jax.vmap(one)
    return one(q)


def block_scales(q: QuantizedTensor) -> Array:
    """The float32 absmax of every block of one matrix, `[in/block_size, out]` or, in the flat layout, `[blocks]`."""
    if q.scale_absmax is None or q.scale_offset is None:
        return q.scales
    values = lookup_dynamic(q.scales)
    if q.flat_shape is None:
        rows, columns = q.scales.shape
        absmax = jnp.repeat(q.scale_absmax, SCALE_BLOCK_SIZE)[: rows * columns]
        absmax = absmax.reshape(columns, rows).T
    else:
        absmax = jnp.repeat(q.scale_absmax, SCALE_BLOCK_SIZE)[: q.scales.size]
    return values * absmax + q.scale_offset


def pack(codes: Array, block_size: int) -> Array:
    """Codes `[in, out]`, one a byte, to two a byte in the layout that their size calls for."""
    rows = codes.shape[0]
    if _is_flat(rows, block_size):
        codes = jnp.pad(codes.T.reshape(-1), (0, -codes.size % block_size)).reshape(-1, block_size)
        high, low = jnp.split(codes, 2, axis=1)
    else:
        high, low = codes[: rows // 2], codes[rows // 2 :]
    return (high << 4) | low


def unpack(q: QuantizedTensor) -> Array:
    """The codes of one matrix, one a byte: `[in, out]`, or `[blocks, block_size]` in the flat layout."""
    high, low = q.codes >> 4, q.codes & 15
    return jnp.concatenate([high, low], axis=0 if q.flat_shape is None else 1)


def _is_flat(rows: int, block_size: int) -> bool:
    return rows % block_size != 0


def _quantize_matrix(w: Array, data_type: DataType, block_size: int) -> tuple[Array, Array]:
    """One matrix `[in, out]` to (packed codes, float32 absmax by block in the order of the blocks)."""
    rows, columns = w.shape
    flat = w.T.reshape(-1)
    blocks = -(-flat.size // block_size)
    remainder = flat.size % block_size
    chunk = min(blocks, _CHUNK // block_size)
    padded = jnp.pad(flat, (0, -(-blocks // chunk) * chunk * block_size - flat.size))
    edges, code_of = borders(data_type)
    sorted_by_value = np.array_equal(code_of, np.arange(code_of.size))

    # Over bfloat16 numbers XLA's CPU backend converts the whole matrix to float32 ahead of the loop; over bits it cannot.
    as_bits = w.dtype == jnp.bfloat16
    if as_bits:
        padded = jax.lax.bitcast_convert_type(padded, jnp.uint16)

    def quantize_chunk(x: Array) -> tuple[Array, Array]:
        x = (jax.lax.bitcast_convert_type(x, w.dtype) if as_bits else x).astype(jnp.float32)
        absmax = jnp.max(jnp.abs(x), axis=1)
        scaled = jnp.clip(x * (1.0 / jnp.where(absmax == 0, 1.0, absmax))[:, None], -1.0, 1.0)
        above = sum(((scaled > edge).astype(jnp.uint8) for edge in edges), jnp.zeros(x.shape, jnp.uint8))
        return above if sorted_by_value else jnp.asarray(code_of)[above], absmax

    codes, absmax = jax.lax.map(quantize_chunk, padded.reshape(-1, chunk, block_size))
    codes, absmax = codes.reshape(-1)[: flat.size], absmax.reshape(-1)[:blocks]
    if remainder:  # in the last, partial block bitsandbytes does divide
        tail = flat[-remainder:].astype(jnp.float32) / jnp.where(absmax[-1] == 0, 1.0, absmax[-1])
        above = jnp.searchsorted(jnp.asarray(edges), tail, side="left")
        codes = codes.at[-remainder:].set(jnp.asarray(code_of)[above])
    return pack(codes.reshape(columns, rows).T, block_size), absmax


def _quantize_scales(absmax: Array) -> tuple[Array, Array, Array]:
    """Float32 scales `[blocks]` to (uint8 codes `[blocks]`, float32 absmax of each 256, float32 offset).

    bitsandbytes' CPU path looks the scaled value up in a table of 65536 bins over [-1, 1]; so do we, by rounding to a bin
    first, to be equal to it: the bin moves a scale by at most 1.6e-5 of its block's absmax.
    """
    offset = _mean(absmax)
    centred = absmax - offset
    padded = jnp.pad(centred, (0, -centred.size % SCALE_BLOCK_SIZE)).reshape(-1, SCALE_BLOCK_SIZE)
    scale_absmax = jnp.max(jnp.abs(padded), axis=1, keepdims=True)
    scaled = jnp.clip(padded * (1.0 / jnp.where(scale_absmax == 0, 1.0, scale_absmax)), -1.0, 1.0)
    bins = jnp.floor((scaled + 1.0) * 32767.5 + 0.5)
    binned = _divide(2.0 * bins, 65535.0) - 1.0
    table = dynamic_map()
    midpoints = np.float32(0.5) * (table[:-1] + table[1:])
    codes = jnp.searchsorted(jnp.asarray(midpoints), binned, side="left")
    codes = jnp.where(scale_absmax == 0, 0, codes).astype(jnp.uint8)
    return codes.reshape(-1)[: centred.size], scale_absmax[:, 0], offset


def _mean(values: Array) -> Array:
    """The mean of float32 `[n]` values from their correctly rounded sum, added up as pairs of (sum, rounding error).

    In two levels: in one run of millions the errors themselves would lose bits.
    """

    def two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        total = a[0] + b[0]
        shadow = total - a[0]
        error = (a[0] - (total - shadow)) + (b[0] - shadow)
        return total, a[1] + b[1] + error

    zero, rows = jnp.float32(0), jnp.pad(values, (0, -values.size % _RUN)).reshape(-1, _RUN)
    pairs = rows, jnp.zeros_like(rows)
    for axis in (1, 0):
        pairs = jax.lax.reduce(pairs, (zero, zero), two_sum, (axis,))
    return _divide(pairs[0] + pairs[1], values.size)


def _divide(x: Array, divisor: float) -> Array:
    """x / divisor, rounded once: behind the barrier XLA cannot turn it into a product with 1 / divisor."""
    return x / jax.lax.optimization_barrier(jnp.float32(divisor))


def _dequantize_matrix(q: QuantizedTensor, dtype: Any) -> Array:
    if q.flat_shape is None:

        def halves(q: QuantizedTensor) -> Array:
            return _times_scales(_lookup(unpack(q), q.data_type), block_scales(q))

        def in_vectors(q: QuantizedTensor) -> Array:
            # Behind the barrier scales are made once a block, not once a value.
            return dequantize_in_vectors(q.codes, jax.lax.optimization_barrier(block_scales(q)), q.data_type)

        return jax.lax.platform_dependent(q, cpu=in_vectors, default=halves).astype(dtype)
    values = _lookup(unpack(q), q.data_type)
    scales = block_scales(q)
    rows, columns = q.flat_shape
    values = (values * scales[:, None]).reshape(-1)[: rows * columns]
    return values.reshape(columns, rows).T.astype(dtype)


def dequantize_in_vectors(codes: Array, scales: Array, data_type: DataType) -> Array:
    """Packed codes `[in/2, columns]` and float32 scales `[blocks, columns]` to float32 values `[in, columns]`.

    In the form of which XLA's CPU backend makes vector instructions: no branch between the halves, 32 bits throughout.
    """
    shifts = jnp.asarray([4, 0], jnp.int32)[:, None, None]
    halves = (codes.astype(jnp.int32) >> shifts) & 15
    return _times_scales(_lookup(halves, data_type).reshape(-1, codes.shape[1]), scales)


def _times_scales(values: Array, scales: Array) -> Array:
    """Values `[in, columns]` times the scales of their blocks, `[blocks, columns]`."""
    rows, columns = values.shape
    return (values.reshape(scales.shape[0], -1, columns) * scales[:, None, :]).reshape(rows, columns)


@partial(jax.jit, static_argnames="data_type")  # so that in a program it is traced once for each shape
def _lookup(codes: Array, data_type: DataType) -> Array:
    """Codes to float32 values: a gather from the table on GPU, a tree of selects where that is fewer instructions."""
    table = codebook(data_type)

    def gather(codes: Array) -> Array:
        return jnp.take(jnp.asarray(table), codes.astype(jnp.int32), mode="clip")

    def select(codes: Array) -> Array:
        # Leaves are anchored to the data: constants would be broadcast and hoisted out of a differentiated scan.
        zero = (codes & 0).astype(jnp.float32)
        leaves = [zero + value for value in table]
        for bit in range(4):
            is_set = ((codes >> bit) & 1) == 1
            leaves = [jnp.where(is_set, odd, even) for even, odd in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0]

    return jax.lax.platform_dependent(codes, cpu=select, tpu=select, default=gather)
