"""An adapter's values on their way between a model of its own and a slot of a bank (`peft.bank`)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.bind import adapter_tensors, load_adapter
from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.names import split_name
from qlora_jax.adapters.places import places_of
from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.models import Model, ModelSpec, linear_modules
from qlora_jax.nn import AdapterConstant

__all__ = ["initial_adapter", "model_of_slot"]


@cache
def _draw(spec: ModelSpec) -> Callable[[jax.Array], Any]:
    """Return the program that makes the adapter of a model from a key; the random weights are dead code in it."""
    attention = spec.abstract().attention
    return jax.jit(lambda key: nnx.state(spec.build(nnx.Rngs(key), attention), nnx.LoRAParam))


def initial_adapter(pretrained: Pretrained, seed: int) -> Adapter:
    """Return the adapter that a run of its own starts from: the one that it continues, or new random values of a seed."""
    if pretrained.adapter is not None:
        return pretrained.adapter
    assert pretrained.method is not None
    graph, _, rest = nnx.split(pretrained.abstract, nnx.LoRAParam, ...)
    model = nnx.merge(graph, _draw(pretrained.spec)(jax.random.key(seed)), rest)
    return Adapter("a new adapter", pretrained.method, None, adapter_tensors(model))


def model_of_slot(pretrained: Pretrained, frozen: Any, values: Any) -> Model:
    """Return the model of one adapter, as a run of its own would have trained it.

    Args:
        pretrained: that of the adapter's run.
        frozen: the frozen values of the bank's model.
        values: A and B of the slot, `peft.bank`'s stacks without the axis of the slots.
    """
    method, spec = pretrained.method, pretrained.spec
    assert method is not None
    graph, adapter, _, rest = nnx.split(pretrained.abstract, nnx.LoRAParam, AdapterConstant, ...)
    constants = jax.jit(lambda: nnx.state(spec.build(nnx.Rngs(0), pretrained.abstract.attention), AdapterConstant))()
    shared = dict(nnx.to_flat_state(frozen))
    own = nnx.from_flat_state([(path, shared[path]) for path, _ in nnx.to_flat_state(rest)])
    model = nnx.merge(graph, adapter, constants, own)
    found = {path: np.asarray(jax.tree.leaves(leaf)[0]) for path, leaf in nnx.to_flat_state(values)}
    mappings = linear_modules(model.config.parameter_mappings)
    stacks = {module: (key, layer) for key, names in mappings.items() for layer, module in enumerate(names)}
    tensors: dict[str, np.ndarray] = {}
    for name, place in places_of(model).items():
        module, suffix = split_name(name, method)
        key, layer = stacks[module]
        is_a = suffix == "lora_A.weight"
        matrix = found[(*key.split("."), "adapter", "lora_a" if is_a else "lora_b")][layer]
        rank = place.index[-1] if is_a else place.index[-2]
        own_part = matrix[rank]
        tensors[name] = np.ascontiguousarray(own_part if is_a else own_part.T)
    return load_adapter(model, Adapter("the slot", method, None, tensors))
