"""A LoRA adapter between a model's slots and its files (adapter_files.py): what a training run leaves behind, and what
merging and serving start from.

In memory all layers of a module are stacked and transposed: lora_a `[layers, in, r]`, lora_b `[layers, r, out]`, padded with
zeros where a layer has a smaller rank or none. Of what is trained as a whole or by rows (models.trainable) the model holds
the change, the files the sum with the frozen values. The table of keys of the model's family (models.keys) says which names
a slot stands for. What is missing, has no slot or has another shape is reported in one error.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.files import PREFIX, Adapter, read_adapter, rows_name, tensor_name, write_adapter
from qlora_jax.adapters.peft_config import TaskType
from qlora_jax.adapters.virtual_tokens import encoder_tensors, fill_prompt, prompt_problems, prompt_tensors
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.models import FAMILIES, T5, Model, ParameterMapping, families_with, linear_mappings, method_for, tied_head
from qlora_jax.models.trainable import EMBEDDING, TIED_HEAD
from qlora_jax.nn import Linear
from qlora_jax.peft import AdapterModule, DoRALinear, LoRA, LoRALinear, Method
from qlora_jax.quant import PackedEmbedding, embedding_lookup

__all__ = ["adapter_tensors", "check_family", "check_fit", "load_adapter", "save_adapter"]

AnyModel = TypeVar("AnyModel", bound=Model)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor of the files lies in a model.

    Attributes:
        path: attribute names from the model to the variable.
        index: the part of its value that is the tensor.
        transposed: whether the files hold its transpose.
        base: path of the frozen parameter to which the variable is a change; None: it stands for itself.
        base_index: the part of that parameter's value.
        offset: what the files hold more than the value where there is no such parameter.
    """

    path: tuple[str, ...]
    index: tuple[int | slice, ...]
    transposed: bool = False
    base: tuple[str, ...] | None = None
    base_index: Any = ()
    offset: float = 0.0

    def read(self, value: np.ndarray) -> np.ndarray:
        """The part of the variable's value, oriented as in the files."""
        part = value[self.index]
        return part.T if self.transposed else part

    def of_base(self, model: Model) -> np.ndarray | np.float32:
        """float32 values that the change is added to."""
        if self.base is None:
            return np.float32(self.offset)
        value = _at(model, self.base).get_value()
        packed = isinstance(value, PackedEmbedding)  # whose rows alone train
        found = embedding_lookup(value, jnp.asarray(self.base_index)) if packed else value[self.base_index]
        found = np.asarray(jax.device_get(found), np.float32)
        return found.T if self.transposed else found


def adapter_tensors(model: Model) -> dict[str, np.ndarray]:
    """The float32 tensors of a model's adapter by PEFT's names, unstacked, without padding and in PEFT's orientation.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.prompt is not None:
        return prompt_tensors(model.prompt)
    values: dict[tuple[str, ...], np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, place in _places(model).items():
        if place.path not in values:
            values[place.path] = np.asarray(jax.device_get(_at(model, place.path).get_value()), np.float32)
        tensors[name] = np.ascontiguousarray(place.read(values[place.path]) + place.of_base(model))
    if not tensors:
        raise ValueError("expected a model with LoRA parameters, found none: was it made with method=None?")
    return tensors


def save_adapter(
    model: Model,
    folder: str | Path,
    *,
    method: Method,
    base_model_name_or_path: str | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes the adapter that lies in the slots of a model; see `write_adapter`.

    Raises:
        ValueError: one whose start was taken off the base: `from_weights.converted` makes files of it.
    """
    if isinstance(method, LoRA) and method.changes_base:
        raise ValueError(
            f"init_lora_weights {method.init_lora_weights}: expected an adapter for the original weights, found one for a "
            "changed base; write what from_weights.converted makes of it"
        )
    task_type: TaskType = "SEQ_2_SEQ_LM" if isinstance(model, T5) else "CAUSAL_LM"
    return write_adapter(
        adapter_tensors(model),
        folder,
        method=method_for(method, model.config) or method,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        tables=tables,
        encoder=None if model.prompt is None else encoder_tensors(model.prompt),
    )


def load_adapter(model: AnyModel, folder: str | Path | Adapter) -> AnyModel:
    """The model with the adapter of a folder (or one that was read) in its slots; the frozen weights are
    shared.

    Args:
        model: made with `method=read_adapter_config(folder)`.

    Raises:
        CheckpointError: it was made for another family; the slots and the tensors do not pair off one to one; or shapes or
            scalings differ.
    """
    adapter = folder if isinstance(folder, Adapter) else read_adapter(folder)
    check_fit(adapter, model)
    if model.prompt is not None:
        return fill_prompt(model, adapter.tensors, adapter.encoder)
    _check_scaling(model, adapter)
    graph, state, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.tree.map(lambda leaf: leaf, state)  # new variables: those of a split are the model's own
    variables: Any = dict(nnx.to_flat_state(state))
    filled: dict[tuple[str, ...], np.ndarray] = {}
    for name, place in _places(model).items():
        value = variables[place.path].get_value()
        if place.path not in filled:
            filled[place.path] = np.zeros(value.shape, value.dtype)
        tensor = adapter.tensors[name].astype(np.float32)
        change = tensor - place.of_base(model)
        filled[place.path][place.index] = change.T if place.transposed else change
    for path, new in filled.items():
        value = variables[path].get_value()
        variables[path].set_value(jax.device_put(new, value.sharding) if isinstance(value, jax.Array) else jnp.asarray(new))
    return nnx.merge(graph, state, frozen)


def check_family(adapter: Adapter, family: str) -> None:
    """Makes sure that an adapter was made for a family, as far as its base and the names of its modules tell.

    Args:
        family: the model_type of the model that it is for.

    Raises:
        CheckpointError: it was made for another, which the message names.
    """
    base = _family_of_base(adapter)
    named = families_with(adapter.modules)
    if base is not None and base != family:
        found = f"one of a {base} model, {adapter.base}"
    elif named and family in FAMILIES and family not in named:
        found = f"one whose modules are named as in {', '.join(named)} (e.g. {adapter.modules[0]}), base {adapter.base!r}"
    else:
        return
    raise CheckpointError(f"{adapter.source}: expected an adapter of a {family} model, found {found}.")


def check_fit(adapter: Adapter, model: Model) -> None:
    """Compares an adapter's tensors with the names and shapes that a model's slots call for.

    Args:
        model: may be abstract.

    Raises:
        CheckpointError: one message with everything that is missing, extra or misshapen, or another family.
    """
    check_family(adapter, model.config.family)
    base = f"its configuration names the base {adapter.base!r}" if adapter.base else "its configuration names no base"
    shape_error = f"{adapter.source}: this adapter does not fit this model, a {model.config.family} ({base})"
    if model.prompt is not None:
        if problems := prompt_problems(model.prompt, adapter.tensors, adapter.encoder):
            raise CheckpointError.of(shape_error, problems)
        return
    places, found = _places(model), adapter.tensors
    if not places:
        raise CheckpointError(
            f"{adapter.source}: the model has no LoRA slots; make it with method=read_adapter_config({adapter.source!r})."
        )
    expected = {
        name: place.read(np.broadcast_to(np.float32(0), _at(model, place.path).shape)).shape
        for name, place in places.items()
    }
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _is_copied_row(name, found, model)]
    misshapen = [
        f"{name}: expected {list(expected[name])}, found {list(found[name].shape)}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name])
    ]
    kinds = {
        "tensors that the adapter lacks": missing,
        "tensors that the model has no slot for": extra,
        "tensors of another shape than the model's": misshapen,
    }
    problems = [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError.of(shape_error, problems)


def _is_copied_row(name: str, tensors: Mapping[str, np.ndarray], model: Model) -> bool:
    """Whether these are the rows of a head that is the token table, which PEFT writes a second time."""
    head = tied_head(model.config.parameter_mappings)
    if head is None or name not in (rows_name(head.removesuffix(".weight")), rows_name("lm_head")):
        return False
    table = next(key for key in model.config.parameter_mappings if key.path == EMBEDDING)
    rows = tensors.get(rows_name(table.modules()[0]))
    return rows is not None and np.array_equal(rows, tensors[name])


def _places(model: Model) -> dict[str, _Place]:
    """Where each tensor of the files lies in a model with slots, by its name."""
    places = {name: place for key, adapter in _adapters(model) for name, place in _places_of_adapter(key, adapter)}
    for key in model.trainable.full:
        base = EMBEDDING if key.path == TIED_HEAD else key.path
        path = TIED_HEAD if key.path == TIED_HEAD else (*base[:-1], f"{base[-1]}_delta")
        for layer, name in enumerate(key.names()):
            index = (layer,) if key.stacked else ()
            places[PREFIX + name] = _Place(path, index, base=base, base_index=index)
    for key, tokens in model.trainable.rows:
        path = (*key.path[:-1], f"{key.path[-1]}_delta")
        places[rows_name(key.modules()[0])] = _Place(path, (), base=key.path, base_index=np.asarray(tokens))
    return places


def _places_of_adapter(key: ParameterMapping, adapter: AdapterModule) -> Iterator[tuple[str, _Place]]:
    path, modules = (*key.path[:-1], "adapter"), key.modules()
    for part in adapter.file_parts():
        index = (part.layer, *part.index) if key.stacked else part.index
        place = _Place((*path, part.attribute), index, part.transposed, offset=part.offset)
        if part.changes:
            place = dataclasses.replace(place, base=key.path, base_index=index)
        if part.changes_own is not None:
            place = dataclasses.replace(place, base=(*path, part.changes_own), base_index=index)
        yield tensor_name(modules[part.layer], part.suffix), place


def _adapters(model: Model) -> Iterator[tuple[ParameterMapping, AdapterModule]]:
    """(row of the linear layer in the table of keys, its adapter) for each that has one."""
    for key in linear_mappings(model.config.parameter_mappings):
        layer = _at(model, key.path[:-1])
        if isinstance(layer, Linear) and isinstance(layer.adapter, AdapterModule):
            yield key, layer.adapter


def _at(model: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        model = getattr(model, name)
    return model


def _family_of_base(adapter: Adapter) -> str | None:
    """The model_type of the base that an adapter names, where that is a folder that can be read."""
    if not adapter.base:
        return None
    try:
        kind = json.loads((Path(adapter.base).expanduser() / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in FAMILIES else None


def _check_scaling(model: Model, adapter: Adapter) -> None:
    """The factor on an adapter lies in the graph of a model: one made for another adapter would compute
    something else."""
    method = adapter.method
    for key, found in _adapters(model):
        if not isinstance(method, LoRA) or not isinstance(found, LoRALinear | DoRALinear):
            continue
        spec = found.spec
        for module, rank, scaling in zip(key.modules(), spec.ranks, spec.scalings, strict=True):
            expected = method.scaling_of(module)
            if rank and not math.isclose(scaling, expected):
                raise CheckpointError(
                    f"{adapter.source}: expected a model whose LoRA scaling is {expected:g} at {module} (alpha "
                    f"{method.alpha:g}, r {method.rank}, rsLoRA {'on' if method.use_rslora else 'off'}), found {scaling:g}; "
                    f"make it with method=read_adapter_config({adapter.source!r})."
                )
