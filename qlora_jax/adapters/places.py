"""Where each tensor of an adapter's files is in a model.

In memory all layers of a module are stacked and transposed: lora_a `[layers, in, r]`, lora_b `[layers, r, out]`, padded with
zeros where a layer has a smaller rank or none. Of parameters that are trained as a whole or by rows (models.trainable) the
model holds the change, and the files hold the sum of the change and the frozen values. The family's parameter mappings say
which tensors of the files a stacked variable stands for.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.names import PREFIX, rows_name, tensor_name
from qlora_jax.models import Model, ParameterMapping, linear_mappings
from qlora_jax.models.trainable import EMBEDDING, TIED_HEAD
from qlora_jax.nn import Linear
from qlora_jax.peft import AdapterModule
from qlora_jax.quant import PackedEmbedding, embedding_lookup

__all__ = ["Place", "adapter_modules", "places_of", "variable_at"]


@dataclasses.dataclass(frozen=True)
class Place:
    """The part of a model's variable that a tensor of the files stands for.

    Attributes:
        path: attribute names from the model to the variable.
        index: index of the tensor in the value of the variable.
        transposed: whether the files hold the transpose of that part.
        base: path of the frozen parameter that the variable is a change of; None: the variable is no change.
        base_index: index of the tensor in the value of that parameter.
        offset: a number that is added to the value in the files where `base` is None.
    """

    path: tuple[str, ...]
    index: tuple[int | slice, ...]
    transposed: bool = False
    base: tuple[str, ...] | None = None
    base_index: Any = ()
    offset: float = 0.0

    def read(self, value: np.ndarray) -> np.ndarray:
        """Return the tensor's part of the variable's value, in the orientation of the files."""
        part = value[self.index]
        return part.T if self.transposed else part

    def of_base(self, model: Model) -> np.ndarray | np.float32:
        """Return the float32 values that are added to the part in the files, in the orientation of the files."""
        if self.base is None:
            return np.float32(self.offset)
        value = variable_at(model, self.base).get_value()
        packed = isinstance(value, PackedEmbedding)  # of a packed embedding only rows can be trained
        found = embedding_lookup(value, jnp.asarray(self.base_index)) if packed else value[self.base_index]
        found = np.asarray(jax.device_get(found), np.float32)
        return found.T if self.transposed else found


def places_of(model: Model) -> dict[str, Place]:
    """Return the place of each tensor of the files in a model, which may be abstract, by the tensor's name."""
    places = {name: place for mapping, adapter in adapter_modules(model) for name, place in _in_module(mapping, adapter)}
    for mapping in model.trainable.full:
        base = EMBEDDING if mapping.path == TIED_HEAD else mapping.path
        path = TIED_HEAD if mapping.path == TIED_HEAD else (*base[:-1], f"{base[-1]}_delta")
        for layer, name in enumerate(mapping.names()):
            index = (layer,) if mapping.stacked else ()
            places[PREFIX + name] = Place(path, index, base=base, base_index=index)
    for mapping, tokens in model.trainable.rows:
        path = (*mapping.path[:-1], f"{mapping.path[-1]}_delta")
        place = Place(path, (), base=mapping.path, base_index=np.asarray(tokens))
        places[rows_name(mapping.modules()[0])] = place
    return places


def adapter_modules(model: Model) -> Iterator[tuple[ParameterMapping, AdapterModule]]:
    """Return (mapping of the linear layer, its adapter) for each linear layer that has an adapter."""
    for mapping in linear_mappings(model.config.parameter_mappings):
        layer = variable_at(model, mapping.path[:-1])
        if isinstance(layer, Linear) and isinstance(layer.adapter, AdapterModule):
            yield mapping, layer.adapter


def variable_at(model: Any, path: tuple[str, ...]) -> Any:
    """Return the variable or module at a path of attribute names."""
    for name in path:
        model = getattr(model, name)
    return model


def _in_module(mapping: ParameterMapping, adapter: AdapterModule) -> Iterator[tuple[str, Place]]:
    path, modules = (*mapping.path[:-1], "adapter"), mapping.modules()
    for part in adapter.file_parts():
        index = (part.layer, *part.index) if mapping.stacked else part.index
        place = Place((*path, part.attribute), index, part.transposed, offset=part.offset)
        if part.changes:
            place = dataclasses.replace(place, base=mapping.path, base_index=index)
        if part.changes_own is not None:
            place = dataclasses.replace(place, base=(*path, part.changes_own), base_index=index)
        yield tensor_name(modules[part.layer], part.suffix), place
