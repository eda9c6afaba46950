"""Quantised embeddings, `[rows, features]` with one row for each token; any rows can be read without the others.

    int8   codes int8 [rows, features], scales float32 [rows]       x' = code * scale, scale = absmax of the row / 127
    nf4    a `QuantizedTensor` [features, rows], double-quantised, like the weight of a linear layer that is the output head

The 8-bit codes of a row share one scale, as in LLM.int8() (Dettmers et al. 2022), because rows differ in their largest value
and 255 steps are fine enough within a row. A row of 4-bit codes consists of complete blocks of 64 features.

Products are computed slice by slice of the rows, and each slice is dequantised separately, so that the complete dense
embedding never exists:

    x Wᵀ   results of the slices are concatenated            s W   results of the slices are summed
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qlora_jax.errors import OptionError
from qlora_jax.quant import kernels
from qlora_jax.quant.bitcast import via_bitcast
from qlora_jax.quant.codebooks import SCALE_BLOCK_SIZE
from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.dynamic import lookup_dynamic
from qlora_jax.quant.matmul import FEW_ROWS
from qlora_jax.quant.spec import Quantization
from qlora_jax.quant.targets import by_platform
from qlora_jax.quant.tensor import QuantizedTensor, dequantize, quantize

EmbeddingStorage = Literal["none", "int8", "nf4"]
EMBEDDING_STORAGES: tuple[EmbeddingStorage, ...] = ("none", "int8", "nf4")
_SLICE = 2**26  # bytes of the dense float32 values of a slice


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class Int8Embedding:
    """A frozen 8-bit embedding, in the layout that the module's docstring describes.

    Attributes:
        codes: int8 `[rows, features]`, -127 to 127.
        scales: float32 `[rows]`.
        dtype: dtype of looked-up rows.
    """

    codes: Array
    scales: Array
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


PackedEmbedding = Int8Embedding | QuantizedTensor


def quantize_embedding(
    w: Float[Array, "v d"], storage: EmbeddingStorage, dtype: DTypeLike | None = None
) -> Float[Array, "v d"] | PackedEmbedding:
    """Quantise an embedding.

    Args:
        w: `[rows, features]`, of any float dtype.
        storage: "none" (dense), "int8" or "nf4".
        dtype: dtype of the dense embedding, or of looked-up rows; None: that of w.

    Raises:
        OptionError: an unknown storage, or with nf4 a number of features that is not a multiple of the block size.
    """
    if storage not in EMBEDDING_STORAGES:
        raise OptionError(f"embedding_storage: expected one of {', '.join(EMBEDDING_STORAGES)}, found {storage!r}")
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    if storage == "none":
        return w.astype(dtype)
    if storage == "int8":
        return _int8(w, dtype)
    nf4 = Quantization()
    if w.shape[1] % nf4.block_size:
        raise OptionError(f"embedding_storage nf4: expected a multiple of {nf4.block_size} features, found {w.shape[1]}")
    return quantize(w.T, nf4.data_type, nf4.block_size, nf4.double_quantization, dtype)


def empty_embedding(w: PackedEmbedding, zeros: Callable[[tuple[int, ...], DTypeLike], Array]) -> PackedEmbedding:
    """Return an embedding of zeros like `w` for `write_embedding_rows` to fill; its scales are not double-quantised.

    Args:
        w: a quantised embedding, which may be abstract.
        zeros: function (shape, dtype) that creates the arrays.
    """
    if isinstance(w, Int8Embedding):
        return Int8Embedding(zeros(w.codes.shape, jnp.int8), zeros(w.scales.shape, jnp.float32), w.dtype)
    return dataclasses.replace(
        w,
        codes=zeros(w.codes.shape, jnp.uint8),
        scales=zeros(w.scales.shape, jnp.float32),
        scale_absmax=None,
        scale_offset=None,
    )


def write_embedding_rows(w: PackedEmbedding, rows: Float[Array, "n d"], start: int | Array) -> PackedEmbedding:
    """Return the embedding with the rows from index `start` on replaced by the quantised `rows`, floats `[n, features]`."""
    if isinstance(w, Int8Embedding):
        new, axis = _int8(rows, w.dtype), 0
    else:
        new, axis = quantize(rows.T, w.data_type, w.block_size, False, w.dtype), 1
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis), w, new)


def embedding_shape(w: Float[Array, "v d"] | PackedEmbedding) -> tuple[int, int]:
    """Return (rows, features) of a dense or quantised embedding."""
    rows, features = w.shape[::-1] if isinstance(w, QuantizedTensor) else w.shape
    return rows, features


def embedding_lookup(w: Float[Array, "v d"] | PackedEmbedding, index: Int[Array, "*tokens"]) -> Float[Array, "*tokens d"]:
    """Return the rows at the indices int32 `[...]`, dense `[..., features]`; the embedding gets no gradient."""
    if isinstance(w, Int8Embedding):
        return (w.codes[index].astype(jnp.float32) * w.scales[index][..., None]).astype(w.dtype)
    if isinstance(w, QuantizedTensor):
        flat = index.reshape(-1)
        rows = _select_rows(w, flat, partial(jnp.take, indices=flat, axis=1, mode="clip"))
        return dequantize(rows).T.reshape(*index.shape, -1)

    def take(w: Array, index: Array) -> Array:
        return w[index]

    def take_bits(w: Array, index: Array) -> Array:  # only on a CPU, because a TPU would copy the embedding to bitcast it
        return via_bitcast(partial(take, index=index), w)

    return by_platform(jax.lax.stop_gradient(w), index, cpu=take_bits, default=take)


def embedding_matmul(x: Float[Array, "n d"], w: PackedEmbedding, dtype: DTypeLike) -> Float[Array, "n v"]:
    """Return x `[n, features]` times the transposed embedding, `[n, rows]` in `dtype`; the embedding gets no gradient."""
    result: Any = _matmul(jnp.dtype(dtype), x, w)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dtype: Any, x: Array, w: PackedEmbedding) -> Array:
    if (
        isinstance(w, QuantizedTensor)
        and w.implementation != "xla"
        and (len(x) <= FEW_ROWS and dtype == x.dtype)
        and kernels.on_one_device()
        and kernels.exists(w, x.dtype)
    ):
        return kernels.matmul_where_chosen(x, w, otherwise=lambda x, w: _matmul_by_slices(x, w, dtype))  # type: ignore[arg-type]
    return _matmul_by_slices(x, w, dtype)


def _forward(dtype: Any, x: Array, w: PackedEmbedding) -> tuple[Array, tuple[PackedEmbedding, Array]]:
    return _matmul(dtype, x, w), (w, x[:0])  # an empty array, which carries the dtype of x


def _backward(_: Any, residuals: tuple[PackedEmbedding, Array], dy: Array) -> tuple[Array, None]:
    w, like_x = residuals
    return embedding_rows_sum(dy, w, like_x.dtype), None


_matmul.defvjp(_forward, _backward)


def embedding_rows_sum(share: Float[Array, "n v"], w: PackedEmbedding, dtype: DTypeLike) -> Float[Array, "n d"]:
    """Return share `[n, rows]` times the embedding, `[n, features]` in `dtype`, summed in float32."""

    def add(total: Array, start: int | Array, size: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(share, start, size, axis=1)
        return total + einsum("nv,vd->nd", part, _dense_slice(w, start, size, share.dtype), jnp.float32)

    rows, features = embedding_shape(w)
    return _over_slices(add, jnp.zeros((len(share), features), jnp.float32), rows, features).astype(dtype)


def with_single_scales(w: Array | PackedEmbedding) -> Array | PackedEmbedding:
    """Return the embedding without double quantisation, so that it can be split by rows.

    Under double quantisation, the scales of several rows share a float32 absmax.
    """
    if not isinstance(w, QuantizedTensor) or not w.double_quantized:
        return w
    return _select_rows(w, jnp.arange(w.shape[1]), lambda leaf: leaf)


def _matmul_by_slices(x: Array, w: PackedEmbedding, dtype: DTypeLike) -> Array:
    def put(result: Array, start: int | Array, size: int) -> Array:
        part = einsum("nd,vd->nv", x, _dense_slice(w, start, size, x.dtype), dtype)
        return jax.lax.dynamic_update_slice_in_dim(result, part, start, axis=1)

    rows, features = embedding_shape(w)
    return _over_slices(put, jnp.zeros((len(x), rows), dtype), rows, features)


def _over_slices(step: Callable[[Array, Any, int], Array], start: Array, rows: int, features: int) -> Array:
    """Apply carry = step(carry, first row, number of rows) to slices that cover every row once; return the last carry."""
    size = min(max(_SLICE // (4 * features) // 128 * 128, 128), rows)
    full_slices, rest = divmod(rows, size)
    carry = start
    if full_slices > 1:
        carry = jax.lax.fori_loop(0, full_slices, lambda i, carry: step(carry, i * size, size), carry)
    elif full_slices:
        carry = step(carry, 0, size)
    return step(carry, full_slices * size, rest) if rest else carry


def _dense_slice(w: PackedEmbedding, start: int | Array, size: int, dtype: DTypeLike) -> Array:
    """Return rows start … start + size - 1, dense `[size, features]`, rounded to the dtype of the embedding first."""
    if isinstance(w, Int8Embedding):
        codes, scales = (jax.lax.dynamic_slice_in_dim(leaf, start, size) for leaf in (w.codes, w.scales))
        return (codes.astype(jnp.float32) * scales[:, None]).astype(w.dtype).astype(dtype)
    rows = start + jnp.arange(size)
    part = _select_rows(w, rows, lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1))
    return dequantize(part).T.astype(dtype)


def _select_rows(w: QuantizedTensor, rows: Array, select: Callable[[Array], Array]) -> QuantizedTensor:
    """Return the rows with these indices, with float32 scales; `select` takes them from the last axis of an array."""
    scales = select(w.scales)
    if w.scale_absmax is not None and w.scale_offset is not None:
        blocks = scales.shape[0]
        groups = (rows[None, :] * blocks + jnp.arange(blocks)[:, None]) // SCALE_BLOCK_SIZE
        absmax = jnp.take(w.scale_absmax, groups, mode="clip")
        scales = lookup_dynamic(scales) * absmax + w.scale_offset
    return dataclasses.replace(w, codes=select(w.codes), scales=scales, scale_absmax=None, scale_offset=None)


@partial(jax.jit, static_argnames="dtype")
def _int8(w: Array, dtype: Any) -> Int8Embedding:
    values = w.astype(jnp.float32)
    absmax = jnp.abs(values).max(1)
    codes = jnp.round(values * (127 / jnp.where(absmax == 0, 1.0, absmax))[:, None])
    return Int8Embedding(codes.astype(jnp.int8), absmax / 127, dtype)
