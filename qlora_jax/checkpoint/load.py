"""From a checkpoint to a model, one matrix at a time.

The model is built abstractly first (shapes, no memory). Every tensor of the checkpoint is checked against it by name and
shape before any is read. Then the stacked buffers of the result are allocated on the device, by one program, and for each
row of the family's key table filled in place: one tensor is read, quantised and written to its layer, and dropped before the
next is read, so that the host holds the result plus little more than the largest tensor.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from qlora_jax.checkpoint.source import Checkpoint, CheckpointError, listed
from qlora_jax.models import Family, Key, Model, ModelConfig, Remat, family_of
from qlora_jax.nn import (
    AdapterConstant,
    AttentionImplementation,
    Linear,
    ReadsWeight,
    WeightConstant,
    default_implementation,
    frozen_sharding,
    place,
)
from qlora_jax.peft import LoRA, Method, reads_weights
from qlora_jax.quant import (
    PackedTable,
    Quantization,
    QuantizedTensor,
    TableStorage,
    empty_rows,
    put_rows,
    quantize,
    table_shape,
    with_double_quantization,
)

_CHUNK = 2**20  # values checked at a time
_TABLE_ROWS = 4096  # of a token table, packed at a time


def default_dtype(platform: str | None = None) -> Any:
    """The compute dtype of a platform: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


# (full name of a linear module, its original float32 matrix [in, out]) to what is stored in its place; None: it is itself.
Rewrite = Callable[[str, Array], Array | None]


def load_model(
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None = Quantization(),
    tables: TableStorage = "none",
    method: Method | None = None,
    dtype: DTypeLike | None = None,
    attention: AttentionImplementation | None = None,
    remat: Remat = "full",
    mesh: Mesh | None = None,
    seed: int = 0,
    progress: bool = True,
    rewrite: Rewrite | None = None,
) -> Model:
    """The model of a checkpoint, with its linear layers quantised and a fresh adapter in its slots.

    Args:
        quantization: None keeps the linear layers dense. A checkpoint that is quantised already is taken as it is: this
            must be its own (`storage_of`), or None for the dense values that it stands for.
        tables: storage of the token table and the output head.
        dtype: of activations and dense weights; by platform if None.
        attention: kernel; by platform if None.
        mesh: devices over which the frozen weights are spread while they are filled; None: the default device.
        seed: of the adapter's initial values.
        progress: whether to show a progress bar.
        rewrite: of the linear matrices, one at a time, before they are stored (from_weights.py).

    Raises:
        CheckpointError: missing, extra or misshapen tensors (all in one message), or weights that are NaN or infinite.
        ValueError: unsupported architecture or config; LoRA targets that match nothing, or a start that follows from the
            weights without what makes it (`from_weights.FromWeights`).
    """
    if isinstance(method, LoRA) and reads_weights(method.init_lora_weights) and rewrite is None:
        raise ValueError(
            f"init_lora_weights {method.init_lora_weights}: expected rewrite=FromWeights(…) beside it, found none"
        )
    if rewrite is not None and checkpoint.quantized:
        raise CheckpointError(
            f"{checkpoint.source}: expected the original weights, of which a part is taken off, found quantised ones"
        )
    family = family_of(checkpoint.config)
    checkpoint = with_tied(checkpoint, family)
    config = family.config(checkpoint.config)
    _check_storage(checkpoint, quantization, config)
    dtype = jnp.dtype(default_dtype() if dtype is None else dtype)

    def build() -> Model:
        return family.model(
            config,
            quantization=quantization,
            tables=tables,
            method=method,
            dtype=dtype,
            attention=attention or default_implementation(),
            remat=remat,
            rngs=nnx.Rngs(seed),
        )

    graph, adapter, constants, following, frozen = nnx.split(
        nnx.eval_shape(build), nnx.LoRAParam, AdapterConstant, WeightConstant, ...
    )
    check_tensors(checkpoint, family, config, frozen)

    stacked = {key.path: find(frozen, key.path).get_value() for key in config.keys if key.stacked}
    buffers = _zeros(mesh, stacked)
    total = sum(len(key.names()) for key in config.keys)
    not_finite: list[str] = []
    with tqdm(total=total, desc="loading", unit="tensor", disable=not progress, leave=False) as bar:
        for key in config.keys:
            variable = find(frozen, key.path)
            if key.stacked:
                value, bad = _fill_stack(checkpoint, key, buffers.pop(key.path), bar, rewrite if key.linear else None)
            elif isinstance(variable.get_value(), PackedTable) and not key.linear:
                value, bad = _fill_table(checkpoint, key.name, variable.get_value(), mesh, bar)
            else:
                value, bad = _fill_dense(checkpoint, key, variable.get_value(), mesh, bar)
            variable.set_value(value)
            not_finite += bad
    if not_finite:
        raise CheckpointError(f"{checkpoint.source}: tensors that hold NaN or infinite values: {listed(not_finite)}")
    if method is not None:  # the weights that the constructor would draw are dead code here, only the adapter is made
        made = jax.jit(lambda: nnx.state(build(), nnx.LoRAParam, AdapterConstant))()
        adapter, constants = place(mesh, made, PartitionSpec())
    model = nnx.merge(graph, adapter, constants, following, frozen)
    _read_weights(model, mesh)
    return model


def _read_weights(model: Model, mesh: Mesh | None) -> None:
    """Sets what of the adapters follows from the frozen weights."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and isinstance(layer.adapter, ReadsWeight):
            layer.adapter.read_weight(layer.weight.get_value())
            for constant in (value for value in vars(layer.adapter).values() if isinstance(value, WeightConstant)):
                constant.set_value(place(mesh, constant.get_value(), PartitionSpec()))


def storage_of(checkpoint: Checkpoint, asked: Quantization | None) -> Quantization | None:
    """How to hold the linear layers: as asked, except that the default means the checkpoint's own where it has one."""
    return checkpoint.quantization or asked if asked == Quantization() else asked


def with_tied(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the tensor of the family that it leaves out because it equals another, if there is one."""
    if family.tied is None or not checkpoint.config.get("tie_word_embeddings", True):
        return checkpoint
    name, original = family.tied
    if name in checkpoint.shapes or original not in checkpoint.shapes:
        return checkpoint
    return with_copy(checkpoint, name, original)


def with_copy(checkpoint: Checkpoint, name: str, of: str) -> Checkpoint:
    """The checkpoint with a tensor that equals another."""
    read = checkpoint.read
    return dataclasses.replace(
        checkpoint,
        shapes={**checkpoint.shapes, name: checkpoint.shapes[of]},
        read=lambda asked: read(of if asked == name else asked),
    )


def _check_storage(checkpoint: Checkpoint, quantization: Quantization | None, config: ModelConfig) -> None:
    own = checkpoint.quantization
    if own is None or quantization is None:
        return
    if quantization != own:
        raise CheckpointError(
            f"{checkpoint.source}: is quantised already: expected {own} or dense layers, found {quantization}; values "
            "in 4 bits are not quantised again"
        )
    dense = [name for key in config.keys if key.linear for name in key.names() if name not in checkpoint.quantized]
    if dense:
        warnings.warn(
            f"{checkpoint.source}: {len(dense)} linear layers lie dense in this checkpoint ({listed(dense)}); they are "
            "quantised like the others",
            stacklevel=3,
        )


def check_tensors(checkpoint: Checkpoint, family: Family, config: ModelConfig, frozen: Any) -> None:
    """Compares the names and shapes of a checkpoint with those of the model, from headers alone.

    Raises:
        CheckpointError: one message with every kind of problem.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for key in config.keys:
        value = find(frozen, key.path).get_value()
        shape = value.shape if key.linear or not isinstance(value, PackedTable) else table_shape(value)
        shape = shape[1:] if key.stacked else shape
        for name in key.names():
            expected[name] = shape[::-1] if key.linear else shape
    found = checkpoint.shapes
    missing = [name for name in expected if name not in found]
    tied = "lm_head.weight" if config.tie_word_embeddings else None  # a copy of the token table
    extra = [
        name
        for name in found
        if name not in expected and not any(re.fullmatch(pattern, name) for pattern in family.ignored) and name != tied
    ]
    misshapen = [
        f"{name}: expected {expected[name]}, found {tuple(found[name])}"
        for name in expected
        if name in found and tuple(found[name]) != expected[name]
    ]
    kinds = {"missing tensors": missing, "tensors that the model has no place for": extra, "wrong shapes": misshapen}
    problems = [f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError.of(checkpoint.source, problems)


def find(state: Any, path: tuple[str, ...]) -> nnx.Variable:
    """The variable at a path of a state."""
    for name in path:
        state = state[name]
    return state


def _fill_stack(checkpoint: Checkpoint, key: Key, value: Any, bar: tqdm, rewrite: Rewrite | None) -> tuple[Any, list[str]]:
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


def _fill_dense(checkpoint: Checkpoint, key: Key, abstract: Any, mesh: Mesh | None, bar: tqdm) -> tuple[Array, list[str]]:
    """The same for a parameter that there is once."""
    tensor, dtype = _to_device(checkpoint.read(key.name))
    value, finite = _convert(tensor, dtype, abstract.dtype)
    value = jax.device_put(value, frozen_sharding(mesh, abstract.shape))
    bar.update()
    return value, [] if bool(finite) else [key.name]


def _fill_table(
    checkpoint: Checkpoint, name: str, abstract: PackedTable, mesh: Mesh | None, bar: tqdm
) -> tuple[PackedTable, list[str]]:
    """A token table or head in fewer bits, of which the device never holds more than some rows dense."""
    tensor = checkpoint.read(name)
    value, finite = empty_rows(abstract, partial(_zeros_of, mesh)), True
    for start in range(0, len(tensor), _TABLE_ROWS):
        rows, dtype = _to_device(tensor[start : start + _TABLE_ROWS])
        value, all_finite = jax.block_until_ready(_put_rows(value, rows, start, dtype=dtype))
        finite &= bool(all_finite)
    bar.update()
    if isinstance(value, QuantizedTensor):  # scales are quantised all together
        value = jax.jit(with_double_quantization)(value)
    value = jax.tree.map(lambda leaf: jax.device_put(leaf, frozen_sharding(mesh, leaf.shape)), value)
    return value, [] if finite else [name]


def _zeros(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays for a tree of shapes. One program makes them all: they would be compiled one by one otherwise."""
    shardings = jax.tree.map(lambda leaf: frozen_sharding(mesh, leaf.shape), tree)
    make = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree), out_shardings=shardings)
    return make()


def _zeros_of(mesh: Mesh | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.zeros(shape, dtype, device=frozen_sharding(mesh, shape))


@partial(jax.jit, donate_argnums=0, static_argnames="dtype")
def _put_rows(table: PackedTable, rows: Array, start: int, dtype: Any) -> tuple[PackedTable, Array]:
    return put_rows(table, _from_bits(rows, dtype), start), _all_finite(rows, dtype)


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
