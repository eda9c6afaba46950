"""Fills the buffers of a model on the device: reads, checks, quantises and writes one tensor of a checkpoint at a time.

A tensor is in host memory once, and on the device once beside the result. The buffers of the result are donated from one
write to the next, so that they are never copied.

On a mesh of several processes each of them reads and quantises every tensor on a device of its own, since the scales of a
matrix are quantised all together, and writes the parts of its devices into the buffers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.initialize import Rewrite, Rewritten
from qlora_jax.models import ParameterMapping
from qlora_jax.nn import frozen_sharding, frozen_shardings, laid_out, put
from qlora_jax.quant import (
    MixedStack,
    PackedEmbedding,
    QuantizedTensor,
    empty_embedding,
    quantize,
    with_double_quantization,
    with_parts,
    write_embedding_rows,
)

__all__ = ["Filled", "fill_dense", "fill_embedding", "fill_stack", "zeros"]

_CHUNK = 2**20  # values checked at a time
_EMBEDDING_ROWS = 4096  # rows of an embedding packed at a time


class Filled(NamedTuple):
    """The value of one parameter mapping.

    Attributes:
        value: an array, `QuantizedTensor` or packed embedding; stacked along its first axis where the mapping is.
        not_finite: the names of tensors that hold NaN or infinite values.
        records: what the rewrite did to each linear module, without the stored matrix.
    """

    value: Any
    not_finite: list[str]
    records: dict[str, Rewritten]


def fill_stack(checkpoint: Checkpoint, mapping: ParameterMapping, value: Any, bar: tqdm, rewrite: Rewrite | None) -> Filled:
    """Return the filled value of a stacked mapping. `value` is its buffer, which is donated."""
    names = mapping.names()
    if not isinstance(value, MixedStack):
        return _fill(checkpoint, names, value, mapping, bar, rewrite)
    packed = [name for name, place in zip(names, value.places, strict=True) if place >= 0]
    dense = [name for name, place in zip(names, value.places, strict=True) if place < 0]
    one = _fill(checkpoint, packed, value.packed, mapping, bar, rewrite)
    other = _fill(checkpoint, dense, value.dense, mapping, bar, rewrite)
    mixed = MixedStack(one.value, other.value, value.places)
    return Filled(mixed, one.not_finite + other.not_finite, one.records | other.records)


def _fill(
    checkpoint: Checkpoint, names: Sequence[str], value: Any, mapping: ParameterMapping, bar: tqdm, rewrite: Rewrite | None
) -> Filled:
    """Return the filled value of a stack of these tensors."""
    insert = _insert_dense
    if not jax.tree.leaves(value)[0].is_fully_addressable:
        insert = _insert_own_part
    elif isinstance(value, QuantizedTensor):
        insert = _insert_quantized if value.parts == 1 else _insert_in_parts
    not_finite: list[str] = []
    records: dict[str, Rewritten] = {}
    for layer, name in enumerate(names):
        if name in checkpoint.quantized and isinstance(value, QuantizedTensor) and checkpoint.read_quantized is not None:
            one = _in_parts(dataclasses.replace(checkpoint.read_quantized(name), dtype=value.dtype), value.parts)
            value = jax.block_until_ready(_write_one(value, _of_layer(one, value), layer))
            bar.update()
            continue
        tensor, dtype = _to_device(checkpoint.read(name))
        stored = None
        if rewrite is not None:
            module = name.removesuffix(".weight")
            rewritten = rewrite(module, _matrix(tensor, dtype))
            stored, records[module] = rewritten.stored, rewritten.to_host()
            del rewritten
        if stored is None:
            value, finite = insert(value, tensor, layer, dtype=dtype, transposed=mapping.linear)
        else:
            value, finite = insert(value, stored, layer, dtype=stored.dtype, transposed=False)
        del tensor, stored
        # Dispatch is asynchronous: without waiting, the next tensors would be read while this one is still held.
        if not bool(jax.block_until_ready((value, finite))[1]):
            not_finite.append(name)
        bar.update()
    return Filled(value, not_finite, records)


def fill_dense(checkpoint: Checkpoint, mapping: ParameterMapping, abstract: Any, mesh: Mesh | None, bar: tqdm) -> Filled:
    """Return the dense value of a mapping that is not stacked; `abstract` gives its dtype and shape."""
    tensor, dtype = _to_device(checkpoint.read(mapping.name))
    value, finite = _convert(tensor, dtype, abstract.dtype)
    value = put(value, frozen_shardings(mesh, mapping.path, abstract))
    bar.update()
    return Filled(value, [] if bool(finite) else [mapping.name], {})


def fill_embedding(checkpoint: Checkpoint, name: str, abstract: PackedEmbedding, mesh: Mesh | None, bar: tqdm) -> Filled:
    """Return a packed embedding or head. The device never holds more than some of its rows dense."""
    tensor = checkpoint.read(name)
    own = None if mesh is not None and mesh.is_multi_process else mesh  # each process packs all of it, and puts its parts
    value, finite = empty_embedding(abstract, partial(_zeros_of, own)), True
    for start in range(0, len(tensor), _EMBEDDING_ROWS):
        rows, dtype = _to_device(tensor[start : start + _EMBEDDING_ROWS])
        value, all_finite = jax.block_until_ready(_put_rows(value, rows, start, dtype=dtype))
        finite &= bool(all_finite)
    bar.update()
    if isinstance(value, QuantizedTensor):  # scales are quantised all together
        value = jax.jit(with_double_quantization)(value)
    value = jax.tree.map(lambda leaf: put(leaf, frozen_sharding(mesh, leaf.shape)), value)
    return Filled(value, [] if finite else [name], {})


def zeros(mesh: Mesh | None, values: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Return arrays of zeros for values of shapes by their paths, with the layouts that they have on the mesh.

    One program makes them all, so that only one is compiled.
    """
    values = {path: laid_out(mesh, path, value) for path, value in values.items()}
    shardings = {path: frozen_shardings(mesh, path, value) for path, value in values.items()}
    make = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), values), out_shardings=shardings)
    return make()


def _zeros_of(mesh: Mesh | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.zeros(shape, dtype, device=frozen_sharding(mesh, shape))


@partial(jax.jit, donate_argnums=0, static_argnames="dtype")
def _put_rows(embedding: PackedEmbedding, rows: Array, start: int, dtype: Any) -> tuple[PackedEmbedding, Array]:
    return write_embedding_rows(embedding, _from_bits(rows, dtype), start), _all_finite(rows, dtype)


def _to_device(tensor: np.ndarray) -> tuple[Array, Any]:
    """Return the tensor on the device, and its dtype; the copy on the host can be freed when this returns.

    bfloat16 is sent as uint16: XLA's CPU backend would otherwise begin with a float32 copy of the argument.
    """
    bits = tensor.view(np.uint16) if tensor.dtype == jnp.bfloat16 else tensor
    return jax.block_until_ready(jax.device_put(bits)), tensor.dtype


def _from_bits(tensor: Array, dtype: Any) -> Array:
    """Return the tensor that `_to_device` sent, in its own dtype; called inside jit."""
    return jax.lax.bitcast_convert_type(tensor, dtype) if dtype == jnp.bfloat16 else tensor


def _all_finite(tensor: Array, dtype: Any) -> Array:
    """Return whether all values are finite. They are checked in parts: XLA's CPU backend would store a mask of the whole."""
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


def _insert_in_parts(stacked: QuantizedTensor, tensor: Array, layer: int, dtype: Any, transposed: bool) -> tuple[Any, Array]:
    # Two programs: in the one that writes, which is for all devices, XLA would reshard the matrix several times to pack it.
    matrix, finite = _convert(tensor.T if transposed else tensor, dtype, None)
    one = quantize(matrix, stacked.data_type, stacked.block_size, stacked.double_quantized, stacked.dtype)
    return _write_one(stacked, _in_parts(one, stacked.parts), layer), finite


def _insert_own_part(stacked: Any, tensor: Array, layer: int, dtype: Any, transposed: bool) -> tuple[Any, Array]:
    """Insert the parts of this process's devices. The matrix, and what is made of it, is on one device of the process."""
    packed = isinstance(stacked, QuantizedTensor)
    one, finite = _convert(tensor.T if transposed else tensor, dtype, None if packed else stacked.dtype)
    if packed:
        one = quantize(one, stacked.data_type, stacked.block_size, stacked.double_quantized, stacked.dtype)
        one = _in_parts(one, stacked.parts)
    return _write_one(stacked, _of_layer(one, stacked), layer), finite


def _of_layer(one: Any, stacked: Any) -> Any:
    """Return the values of a layer with the shardings that they have in a stack on the devices of several processes."""

    def place(leaf: Array, all_: Array) -> Array:
        if all_.is_fully_addressable:
            return leaf
        assert isinstance(all_.sharding, NamedSharding)
        return put(leaf, NamedSharding(all_.sharding.mesh, PartitionSpec(*all_.sharding.spec[1:])))

    return jax.tree.map(place, one, stacked)


@partial(jax.jit, static_argnames="dtype")
def _matrix(tensor: Array, dtype: Any) -> Array:
    """Return a linear layer's tensor as float32 `[in, out]`."""
    return _from_bits(tensor.T, dtype).astype(jnp.float32)


@partial(jax.jit, donate_argnums=0)
def _write_one(stacked: Any, one: Any, layer: int) -> Any:
    return _write(stacked, one, layer)


@partial(jax.jit, donate_argnums=0, static_argnames=("dtype", "transposed"))
def _insert_dense(stacked: Array, tensor: Array, layer: int, dtype: Any, transposed: bool) -> tuple[Array, Array]:
    matrix = _from_bits(tensor.T if transposed else tensor, dtype)
    return _write(stacked, matrix.astype(stacked.dtype), layer), _all_finite(tensor, dtype)


@partial(jax.jit, static_argnames=("dtype", "result_dtype"))
def _convert(tensor: Array, dtype: Any, result_dtype: Any) -> tuple[Array, Array]:
    values = _from_bits(tensor, dtype)
    return values if result_dtype is None else values.astype(result_dtype), _all_finite(tensor, dtype)


_in_parts = jax.jit(with_parts, static_argnames="parts")


def _write(stacked: Any, one: Any, layer: int) -> Any:
    return jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, layer, 0), stacked, one)
