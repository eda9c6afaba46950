"""Merges one tensor of a checkpoint with an adapter, as it is written into the new folder."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.checkpoint.bitsandbytes import quantized_tensors
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.initialize import Rewrite
from qlora_jax.errors import CheckpointError
from qlora_jax.export.trained_parameters import Retrained
from qlora_jax.quant import (
    EmbeddingStorage,
    Quantization,
    QuantizedTensor,
    dequantize,
    embedding_lookup,
    quantize,
    quantize_embedding,
)

__all__ = ["TensorMerge", "merged_tensors"]


@dataclasses.dataclass(frozen=True)
class TensorMerge:
    """How the tensors of a checkpoint are merged.

    Attributes:
        adapter: None: nothing is merged.
        dtype: dtype of dense tensors in the file.
        quantization: storage of the linear layers in the file; None: dense.
        from_dequantized, from_embedding_storage: how the base was stored in training; see `merge`.
        rewrite: how the linear matrices were changed before they were stored in training; None: not at all.
        linear: the names of the linear matrices.
        dense: the names of those among them that stay dense in a file whose others are quantised.
        packed: the names of the embeddings that `from_embedding_storage` is about.
        adapted: the adapter's name of a module that the checkpoint calls otherwise.
        retrained: values that replace those of the checkpoint, by name.
    """

    adapter: Adapter | None
    dtype: np.dtype
    quantization: Quantization | None
    from_dequantized: Quantization | None
    from_embedding_storage: EmbeddingStorage
    rewrite: Rewrite | None
    linear: frozenset[str] = frozenset()
    dense: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    adapted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    retrained: Mapping[str, Retrained] = dataclasses.field(default_factory=dict)


def merged_tensors(checkpoint: Checkpoint, name: str, how: TensorMerge) -> dict[str, np.ndarray]:
    """Return what a tensor of the checkpoint is written as: one tensor, or several for a quantised matrix.

    Raises:
        CheckpointError: values that are not finite, or are too large for the dtype.
    """
    linear, quantization = name in how.linear, how.quantization
    adapted = how.adapter is not None and how.adapter.of_module(name.rsplit(".", 1)[0])
    unchanged = not adapted and name not in how.retrained
    if linear and unchanged and name in checkpoint.quantized and quantization == checkpoint.quantization:
        assert checkpoint.read_quantized is not None
        return quantized_tensors(name, checkpoint.read_quantized(name), how.dtype.name)
    tensor = _merged(checkpoint, name, how)
    if not np.isfinite(tensor).all():
        what = (
            f"tensor {name}"
            if unchanged or how.adapter is None
            else f"tensor {name}, with {how.adapter.name} merged into it,"
        )
        raise CheckpointError(f"{checkpoint.name}: {what} holds NaN or infinite values.")
    if linear and quantization is not None and name not in how.dense:
        return quantized_tensors(name, _quantized(tensor, quantization), how.dtype.name)
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        rounded = tensor.astype(how.dtype, copy=False)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(tensor).max())
        raise CheckpointError(
            f"{checkpoint.name}: tensor {name}: {largest:g} is too large for {how.dtype.name}; use bfloat16."
        )
    return {name: rounded}


def _merged(checkpoint: Checkpoint, name: str, how: TensorMerge) -> np.ndarray:
    """Return a tensor of the checkpoint with the adapter in it, in the dtype of the checkpoint or in float32."""
    adapter, (module, _, kind) = how.adapter, name.rpartition(".")
    tensor = checkpoint.read(name)
    if name in how.packed:  # before trained rows take their values
        tensor = _through_packing(tensor, how.from_embedding_storage)
    if name in how.retrained:
        tensor = how.retrained[name].put(tensor)
        if name in how.linear:  # a matrix that was trained as a whole, and not in 4 bits
            return tensor
    if name in how.linear and how.rewrite is not None:
        stored = how.rewrite(module, jnp.asarray(tensor, jnp.float32).T).stored
        tensor = tensor if stored is None else np.asarray(stored).T
    if name in how.linear and how.from_dequantized is not None and not checkpoint.quantized:
        tensor = _through_quantization(tensor, how.from_dequantized)
    module = how.adapted.get(module, module)
    found = {} if adapter is None else adapter.of_module(module)
    if adapter is None or not found:
        return tensor
    if kind == "bias":
        return adapter.method.merged_bias(tensor, module, found)
    return adapter.method.merged(tensor, module, found)


def _quantized(matrix: np.ndarray, quantization: Quantization) -> QuantizedTensor:
    """Return a matrix `[out, in]` in 4 bits, as the loader quantises it: layers hold `[in, out]`."""
    return quantize(
        jnp.asarray(matrix).T,
        quantization.data_type,
        quantization.block_size,
        quantization.double_quantization,
    )


def _through_quantization(matrix: np.ndarray, quantization: Quantization) -> np.ndarray:
    """Return float32 dequantize(quantize(matrix)), `[out, in]`."""
    return np.asarray(jax.jit(dequantize, static_argnames="dtype")(_quantized(matrix, quantization), jnp.float32)).T


def _through_packing(embedding: np.ndarray, storage: EmbeddingStorage) -> np.ndarray:
    """Return the float32 rows of an embedding `[vocabulary, features]` after it was packed."""
    packed = quantize_embedding(jnp.asarray(embedding), storage, jnp.float32)
    return np.asarray(embedding_lookup(packed, jnp.arange(len(embedding))))
