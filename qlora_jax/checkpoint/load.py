"""From a checkpoint to a model, one matrix at a time.

The model is built abstractly first (shapes, no memory). Every tensor of the checkpoint is checked against it by name and
shape before any is read. Then the stacked buffers of the result are allocated on the device, by one program, and for each
row of the family's key table filled in place: one tensor is read, quantised and written to its layer, and dropped before the
next is read, so that the host holds the result plus little more than the largest tensor.
"""

import dataclasses
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.fill import Rewrite, fill_dense, fill_embedding, fill_stack, zeros
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.models import Family, Model, ModelConfig, Remat, family_of
from qlora_jax.nn import (
    AdapterConstant,
    AttentionImplementation,
    Linear,
    ReadsWeight,
    WeightConstant,
    default_implementation,
    put_on_mesh,
)
from qlora_jax.peft import LoRA, Method, reads_weights
from qlora_jax.quant import EmbeddingStorage, PackedEmbedding, Quantization, embedding_shape


def default_dtype(platform: str | None = None) -> Any:
    """The compute dtype of a platform: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def load_model(
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None = Quantization(),
    embedding_storage: EmbeddingStorage = "none",
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
        embedding_storage: storage of the token table and the output head.
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
            embedding_storage=embedding_storage,
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

    stacked = {key.path: find(frozen, key.path).get_value() for key in config.parameter_mappings if key.stacked}
    buffers = zeros(mesh, stacked)
    total = sum(len(key.names()) for key in config.parameter_mappings)
    not_finite: list[str] = []
    with tqdm(total=total, desc="loading", unit="tensor", disable=not progress, leave=False) as bar:
        for key in config.parameter_mappings:
            variable = find(frozen, key.path)
            if key.stacked:
                value, bad = fill_stack(checkpoint, key, buffers.pop(key.path), bar, rewrite if key.linear else None)
            elif isinstance(variable.get_value(), PackedEmbedding) and not key.linear:
                value, bad = fill_embedding(checkpoint, key.name, variable.get_value(), mesh, bar)
            else:
                value, bad = fill_dense(checkpoint, key, variable.get_value(), mesh, bar)
            variable.set_value(value)
            not_finite += bad
    if not_finite:
        raise CheckpointError(f"{checkpoint.source}: tensors that hold NaN or infinite values: {list_names(not_finite)}")
    if method is not None:  # the weights that the constructor would draw are dead code here, only the adapter is made
        draw = jax.jit(lambda: nnx.state(build(), nnx.LoRAParam, AdapterConstant), compiler_options=_once())
        made = draw()
        adapter, constants = put_on_mesh(mesh, made, PartitionSpec())
    model = nnx.merge(graph, adapter, constants, following, frozen)
    _read_weights(model, mesh)
    return model


def _once() -> dict[str, Any]:
    """Compiler options of a program that runs once: LLVM takes seconds to make it some milliseconds faster."""
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def _read_weights(model: Model, mesh: Mesh | None) -> None:
    """Sets what of the adapters follows from the frozen weights."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and isinstance(layer.adapter, ReadsWeight):
            layer.adapter.read_weight(layer.weight.get_value())
            for constant in (value for value in vars(layer.adapter).values() if isinstance(value, WeightConstant)):
                constant.set_value(put_on_mesh(mesh, constant.get_value(), PartitionSpec()))


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
    dense = [
        name for key in config.parameter_mappings if key.linear for name in key.names() if name not in checkpoint.quantized
    ]
    if dense:
        warnings.warn(
            f"{checkpoint.source}: {len(dense)} linear layers lie dense in this checkpoint ({list_names(dense)}); they are "
            "quantised like the others",
            stacklevel=3,
        )


def check_tensors(checkpoint: Checkpoint, family: Family, config: ModelConfig, frozen: Any) -> None:
    """Compares the names and shapes of a checkpoint with those of the model, from headers alone.

    Raises:
        CheckpointError: one message with every kind of problem.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for key in config.parameter_mappings:
        value = find(frozen, key.path).get_value()
        shape = value.shape if key.linear or not isinstance(value, PackedEmbedding) else embedding_shape(value)
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
    problems = [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError.of(checkpoint.source, problems)


def find(state: Any, path: tuple[str, ...]) -> nnx.Variable:
    """The variable at a path of a state."""
    for name in path:
        state = state[name]
    return state
