"""Where each tensor of an adapter's files is in a model.

In memory all layers of a module are stacked and transposed: lora_a `[layers, in, r]`, lora_b `[layers, r, out]`, padded with
zeros where a layer has a smaller rank or none. Of parameters that are trained as a whole or by rows (models.trainable) the
model holds the change, and the files hold the sum of the change and the frozen values. The family's parameter mappings say
which tensors of the files a stacked variable stands for.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.names import PREFIX, rows_name, tensor_name
from qlora_jax.models import CausalLM, Model, ParameterMapping, linear_mappings
from qlora_jax.models.trainable import EMBEDDING, HEAD, TIED_HEAD, names_module
from qlora_jax.nn import Linear, to_numpy
from qlora_jax.peft import AdapterModule, module_matches
from qlora_jax.quant import MixedStack, PackedEmbedding, QuantizedTensor, dequantize, embedding_lookup

__all__ = ["Adapted", "Place", "adapted_layers", "places_of", "variable_at"]


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
        linear: whether `base` is the matrix, or the stack of matrices, of a linear layer, which may be stored in 4 bits.
    """

    path: tuple[str, ...]
    index: tuple[int | slice, ...]
    transposed: bool = False
    base: tuple[str, ...] | None = None
    base_index: Any = ()
    offset: float = 0.0
    linear: bool = False

    def read(self, value: np.ndarray) -> np.ndarray:
        """Return the tensor's part of the variable's value, in the orientation of the files."""
        part = value[self.index]
        return part.T if self.transposed else part

    def of_base(self, model: Model) -> np.ndarray | np.float32:
        """Return the float32 values that are added to the part in the files, in the orientation of the files."""
        if self.base is None:
            return np.float32(self.offset)
        value = variable_at(model, self.base).get_value()
        if self.linear:
            found = to_numpy(dense_matrix(value, *self.base_index[:1])).astype(np.float32, copy=False)
            return found.T if self.transposed else found
        packed = isinstance(value, PackedEmbedding)  # of a packed embedding only rows can be trained
        found = embedding_lookup(value, jnp.asarray(self.base_index)) if packed else value[self.base_index]
        found = to_numpy(found).astype(np.float32, copy=False)
        return found.T if self.transposed else found


def places_of(model: Model) -> dict[str, Place]:
    """Return the place of each tensor of the files in a model, which may be abstract, by the tensor's name."""
    places = {name: place for adapted in adapted_layers(model) for name, place in _in_module(adapted)}
    for mapping in model.trainable.full:
        base = EMBEDDING if mapping.path == TIED_HEAD else mapping.path
        path = TIED_HEAD if mapping.path == TIED_HEAD else (*base[:-1], f"{base[-1]}_delta")
        for layer, name in enumerate(mapping.names()):
            if not _is_saved(model, mapping, name):
                continue
            index = (layer,) if mapping.stacked else ()
            places[PREFIX + name] = Place(path, index, base=base, base_index=index)
    for mapping, tokens in model.trainable.rows:
        path = (*mapping.path[:-1], f"{mapping.path[-1]}_delta")
        place = Place(path, (), base=mapping.path, base_index=np.asarray(tokens))
        places[rows_name(mapping.modules()[0])] = place
    return places


class Adapted(NamedTuple):
    """A linear layer, a stack of them, the token embedding or the head, with its adapter.

    Attributes:
        path: attribute names from the model to the adapter.
        modules: the full names of the modules, by layer.
        stacked: whether the adapter is that of a stack.
        adapter: the adapter.
    """

    path: tuple[str, ...]
    modules: list[str]
    stacked: bool
    adapter: AdapterModule


def adapted_layers(model: Model) -> Iterator[Adapted]:
    """Yield every layer of a model that has an adapter."""
    mappings = model.config.parameter_mappings
    for mapping in linear_mappings(mappings):
        layer = variable_at(model, mapping.path[:-1])
        if isinstance(layer, Linear) and isinstance(layer.adapter, AdapterModule):
            yield Adapted((*mapping.path[:-1], "adapter"), mapping.modules(), mapping.stacked, layer.adapter)
    if not isinstance(model, CausalLM):
        return
    for mapping in (mapping for mapping in mappings if mapping.path in (EMBEDDING, HEAD)):
        adapter = variable_at(model, (mapping.path[0], "adapter"))
        if isinstance(adapter, AdapterModule):
            modules = ["lm_head"] if mapping.path == HEAD else mapping.modules()
            yield Adapted((mapping.path[0], "adapter"), modules, False, adapter)
    if isinstance(model.head_adapter, AdapterModule):
        yield Adapted(("head_adapter",), ["lm_head"], False, model.head_adapter)


def _is_saved(model: Model, mapping: ParameterMapping, name: str) -> bool:
    """Return whether files hold this tensor of a parameter that trains in full: of a bias, only that of the layers named."""
    method, module = model.method, name.removesuffix(".bias")
    if method is None or method.is_full or method.bias == "all" or mapping.path[-1] != "bias" or not mapping.stacked:
        return True
    if any(names_module(entry, module) for entry in method.modules_to_save):
        return True
    return method.bias == "lora_only" and module_matches(method, module)  # pyright: ignore[reportArgumentType]


def variable_at(model: Any, path: tuple[str, ...]) -> Any:
    """Return the variable or module at a path of attribute names."""
    for name in path:
        model = getattr(model, name)
    return model


def dense_matrix(value: Any, layer: int | None = None) -> Any:
    """Return a linear layer's matrix `[in, out]` dense; of a stack, that of one layer."""
    if isinstance(value, MixedStack):
        value = value.matrix(layer or 0)
    elif layer is not None:
        value = jax.tree.map(lambda leaf: leaf[layer], value)
    return dequantize(value, jnp.float32) if isinstance(value, QuantizedTensor) else value


def _in_module(adapted: Adapted) -> Iterator[tuple[str, Place]]:
    path, modules = adapted.path, adapted.modules
    for part in adapted.adapter.file_parts():
        index = (part.layer, *part.index) if adapted.stacked else part.index
        place = Place((*path, part.attribute), index, part.transposed, offset=part.offset)
        if part.changes:
            place = dataclasses.replace(place, base=(*path[:-1], "weight"), base_index=index, linear=True)
        if part.changes_own is not None:
            place = dataclasses.replace(place, base=(*path, part.changes_own), base_index=index)
        yield tensor_name(modules[part.layer], part.suffix), place
