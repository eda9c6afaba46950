"""QuantizedTensor: a 4-bit matrix, with functions to quantise and dequantise it.

The logical matrix is `[in, out]`, as in `x @ w`. Its values are grouped into blocks of `block_size` along `in`, in the
row-major order of the transposed matrix `[out, in]`. This is the grouping of bitsandbytes, so the codes are equal bit for
bit.

    scaled  = x * (1 / absmax of its block)                 float32; multiplication by the reciprocal, no division
    code    = index of the nearest value of the codebook    borders are midpoints; ties are rounded to the lower value
    x'      = codebook[code] * absmax                       float32, cast at the end

Double quantisation (QLoRA, section 3) stores the block maxima in 8 bits. Their mean is subtracted, and each 256 of the
differences are stored as codes of the signed dynamic map and one float32 absmax. At block size 64 this gives 4.127 bits per
value in total.

There are two layouts of the codes, each with two codes in a byte:

    columns   if in % block_size == 0. codes uint8 [in/2, out]: row j holds row j of the matrix in the high nibble and row
              j + in/2 in the low one, so that kernels unpack both halves without moving values between lanes
              (docs/notes/layouts.md compares other layouts). scales [in/block_size, out].
    flat      otherwise; blocks then extend over several columns. codes uint8 [blocks, block_size/2]: the first half of a
              block is in the high nibbles, the second in the low ones. scales [blocks].

Leading axes, if any, stack matrices: the same class works under vmap, scan, eval_shape and sharding.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from qlora_jax.errors import OptionError
from qlora_jax.quant.codebooks import BLOCK_SIZES, DATA_TYPES, SCALE_BLOCK_SIZE, DataType, borders, codebook, dynamic_map
from qlora_jax.quant.dynamic import lookup_dynamic
from qlora_jax.quant.targets import by_platform

Implementation = Literal["auto", "xla", "pallas"]
_RUN = 2048  # number of values in the first level of a sum
_CHUNK = 2**20  # number of values quantised at a time, which limits the float32 temporaries of a large matrix


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "scale_absmax", "scale_offset"),
    meta_fields=("data_type", "block_size", "dtype", "flat_shape", "implementation", "parts"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A frozen matrix `[..., in, out]` with 4 bits per value, or a stack of such matrices.

    Attributes:
        codes: uint8, two codes in a byte, in one of the layouts that the module's docstring describes.
        scales: one for each block: uint8 codes of the dynamic map with double quantisation, else float32 absmax.
        scale_absmax: float32 `[..., ceil(blocks / 256)]` with double quantisation, in the order of the blocks; else None.
        scale_offset: float32 `[...]`, the mean that was subtracted from the scales; None without double quantisation.
        data_type: one of `DATA_TYPES`.
        block_size: number of values that share a scale.
        dtype: dtype that `dequantize` returns by default.
        flat_shape: (in, out) in the flat layout; None in the column layout, where the shape follows from `codes`.
        implementation: the default implementation of `matmul` with this matrix: "xla", "pallas" or "auto".
        parts: number of ranges of rows that are packed separately (`quant.parts`); 1 except on a mesh with a tensor axis.
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
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logical matrix, `[..., in, out]`."""
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
        """The number of bytes in memory, of all leaves together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / int(np.prod(self.shape))


@partial(jax.jit, static_argnames=("data_type", "block_size", "double_quantization", "dtype"))
def quantize(
    w: Float[Array, "*layers k n"],
    data_type: DataType = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
    dtype: DTypeLike | None = None,
) -> QuantizedTensor:
    """Quantise a matrix of floats, or a stack of matrices.

    Codes and 8-bit scales equal those of bitsandbytes' CPU path bit for bit. (Its CUDA path searches the 8-bit map with
    unrounded values, so that about two scales in a thousand differ by one step.)

    Args:
        w: `[..., in, out]`, float16, bfloat16 or float32.
        data_type: one of `DATA_TYPES`.
        block_size: number of values that share a scale, one of `BLOCK_SIZES`.
        double_quantization: whether to quantise the scales to 8 bits.
        dtype: dtype that `dequantize` returns by default; None: that of w.

    Raises:
        OptionError: an unknown data type or block size.
        ValueError: fewer than two axes.
    """
    if data_type not in DATA_TYPES:
        raise OptionError(f"unknown data type {data_type!r}; expected one of {', '.join(DATA_TYPES)}")
    if block_size not in BLOCK_SIZES:
        raise OptionError(f"unknown block size {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if w.ndim < 2:
        raise ValueError(f"expected a matrix [..., in, out], found shape {w.shape}")
    quantize_matrix = partial(_quantize_matrix, data_type=data_type, block_size=block_size)
    quantize_scales = _quantize_scales
    stack = w.shape[:-2]
    for _ in stack:  # no vmap for a single matrix: for a batch of one, XLA's CPU backend would make a transposed copy
        quantize_matrix, quantize_scales = jax.vmap(quantize_matrix), jax.vmap(quantize_scales)
    packed, absmax = quantize_matrix(w)
    if double_quantization:
        scales, scale_absmax, scale_offset = quantize_scales(absmax)
    else:
        scales, scale_absmax, scale_offset = absmax, None, None
    rows, columns = w.shape[-2:]
    flat = _is_flat(rows, block_size)
    if not flat:  # from the order of the blocks to [in/block_size, out]
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
    """Return the matrix with its float32 scales quantised as in `quantize`; in the flat layout, return it unchanged."""
    if q.double_quantized or q.flat_shape is not None:
        return q
    scales, scale_absmax, scale_offset = _quantize_scales(q.scales.T.reshape(-1))
    scales = scales.reshape(q.scales.shape[::-1]).T
    return dataclasses.replace(q, scales=scales, scale_absmax=scale_absmax, scale_offset=scale_offset)


def dequantize(q: QuantizedTensor, dtype: DTypeLike | None = None) -> Float[Array, "*layers k n"]:
    """Return the dense matrix `[..., in, out]` that `q` represents, in `dtype`; None: the dtype of `q`."""
    stack = q.codes.shape[:-2]
    one = partial(_dequantize_matrix, dtype=jnp.dtype(q.dtype if dtype is None else dtype))
    for _ in stack:
        one = jax.vmap(one)
    return one(q)


def block_scales(q: QuantizedTensor) -> Array:
    """Return the float32 absmax of each block of one matrix, `[in/block_size, out]` or, in the flat layout, `[blocks]`."""
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
    """Pack codes uint8 `[in, out]`, one in each byte, two in a byte, in the layout for their size."""
    rows = codes.shape[0]
    if _is_flat(rows, block_size):
        codes = jnp.pad(codes.T.reshape(-1), (0, -codes.size % block_size)).reshape(-1, block_size)
        high, low = jnp.split(codes, 2, axis=1)
    else:
        high, low = codes[: rows // 2], codes[rows // 2 :]
    return (high << 4) | low


def unpack(q: QuantizedTensor) -> Array:
    """Return the codes of one matrix, one in each byte: `[in, out]`, or `[blocks, block_size]` in the flat layout."""
    high, low = q.codes >> 4, q.codes & 15
    if q.parts > 1:
        high, low = (half.reshape(q.parts, -1, half.shape[-1]) for half in (high, low))
        return jnp.concatenate([high, low], axis=1).reshape(-1, q.codes.shape[-1])
    return jnp.concatenate([high, low], axis=0 if q.flat_shape is None else 1)


def _is_flat(rows: int, block_size: int) -> bool:
    return rows % block_size != 0


def _quantize_matrix(w: Array, data_type: DataType, block_size: int) -> tuple[Array, Array]:
    """Quantise one matrix `[in, out]` to (packed codes, float32 absmax in the order of the blocks)."""
    rows, columns = w.shape
    flat = w.T.reshape(-1)
    blocks = -(-flat.size // block_size)
    remainder = flat.size % block_size
    chunk = min(blocks, _CHUNK // block_size)
    padded = jnp.pad(flat, (0, -(-blocks // chunk) * chunk * block_size - flat.size))
    edges, code_of = borders(data_type)
    sorted_by_value = np.array_equal(code_of, np.arange(code_of.size))

    # If the loop reads bfloat16, XLA's CPU backend converts the whole matrix to float32 before it; integers prevent that.
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
    if remainder:  # for the last, incomplete block bitsandbytes divides instead of multiplying by the reciprocal
        tail = flat[-remainder:].astype(jnp.float32) / jnp.where(absmax[-1] == 0, 1.0, absmax[-1])
        above = jnp.searchsorted(jnp.asarray(edges), tail, side="left")
        codes = codes.at[-remainder:].set(jnp.asarray(code_of)[above])
    return pack(codes.reshape(columns, rows).T, block_size), absmax


def _quantize_scales(absmax: Array) -> tuple[Array, Array, Array]:
    """Quantise float32 scales `[blocks]` to (uint8 codes `[blocks]`, float32 absmax of each 256, float32 offset).

    bitsandbytes' CPU path looks the scaled value up in a table of 65536 bins over [-1, 1]. To get equal codes, the value is
    rounded to a bin here as well, which changes a scale by at most 1.6e-5 of its block's absmax.
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
    """Return the mean of float32 `[n]` values, from a sum of pairs (sum, rounding error), which is correctly rounded.

    There are two levels of sums, because in a single sum of millions of values the errors themselves would lose bits.
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
    """Return x / divisor, rounded once; the barrier prevents XLA from multiplying by 1 / divisor instead."""
    return x / jax.lax.optimization_barrier(jnp.float32(divisor))


def _dequantize_matrix(q: QuantizedTensor, dtype: Any) -> Array:
    if q.flat_shape is None:

        def halves(q: QuantizedTensor) -> Array:
            return _times_scales(_lookup(unpack(q), q.data_type), block_scales(q))

        def in_vectors(q: QuantizedTensor) -> Array:
            # The barrier makes XLA compute a scale once for each block and not once for each value.
            scales = jax.lax.optimization_barrier(block_scales(q))
            if q.parts == 1:
                return dequantize_in_vectors(q.codes, scales, q.data_type)
            codes, scales = (x.reshape(q.parts, -1, x.shape[-1]) for x in (q.codes, scales))
            values = jax.vmap(partial(dequantize_in_vectors, data_type=q.data_type))(codes, scales)
            return values.reshape(-1, values.shape[-1])

        return by_platform(q, cpu=in_vectors, default=halves).astype(dtype)
    values = _lookup(unpack(q), q.data_type)
    scales = block_scales(q)
    rows, columns = q.flat_shape
    values = (values * scales[:, None]).reshape(-1)[: rows * columns]
    return values.reshape(columns, rows).T.astype(dtype)


def dequantize_in_vectors(codes: Array, scales: Array, data_type: DataType) -> Array:
    """Return float32 values `[in, columns]` of packed codes `[in/2, columns]` and float32 scales `[blocks, columns]`.

    XLA's CPU backend compiles this form to vector instructions: it has no branch between the halves and uses only 32-bit
    numbers.
    """
    shifts = jnp.asarray([4, 0], jnp.int32)[:, None, None]
    halves = (codes.astype(jnp.int32) >> shifts) & 15
    return _times_scales(_lookup(halves, data_type).reshape(-1, codes.shape[1]), scales)


def _times_scales(values: Array, scales: Array) -> Array:
    """Return values `[in, columns]` times the scales of their blocks, `[blocks, columns]`."""
    rows, columns = values.shape
    return (values.reshape(scales.shape[0], -1, columns) * scales[:, None, :]).reshape(rows, columns)


@partial(jax.jit, static_argnames="data_type")  # jitted so that a program traces it only once for each shape
def _lookup(codes: Array, data_type: DataType) -> Array:
    """Return the float32 values of codes: by a gather on GPU, by a tree of selects on CPU and TPU, where it is faster."""
    values = codebook(data_type)

    def gather(codes: Array) -> Array:
        return jnp.take(jnp.asarray(values), codes.astype(jnp.int32), mode="clip")

    def select(codes: Array) -> Array:
        # The leaves are computed from the data, because JAX would broadcast constants and hoist them out of a
        # differentiated scan.
        zero = (codes & 0).astype(jnp.float32)
        leaves = [zero + value for value in values]
        for bit in range(4):
            is_set = ((codes >> bit) & 1) == 1
            leaves = [jnp.where(is_set, odd, even) for even, odd in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0]

    return by_platform(codes, cpu=select, tpu=select, default=gather)
