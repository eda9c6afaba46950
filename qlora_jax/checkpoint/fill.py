"""Tensors of a checkpoint into the buffers of a model, on the device: read, checked, quantised, written, dropped.

Each is in host memory once and on the device once beside the result, whose buffers are donated from one write to the next.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.models import ParameterMapping
from qlora_jax.nn import frozen_sharding
from qlora_jax.quant import (
    PackedEmbedding,
    QuantizedTensor,
    empty_embedding,
    quantize,
    with_double_quantization,
    write_embedding_rows,
)

__all__ = ["Rewrite", "fill_dense", "fill_embedding", "fill_stack", "zeros"]

_CHUNK = 2**20  # values checked at a time
_TABLE_ROWS = 4096  # of a token table, packed at a time

# (full name of a linear module, its original float32 matrix [in, out]) to what is stored in its place; None: it is itself.
Rewrite = Callable[[str, Array], Array | None]


def fill_stack(
    checkpoint: Checkpoint, key: ParameterMapping, value: Any, bar: tqdm, rewrite: Rewrite | None
) -> tuple[Any, list[str]]:
    """The value of one row of the table, of which `value` holds the room, and the names of tensors that are not finite."""
    insert = _insert_quantized if isinstance(value, QuantizedTensor) else _insert_dense
    not_finite: list[str] = []
    for layer, name in enumerate(key.names()):
        if name in checkpoint.quantized and isinstance(value, QuantizedTensor) and checkpoint.read_quantized is not None:
            one = dataclasses.replace(checkpoint.read_quantized(name), dtype=value.dtype)
            value = jax.block_until_ready(_write_quantized(value, one, layer))
            bar.update()
            continue
        tensor, dtype = _to_device(checkpoint.read(name))
        changed = None if rewrite is None else rewrite(name.removesuffix(".weight"), _matrix(tensor, dtype))
        if changed is None:
            value, finite = insert(value, tensor, layer, dtype=dtype, transposed=key.linear)
        else:
            value, finite = insert(value, changed, layer, dtype=changed.dtype, transposed=False)
        del tensor
        # Dispatch is asynchronous: without waiting, the next tensors would be read while this one is still held.
        if not bool(jax.block_until_ready((value, finite))[1]):
            not_finite.append(name)
        bar.update()
    return value, not_finite


def fill_dense(
    checkpoint: Checkpoint, key: ParameterMapping, abstract: Any, mesh: Mesh | None, bar: tqdm
) -> tuple[Array, list[str]]:
    """The same for a parameter that there is once."""
    tensor, dtype = _to_device(checkpoint.read(key.name))
    value, finite = _convert(tensor, dtype, abstract.dtype)
    value = jax.device_put(value, frozen_sharding(mesh, abstract.shape))
    bar.update()
    return value, [] if bool(finite) else [key.name]


def fill_embedding(
    checkpoint: Checkpoint, name: str, abstract: PackedEmbedding, mesh: Mesh | None, bar: tqdm
) -> tuple[PackedEmbedding, list[str]]:
    """A token table or head in fewer bits, of which the device never holds more than some rows dense."""
    tensor = checkpoint.read(name)
    value, finite = empty_embedding(abstract, partial(_zeros_of, mesh)), True
    for start in range(0, len(tensor), _TABLE_ROWS):
        rows, dtype = _to_device(tensor[start : start + _TABLE_ROWS])
        value, all_finite = jax.block_until_ready(_put_rows(value, rows, start, dtype=dtype))
        finite &= bool(all_finite)
    bar.update()
    if isinstance(value, QuantizedTensor):  # scales are quantised all together
        value = jax.jit(with_double_quantization)(value)
    value = jax.tree.map(lambda leaf: jax.device_put(leaf, frozen_sharding(mesh, leaf.shape)), value)
    return value, [] if finite else [name]


def zeros(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays for a tree of shapes. One program makes them all: they would be compiled one by one otherwise."""
    shardings = jax.tree.map(lambda leaf: frozen_sharding(mesh, leaf.shape), tree)
    make = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree), out_shardings=shardings)
    return make()


def _zeros_of(mesh: Mesh | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.zeros(shape, dtype, device=frozen_sharding(mesh, shape))


@partial(jax.jit, donate_argnums=0, static_argnames="dtype")
def _put_rows(table: PackedEmbedding, rows: Array, start: int, dtype: Any) -> tuple[PackedEmbedding, Array]:
    return write_embedding_rows(table, _from_bits(rows, dtype), start), _all_finite(rows, dtype)


def _to_device(tensor: np.ndarray) -> tuple[Array, Any]:
    """The tensor on the device, and its dtype; the host's copy can be freed when this returns.

    bfloat16 goes as its bits: the first thing that XLA's CPU backend does to such an argument is a float32 copy of it.
    """
    bits = tensor.view(np.uint16) if tensor.dtype == jnp.bfloat16 else tensor
    return jax.block_until_ready(jax.device_put(bits)), tensor.dtype


def _from_bits(tensor: Array, dtype: Any) -> Array:
    """What `_to_device` sent, inside jit."""
    return jax.lax.bitcast_convert_type(tensor, dtype) if dtype == jnp.bfloat16 else tensor


def _all_finite(tensor: Array, dtype: Any) -> Array:
    """Whether no value is NaN or infinite, by parts: of all at once XLA's CPU backend would store an answer a value."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    part = min(rows.shape[0], max(1, _CHUNK // rows.shape[1]))

    def check(start: Array) -> Array:  # the last part starts early enough to be whole
        values = jax.lax.dynamic_slice_in_dim(rows, start, part)
        return jnp.isfinite(_from_bits(values, dtype)).all()

    return jax.lax.map(check, jnp.arange(0, rows.shape[0], part)).all()


@partial(jax.jit, donate_argnums=0, static_argnames=("dtype", "transposed"))
def _insert_quantized(
    stacked: QuantizedTensor, tensor: Array, layer: int, dtype: Any, transposed: bool
) -> tuple[Any, Array]:
    # Transposed first: then the bits that `quantize` loops over are seen to be the argument itself, not a copy.
    matrix = _from_bits(tensor.T if transposed else tensor, dtype)
    quantized = quantize(matrix, stacked.data_type, stacked.block_size, stacked.double_quantized, stacked.dtype)
    return _write(stacked, quantized, layer), _all_finite(tensor, dtype)


@partial(jax.jit, static_argnames="dtype")
def _matrix(tensor: Array, dtype: Any) -> Array:
    """A linear layer's tensor as float32 `[in, out]`."""
    return _from_bits(tensor.T, dtype).astype(jnp.float32)


@partial(jax.jit, donate_argnums=0)
def _write_quantized(stacked: QuantizedTensor, one: QuantizedTensor, layer: int) -> QuantizedTensor:
    return _write(stacked, one, layer)


@partial(jax.jit, donate_argnums=0, static_argnames=("dtype", "transposed"))
def _insert_dense(stacked: Array, tensor: Array, layer: int, dtype: Any, transposed: bool) -> tuple[Array, Array]:
    matrix = _from_bits(tensor.T if transposed else tensor, dtype)
    return _write(stacked, matrix.astype(stacked.dtype), layer), _all_finite(tensor, dtype)


@partial(jax.jit, static_argnames=("dtype", "result_dtype"))
def _convert(tensor: Array, dtype: Any, result_dtype: Any) -> tuple[Array, Array]:
    return _from_bits(tensor, dtype).astype(result_dtype), _all_finite(tensor, dtype)


def _write(stacked: Any, one: Any, layer: int) -> Any:
    return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, layer, 0), stacked, one)
