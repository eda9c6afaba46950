"""A token table in fewer bits: `[rows, features]`, of which any rows can be read without the others.

    int8   codes int8 [rows, features], scales float32 [rows]       x' = code * scale, scale = absmax of the row / 127
    nf4    a `QuantizedTensor` [features, rows], double-quantised: the storage of a linear layer that is the output head

A row's 8-bit codes share one scale, as in LLM.int8() (Dettmers et al. 2022): tokens differ in the size of their rows, and
255 steps are fine enough within one. A row of 4-bit codes is made of whole blocks of 64 features.

Products go over slices of rows, each dequantised for itself, so that the dense table exists nowhere:

    x Wᵀ   slice by slice, side by side            s W   summed over slices
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.quant import kernels
from qlora_jax.quant.bitcast import via_bitcast
from qlora_jax.quant.codebooks import SCALE_BLOCK_SIZE
from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.dynamic import lookup_dynamic
from qlora_jax.quant.matmul import FEW_ROWS
from qlora_jax.quant.spec import Quantization
from qlora_jax.quant.tensor import QuantizedTensor, dequantize, quantize

EmbeddingStorage = Literal["none", "int8", "nf4"]
EMBEDDING_STORAGES: tuple[EmbeddingStorage, ...] = ("none", "int8", "nf4")
_SLICE = 2**26  # bytes of the dense values of a slice


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class Int8Embedding:
    """A frozen table in 8 bits a value, as the module describes it.

    Attributes:
        codes: int8 `[rows, features]`, -127 to 127.
        scales: float32 `[rows]`.
        dtype: of the values that are read from it.
    """

    codes: Array
    scales: Array
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


PackedEmbedding = Int8Embedding | QuantizedTensor


def quantize_embedding(w: Array, storage: EmbeddingStorage, dtype: DTypeLike | None = None) -> Array | PackedEmbedding:
    """A table `[rows, features]` of floats as `storage` says.

    Args:
        dtype: of the values that are read from it; that of `w` if None.

    Raises:
        ValueError: an unknown storage, or features that are no whole blocks.
    """
    if storage not in EMBEDDING_STORAGES:
        raise ValueError(f"embedding_storage: expected one of {', '.join(EMBEDDING_STORAGES)}, found {storage!r}")
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    if storage == "none":
        return w.astype(dtype)
    if storage == "int8":
        return _int8(w, dtype)
    how = Quantization()
    if w.shape[1] % how.block_size:
        raise ValueError(f"embedding_storage nf4: expected a multiple of {how.block_size} features, found {w.shape[1]}")
    return quantize(w.T, how.data_type, how.block_size, how.double_quantization, dtype)


def empty_embedding(w: PackedEmbedding, zeros: Callable[[tuple[int, ...], DTypeLike], Array]) -> PackedEmbedding:
    """A table of zeros in the shape of `w` for `write_embedding_rows` to fill; its scales are not double-quantised yet."""
    if isinstance(w, Int8Embedding):
        return Int8Embedding(zeros(w.codes.shape, jnp.int8), zeros(w.scales.shape, jnp.float32), w.dtype)
    return dataclasses.replace(
        w,
        codes=zeros(w.codes.shape, jnp.uint8),
        scales=zeros(w.scales.shape, jnp.float32),
        scale_absmax=None,
        scale_offset=None,
    )


def write_embedding_rows(table: PackedEmbedding, rows: Array, start: int | Array) -> PackedEmbedding:
    """The table with rows `[n, features]` of floats in place of its own from `start` on."""
    if isinstance(table, Int8Embedding):
        new, axis = _int8(rows, table.dtype), 0
    else:
        new, axis = quantize(rows.T, table.data_type, table.block_size, False, table.dtype), 1
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis), table, new)


def embedding_shape(w: Array | PackedEmbedding) -> tuple[int, int]:
    """(rows, features)."""
    rows, features = w.shape[::-1] if isinstance(w, QuantizedTensor) else w.shape
    return rows, features


def embedding_lookup(w: Array | PackedEmbedding, index: Array) -> Array:
    """The rows at int32 `[...]`, dense: `[..., features]`; the table is a constant to differentiation."""
    if isinstance(w, Int8Embedding):
        return (w.codes[index].astype(jnp.float32) * w.scales[index][..., None]).astype(w.dtype)
    if isinstance(w, QuantizedTensor):
        numbers = index.reshape(-1)
        found = _single(w, numbers, partial(jnp.take, indices=numbers, axis=1, mode="clip"))
        return dequantize(found).T.reshape(*index.shape, -1)

    def take(w: Array, index: Array) -> Array:
        return w[index]

    def take_bits(w: Array, index: Array) -> Array:  # on a CPU alone: a TPU would copy the table to have its bits
        return via_bitcast(partial(take, index=index), w)

    return jax.lax.platform_dependent(jax.lax.stop_gradient(w), index, cpu=take_bits, default=take)


def embedding_matmul(x: Array, w: PackedEmbedding, dtype: DTypeLike) -> Array:
    """x `[n, features]` times all rows, `[n, rows]` in `dtype`; the table is a constant to differentiation."""
    result: Any = _rows_product(jnp.dtype(dtype), x, w)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_product(dtype: Any, x: Array, w: PackedEmbedding) -> Array:
    if (
        isinstance(w, QuantizedTensor)
        and w.implementation != "xla"
        and (len(x) <= FEW_ROWS and dtype == x.dtype)
        and kernels.on_one_device()
        and kernels.exists(w, x.dtype)
    ):
        return kernels.matmul_where_chosen(x, w, otherwise=lambda x, w: _sliced_product(x, w, dtype))  # type: ignore[arg-type]
    return _sliced_product(x, w, dtype)


def _forward(dtype: Any, x: Array, w: PackedEmbedding) -> tuple[Array, tuple[PackedEmbedding, Array]]:
    return _rows_product(dtype, x, w), (w, x[:0])  # of x the dtype alone


def _backward(_: Any, kept: tuple[PackedEmbedding, Array], dy: Array) -> tuple[Array, None]:
    w, empty = kept
    return embedding_rows_sum(dy, w, empty.dtype), None


_rows_product.defvjp(_forward, _backward)


def embedding_rows_sum(share: Array, w: PackedEmbedding, dtype: DTypeLike) -> Array:
    """share `[n, rows]` times the table: sums of its rows, `[n, features]` in `dtype`, added up in float32."""

    def add(total: Array, start: int | Array, size: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(share, start, size, axis=1)
        return total + einsum("nv,vd->nd", part, _between(w, start, size, share.dtype), jnp.float32)

    rows, features = embedding_shape(w)
    return _over_slices(add, jnp.zeros((len(share), features), jnp.float32), rows, features).astype(dtype)


def with_single_scales(w: Array | PackedEmbedding) -> Array | PackedEmbedding:
    """The same table, which can be cut by rows: no scale of it is stored among those of other rows."""
    if not isinstance(w, QuantizedTensor) or not w.double_quantized:
        return w
    return _single(w, jnp.arange(w.shape[1]), lambda leaf: leaf)


def _sliced_product(x: Array, w: PackedEmbedding, dtype: DTypeLike) -> Array:
    def put(result: Array, start: int | Array, size: int) -> Array:
        part = einsum("nd,vd->nv", x, _between(w, start, size, x.dtype), dtype)
        return jax.lax.dynamic_update_slice_in_dim(result, part, start, axis=1)

    rows, features = embedding_shape(w)
    return _over_slices(put, jnp.zeros((len(x), rows), dtype), rows, features)


def _over_slices(step: Callable[[Array, Any, int], Array], start: Array, rows: int, features: int) -> Array:
    """step(carry, first row, rows of the slice), for slices that cover all rows once."""
    size = min(max(_SLICE // (4 * features) // 128 * 128, 128), rows)
    whole, rest = divmod(rows, size)
    carry = start
    if whole > 1:
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * size, size), carry)
    elif whole:
        carry = step(carry, 0, size)
    return step(carry, whole * size, rest) if rest else carry


def _between(w: PackedEmbedding, start: int | Array, size: int, dtype: DTypeLike) -> Array:
    """Rows start … start + size, dense `[size, features]`, rounded to the dtype of the embedding first."""
    if isinstance(w, Int8Embedding):
        codes, scales = (jax.lax.dynamic_slice_in_dim(leaf, start, size) for leaf in (w.codes, w.scales))
        return (codes.astype(jnp.float32) * scales[:, None]).astype(w.dtype).astype(dtype)
    part = _single(w, start + jnp.arange(size), lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1))
    return dequantize(part).T.astype(dtype)


def _single(w: QuantizedTensor, numbers: Array, cut: Callable[[Array], Array]) -> QuantizedTensor:
    """The rows of these numbers, which `cut` takes from the last axis, with float32 scales."""
    scales = cut(w.scales)
    if w.scale_absmax is not None and w.scale_offset is not None:
        blocks = scales.shape[0]
        places = (numbers[None, :] * blocks + jnp.arange(blocks)[:, None]) // SCALE_BLOCK_SIZE
        absmax = jnp.take(w.scale_absmax, places, mode="clip")
        scales = lookup_dynamic(scales) * absmax + w.scale_offset
    return dataclasses.replace(w, codes=cut(w.codes), scales=scales, scale_absmax=None, scale_offset=None)


@partial(jax.jit, static_argnames="dtype")
def _int8(w: Array, dtype: Any) -> Int8Embedding:
    values = w.astype(jnp.float32)
    absmax = jnp.abs(values).max(1)
    codes = jnp.round(values * (127 / jnp.where(absmax == 0, 1.0, absmax))[:, None])
    return Int8Embedding(codes.astype(jnp.int8), absmax / 127, dtype)
