"""Moves an adapter between a model and its files: what a run saves, and what merging and serving load."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.files import Adapter, read_adapter, write_adapter
from qlora_jax.adapters.fit import check_fit, check_scaling
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.places import places_of, variable_at
from qlora_jax.adapters.virtual_tokens import fill_prompt, prompt_tensors, write_encoder
from qlora_jax.adapters.weight_init import converted_from, to_plain_lora
from qlora_jax.errors import OptionError
from qlora_jax.models import T5, Model
from qlora_jax.nn import put, to_numpy
from qlora_jax.peft import LoRA, Subtracted

__all__ = ["adapter_tensors", "load_adapter", "metadata_of", "save_adapter"]

AnyModel = TypeVar("AnyModel", bound=Model)


def adapter_tensors(model: Model) -> dict[str, np.ndarray]:
    """Return the float32 tensors of a model's adapter by PEFT's names, unstacked, unpadded and in PEFT's orientation.

    Raises:
        OptionError: the model has no adapter.
    """
    if model.prompt is not None:
        return prompt_tensors(model.prompt)
    values: dict[tuple[str, ...], np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, place in places_of(model).items():
        if place.path not in values:
            values[place.path] = to_numpy(variable_at(model, place.path).get_value()).astype(np.float32, copy=False)
        tensors[name] = np.ascontiguousarray(place.read(values[place.path]) + place.of_base(model))
    if not tensors:
        raise OptionError("expected a model with an adapter, found none: was it made with method=None?")
    return tensors


def save_adapter(
    model: Model,
    folder: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    resized_embeddings: Mapping[str, np.ndarray] | None = None,
    subtracted: Subtracted | None = None,
    text_prefix: str | None = None,
    metadata: AdapterMetadata | None = None,
    beside: Sequence[Callable[[Path], None]] = (),
) -> Path:
    """Write the adapter of a model in PEFT's format, with qlora_jax.json beside it; return the folder.

    An adapter whose initialization was subtracted from the base (PiSSA, LoftQ) is written as one ordinary LoRA of twice the
    rank for the original weights. The files are verified (see `write_adapter`), and an adapter in `folder` is replaced.

    Args:
        model: a model that was made with a method; `model.method` goes into adapter_config.json.
        base_model_name_or_path: path or repository id of the base, by which PEFT finds it.
        resized_embeddings: those of the `Adapter` that the model was loaded from, where it has any and `model.origin` does
            not hold them.
        subtracted: what was subtracted from the base, where `model.origin` does not hold it.
        text_prefix: that of the checkpoint (`Checkpoint.text_prefix`), where `model.origin` does not hold it.
        metadata: how the adapter was trained; as the model says (`metadata_of`), if None.
        beside: see `write_adapter`.

    Raises:
        OptionError: the model has no adapter, or its method changes the base but nothing is known of what was subtracted.
        CheckpointError: values that are not finite, or files that could not be written.
    """
    if model.method is not None and model.method.is_full:
        raise OptionError(
            f"{type(model.method).__name__}: expected a model with an adapter, found one whose own parameters are trained, "
            "which has no adapter to save. Write the whole model: qlora_jax.export.merge.merge(checkpoint, "
            "Adapter(name, model.method, None, adapter_tensors(model)), folder, tokenizer=tokenizer)"
        )
    tensors, method = adapter_tensors(model), model.method
    if method is None:
        raise OptionError("expected a model that was made with a method, found none")
    if subtracted is None and model.origin is not None:
        subtracted = model.origin.subtracted
    if text_prefix is None and model.origin is not None:
        text_prefix = model.origin.text_prefix
    if resized_embeddings is None and model.origin is not None and model.origin.resized_embeddings is not None:
        resized_embeddings = model.origin.resized_embeddings.tensors
    if metadata is None:
        metadata = metadata_of(model, subtracted=subtracted)
    if subtracted is not None:
        tensors, method = to_plain_lora(tensors, cast(LoRA, method), subtracted)  # only LoRA subtracts anything
    elif method.changes_base:
        raise OptionError(
            f"init_lora_weights {method.init_lora_weights}: expected a model that was loaded from a checkpoint, "
            "found one of which it is unknown what was subtracted from its weights"
        )
    return write_adapter(
        tensors,
        folder,
        method=method,
        base_model_name_or_path=base_model_name_or_path,
        task_type="SEQ_2_SEQ_LM" if isinstance(model, T5) else "CAUSAL_LM",
        resized_embeddings=resized_embeddings,
        text_prefix=text_prefix,
        beside=(partial(write_encoder, model.prompt), metadata.save, *beside),
    )


def metadata_of(model: Model, *, template: str | None = None, subtracted: Subtracted | None = None) -> AdapterMetadata:
    """Return how a model's adapter was trained, as far as the model knows.

    Args:
        model: a model that was made with a method.
        template: the form of the prompts; that of the adapter that the model was loaded with, if None.
        subtracted: what was subtracted from the base, where `model.origin` does not hold it.
    """
    origin, method = model.origin, model.method
    if origin is not None:
        subtracted = origin.subtracted if subtracted is None else subtracted
        template = origin.template if template is None else template
    if subtracted is not None:
        initialization = subtracted.initialization
    else:
        initialization = None if method is None else converted_from(method)
    scaling = None if origin is None else origin.scaling
    return AdapterMetadata(model.quantization, template, model.embedding_storage, initialization, scaling)


def load_adapter(model: AnyModel, folder: str | Path | Adapter) -> AnyModel:
    """Return the model with the values of an adapter; the frozen weights are shared with `model`.

    Args:
        model: made with `method=read_adapter_method(folder)`.
        folder: a folder, the repository id of an adapter, or an adapter that was read.

    Raises:
        CheckpointError: the adapter was made for another family, its tensors are not those of the model, or shapes or
            scalings differ.
    """
    adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)
    check_fit(adapter, model)
    if model.prompt is not None:
        return fill_prompt(model, adapter.tensors, adapter.encoder)
    check_scaling(adapter, model)
    graph, state, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.tree.map(lambda leaf: leaf, state)  # new variables: those of a split are the model's own
    variables: Any = dict(nnx.to_flat_state(state))
    filled: dict[tuple[str, ...], np.ndarray] = {}
    for name, place in places_of(model).items():
        value = variables[place.path].get_value()
        if place.path not in filled:
            filled[place.path] = np.zeros(value.shape, value.dtype)
        tensor = adapter.tensors[name].astype(np.float32)
        change = tensor - place.of_base(model)
        filled[place.path][place.index] = change.T if place.transposed else change
    for path, new in filled.items():
        value = variables[path].get_value()
        variables[path].set_value(put(new, value.sharding) if isinstance(value, jax.Array) else jnp.asarray(new))
    return nnx.merge(graph, state, frozen)
