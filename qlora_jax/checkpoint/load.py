"""Loads the model of a checkpoint, one matrix at a time.

The model is traced without memory first. Every tensor of the checkpoint is compared with it by name and shape before any
tensor is read. Then one program allocates the stacked buffers of the result on the device, and they are filled in place: one
tensor is read, quantised, written to its layer, and dropped before the next one is read. The host therefore holds the result
and little more than the largest tensor.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.fill import fill_dense, fill_embedding, fill_stack, zeros
from qlora_jax.checkpoint.initialize import Rewrite, Rewritten, rewrite_for, subtracted_from, with_initial_adapter
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.models import Model, ModelConfig, ModelSpec, Origin, Remat, check_heads, tied_head
from qlora_jax.nn import (
    AdapterConstant,
    AttentionTarget,
    Linear,
    ReadsWeight,
    WeightConstant,
    abstract_module,
    put_adapter,
    put_on_mesh,
)
from qlora_jax.nn.mesh import TENSOR, check_axes
from qlora_jax.peft import Method, Subtracted
from qlora_jax.quant import EmbeddingStorage, PackedEmbedding, Quantization, embedding_shape

__all__ = ["check_tensors", "default_dtype", "find", "load", "load_model", "storage_of", "with_copy", "with_tied"]


def default_dtype(platform: str | None = None) -> Any:
    """Return the compute dtype of a platform: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def load_model(
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None = Quantization(),
    embedding_storage: EmbeddingStorage = "none",
    method: Method | None = None,
    dtype: DTypeLike | None = None,
    attention: AttentionTarget | None = None,
    remat: Remat = "full",
    mesh: Mesh | None = None,
    seed: int = 0,
    progress: bool = True,
    subtracted: Subtracted | None = None,
) -> Model:
    """Return the model of a checkpoint, with quantised linear layers and a new adapter in them.

    An adapter whose method reads the weights (LoRA with `init_lora_weights` "pissa", "pissa_niter_N" or "loftq") is
    initialised from them on the way. `save_adapter` then writes it as an ordinary LoRA for the original weights.

    Args:
        quantization: storage of the linear layers; None keeps them dense. A checkpoint that is quantised already cannot be
            quantised again: give its own quantization (`storage_of`), or None for dense values. Those of its layers that are
            dense stay dense.
        embedding_storage: storage of the token embedding and the output head.
        method: the method of fine-tuning; None for a model without an adapter.
        dtype: dtype of activations and dense weights; that of the platform if None.
        attention: the device whose kernel computes causal attention; the default one if None.
        remat: what the backward pass recomputes.
        mesh: devices over which the frozen weights are sharded while they are filled, as `nn.data_mesh` returns them; None
            for the default device.
        seed: seed of the adapter's random initial values.
        progress: whether to show a progress bar.
        subtracted: what a saved adapter subtracted from the weights; None: nothing, or what the method decides.

    Raises:
        CheckpointError: missing, extra or misshapen tensors (all in one message), or weights that are NaN or infinite.
        QLoRAError: an unsupported architecture or config, or a method that does not fit the model.
    """
    spec = ModelSpec(
        checkpoint.model_config,
        quantization,
        embedding_storage,
        method,
        default_dtype() if dtype is None else dtype,
        remat,
        frozenset() if quantization is None else checkpoint.dense_modules,
    )
    model, subtracted = load(
        checkpoint, spec, attention=attention, subtracted=subtracted, mesh=mesh, seed=seed, progress=progress
    )
    model.origin = Origin(checkpoint.name, subtracted=subtracted, text_prefix=checkpoint.text_prefix)
    return model


def checked_rewrite(checkpoint: Checkpoint, spec: ModelSpec, subtracted: Subtracted | None) -> Rewrite | None:
    """Return how the original weights are changed before they are stored (`rewrite_for`); no weights are read.

    Raises:
        OptionError: the method's initialization does not go with the storage of the weights.
        CheckpointError: a part of the original weights is to be subtracted, and the checkpoint has quantised ones.
    """
    rewrite = rewrite_for(spec.method, subtracted, spec.quantization)
    if rewrite is not None and checkpoint.quantized:
        raise CheckpointError(
            f"{checkpoint.name}: expected the original weights, from which a part is subtracted, found quantised ones"
        )
    return rewrite


def load(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    abstract: Model | None = None,
    attention: AttentionTarget | None = None,
    subtracted: Subtracted | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Model, Subtracted | None]:
    """Return the model of a checkpoint as `spec` describes it, and what was subtracted from its weights.

    This is `load_model` for a caller that has a `ModelSpec`. The model that it returns has no `origin`, so that its graph
    definition equals that of `spec.abstract()`.

    Args:
        spec: `spec.config` must be `checkpoint.model_config`.
        abstract: the result of `spec.abstract()`, where the caller has traced it; the model is traced here if None.

    Raises:
        QLoRAError: see `load_model`.
    """
    if mesh is not None:
        check_axes(mesh)
        check_heads(spec.config, mesh.shape[TENSOR])
    checkpoint = with_tied(checkpoint)
    rewrite = checked_rewrite(checkpoint, spec, subtracted)
    _check_storage(checkpoint, spec.quantization)
    if abstract is None:
        abstract = abstract_module(lambda: spec.build(nnx.Rngs(0), attention))
    graph, *parts = nnx.split(abstract, nnx.LoRAParam, AdapterConstant, WeightConstant, ...)
    # New variables: those of a split are the model's own, and the caller's abstract model must stay abstract.
    adapter, constants, following, frozen = (jax.tree.map(lambda leaf: leaf, part) for part in parts)
    check_tensors(checkpoint, frozen)
    records = _fill(checkpoint, frozen, rewrite, mesh, progress=progress)
    if spec.method is not None:  # the program makes the adapter alone: the random weights of the constructor are dead code
        draw = jax.jit(
            lambda: nnx.state(spec.build(nnx.Rngs(seed), attention), nnx.LoRAParam, AdapterConstant),
            compiler_options=_compile_fast(),
        )
        adapter, constants = draw()
        adapter, constants = put_adapter(mesh, adapter), put_on_mesh(mesh, constants, PartitionSpec())
    model = nnx.merge(graph, adapter, constants, following, frozen)
    _read_weights(model, mesh)
    if subtracted is None:
        model, subtracted = with_initial_adapter(model, records), subtracted_from(spec.method, records)
    return model, subtracted


def _fill(
    checkpoint: Checkpoint, frozen: Any, rewrite: Rewrite | None, mesh: Mesh | None, *, progress: bool
) -> dict[str, Rewritten]:
    """Set the variables of an abstract state to the tensors of a checkpoint; return the records of the rewrite.

    Raises:
        CheckpointError: tensors that hold NaN or infinite values.
    """
    mappings = checkpoint.model_config.parameter_mappings
    buffers = zeros(mesh, {mapping.path: find(frozen, mapping.path).get_value() for mapping in mappings if mapping.stacked})
    total = sum(len(mapping.names()) for mapping in mappings)
    not_finite: list[str] = []
    records: dict[str, Rewritten] = {}
    with tqdm(total=total, desc="loading", unit="tensor", disable=not progress, leave=False) as bar:
        for mapping in mappings:
            variable = find(frozen, mapping.path)
            if mapping.stacked:
                own = rewrite if mapping.linear else None
                filled = fill_stack(checkpoint, mapping, buffers.pop(mapping.path), bar, own)
            elif isinstance(variable.get_value(), PackedEmbedding) and not mapping.linear:
                filled = fill_embedding(checkpoint, mapping.name, variable.get_value(), mesh, bar)
            else:
                filled = fill_dense(checkpoint, mapping, variable.get_value(), mesh, bar)
            variable.set_value(filled.value)
            not_finite += filled.not_finite
            records |= filled.records
    if not_finite:
        raise CheckpointError(f"{checkpoint.name}: tensors that hold NaN or infinite values: {list_names(not_finite)}")
    return records


def _compile_fast() -> dict[str, Any]:
    """Return compiler options for a program that runs once. LLVM would take seconds to make it milliseconds faster."""
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def _read_weights(model: Model, mesh: Mesh | None) -> None:
    """Set the variables of the adapters that are computed from the frozen weights."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Linear) and isinstance(layer.adapter, ReadsWeight):
            layer.adapter.read_weight(layer.weight.get_value())
            for constant in (value for value in vars(layer.adapter).values() if isinstance(value, WeightConstant)):
                constant.set_value(put_on_mesh(mesh, constant.get_value(), PartitionSpec()))


def storage_of(checkpoint: Checkpoint, quantization: Quantization | None) -> Quantization | None:
    """Return the storage of the linear layers: the one asked for, where the default means that of a quantised checkpoint."""
    return checkpoint.quantization or quantization if quantization == Quantization() else quantization


def with_tied(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the tensor that its family may leave out because it equals another one, if there is one."""
    family = checkpoint.family
    if family.tied is None or not checkpoint.config.get("tie_word_embeddings", True):
        return checkpoint
    name, original = family.tied
    if name in checkpoint.shapes or original not in checkpoint.shapes:
        return checkpoint
    return with_copy(checkpoint, name, original)


def with_copy(checkpoint: Checkpoint, name: str, of: str) -> Checkpoint:
    """Return the checkpoint with a tensor `name` that equals the tensor `of`."""
    read = checkpoint.read
    return dataclasses.replace(
        checkpoint,
        shapes={**checkpoint.shapes, name: checkpoint.shapes[of]},
        read=lambda asked: read(of if asked == name else asked),
    )


def _check_storage(checkpoint: Checkpoint, quantization: Quantization | None) -> None:
    """Raise CheckpointError for a quantised checkpoint that is to be quantised otherwise."""
    own = checkpoint.quantization
    if own is None or quantization is None:
        return
    if quantization != own:
        raise CheckpointError(
            f"{checkpoint.name}: is quantised already: expected {own} or dense layers, found {quantization}; values "
            "in 4 bits are not quantised again"
        )


def check_tensors(checkpoint: Checkpoint, frozen: Any) -> None:
    """Compare the names and shapes of a checkpoint's tensors with those of its model. No tensor is read.

    Args:
        frozen: the state of the (abstract) model, which may hold more than the frozen variables.

    Raises:
        CheckpointError: one message with every kind of problem.
    """
    config: ModelConfig = checkpoint.model_config
    expected: dict[str, tuple[int, ...]] = {}
    for mapping in config.parameter_mappings:
        value = find(frozen, mapping.path).get_value()
        shape = value.shape if mapping.linear or not isinstance(value, PackedEmbedding) else embedding_shape(value)
        shape = shape[1:] if mapping.stacked else shape
        for name in mapping.names():
            expected[name] = shape[::-1] if mapping.linear else shape
    found = checkpoint.shapes
    missing = [name for name in expected if name not in found]
    # A head that is the token embedding may be in the files too, under either of its names.
    tied = {"lm_head.weight", tied_head(config.parameter_mappings)} if config.tie_word_embeddings else set()
    extra = [
        name
        for name in found
        if name not in expected
        and not any(re.fullmatch(pattern, name) for pattern in checkpoint.family.ignored)
        and name not in tied
    ]
    misshapen = [
        f"{name}: expected {expected[name]}, found {tuple(found[name])}"
        for name in expected
        if name in found and tuple(found[name]) != expected[name]
    ]
    kinds = {"missing tensors": missing, "tensors that the model has no place for": extra, "wrong shapes": misshapen}
    problems = [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError.of(checkpoint.name, problems)


def find(state: Any, path: tuple[str, ...]) -> nnx.Variable:
    """Return the variable at a path of a state."""
    for name in path:
        state = state[name]
    return state
