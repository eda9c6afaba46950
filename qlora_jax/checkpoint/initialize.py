"""Adapters that are initialised from the original weights (PiSSA, OLoRA, LoftQ), while these are loaded.

The loader gives each linear matrix to a `Rewrite` before it stores it. The result says what to store in its place, what the
adapter's A and B are, and what was subtracted. The loader collects these results, one matrix at a time, and
makes from them the initial adapter and a value `Subtracted`, with which the adapter is saved later.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.models import Model, linear_mappings
from qlora_jax.nn import Linear, put
from qlora_jax.peft import LoRA, LowRankAdapter, Method, Subtracted, module_matches
from qlora_jax.peft.initialization import pissa_iterations, qr_update
from qlora_jax.peft.loftq import loftq
from qlora_jax.peft.pissa import best_update, subtract_update
from qlora_jax.quant import Quantization, dequantize, quantize

__all__ = ["Rewrite", "Rewritten", "rewrite_for", "subtracted_from", "with_initial_adapter"]

Pair = tuple[Any, Any]  # A [in, r] and B [r, out], float32
AnyModel = TypeVar("AnyModel", bound=Model)


class Rewritten(NamedTuple):
    """What becomes of the matrix of one linear module.

    Attributes:
        stored: float32 `[in, out]`, to be stored in place of the matrix; None: the matrix itself is stored.
        initial: A and B that training starts from; None: those that the adapter has.
        subtracted: A0 and B0 that were subtracted from the matrix; None: nothing was.
    """

    stored: Array | None = None
    initial: Pair | None = None
    subtracted: Pair | None = None

    def to_host(self) -> "Rewritten":
        """Return the same without `stored`, as NumPy arrays."""
        initial, subtracted = (
            None if pair is None else (np.asarray(pair[0]), np.asarray(pair[1])) for pair in (self.initial, self.subtracted)
        )
        return Rewritten(None, initial, subtracted)


# Takes the full name of a linear module and its original float32 matrix [in, out].
Rewrite = Callable[[str, Array], Rewritten]


def rewrite_for(method: Method | None, subtracted: Subtracted | None, quantization: Quantization | None) -> Rewrite | None:
    """Return how a method changes the original weights before they are stored; None: it stores them as they are.

    Args:
        subtracted: what a saved adapter subtracted; None: the method decides anew.
        quantization: how the linear layers are stored.

    Raises:
        OptionError: LoftQ for layers that are not stored in 4 bits.
    """
    if subtracted is not None:
        return lambda module, w: Rewritten(subtracted.from_weight(module, w))
    if not isinstance(method, LoRA) or not method.reads_original_weights:
        return None
    if method.init_lora_weights == "loftq" and quantization is None:
        raise OptionError("init_lora_weights loftq: expected linear layers in 4 bits, found dense ones (data_type none)")
    return partial(_initialize, method, quantization)


def subtracted_from(method: Method | None, records: Mapping[str, Rewritten]) -> Subtracted | None:
    """Return what the loader subtracted, from its records by module; None: nothing."""
    matrices = {module: record.subtracted for module, record in records.items() if record.subtracted is not None}
    if method is None or not matrices:
        return None
    return Subtracted(cast(LoRA, method), str(method.init_lora_weights), matrices)  # only LoRA subtracts anything


def with_initial_adapter(model: AnyModel, records: Mapping[str, Rewritten]) -> AnyModel:
    """Return the model with the initial A and B of the loader's records in its adapters; other arrays are shared."""
    graph, state, frozen = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.tree.map(lambda leaf: leaf, state)  # new variables, so that the model that was given stays as it is
    variables: Any = dict(nnx.to_flat_state(state))
    for mapping in linear_mappings(model.config.parameter_mappings):
        adapter = _adapter_at(model, mapping.path[:-1])
        initial = {layer: records[module].initial for layer, module in enumerate(mapping.modules()) if module in records}
        if adapter is None or not any(pair is not None for pair in initial.values()):
            continue
        path = (*mapping.path[:-1], "adapter")
        a, b = (variables[(*path, name)] for name in ("lora_a", "lora_b"))
        values = [np.zeros(variable.get_value().shape, np.float32) for variable in (a, b)]
        for layer, pair in initial.items():
            if pair is not None:
                rank = pair[0].shape[1]
                values[0][layer, :, :rank], values[1][layer, :rank] = pair
        for variable, value in zip((a, b), values, strict=True):
            variable.set_value(put(value, variable.get_value().sharding))
    return nnx.merge(graph, state, frozen)


def _adapter_at(model: Any, path: tuple[str, ...]) -> LowRankAdapter | None:
    for name in path:
        model = getattr(model, name)
    return model.adapter if isinstance(model, Linear) and isinstance(model.adapter, LowRankAdapter) else None


def _initialize(method: LoRA, quantization: Quantization | None, module: str, w: Array) -> Rewritten:
    """A `Rewrite`: compute A and B of one module from its weight, and subtract what PiSSA or LoftQ subtracts."""
    if not module_matches(method, module):
        return Rewritten()
    scaling, rank, name = method.scaling_of(module), method.rank_of(module), str(method.init_lora_weights)
    try:
        if quantization is not None and name == "loftq":
            rounded = partial(_rounded, quantization=quantization)
            subtracted, initial = loftq(w, scaling, rank=rank, iterations=method.loftq_iter, rounded=rounded)
        elif name == "olora":
            subtracted = initial = qr_update(w, rank=rank)
        else:
            subtracted = initial = best_update(w, scaling, rank=rank, iterations=pissa_iterations(name))
    except ValueError as error:
        raise OptionError(f"init_lora_weights {name}: {module}: {error}") from error
    stored = None if subtracted is None else subtract_update(w, *subtracted, scaling)
    return Rewritten(stored, initial, subtracted)


@partial(jax.jit, static_argnames="quantization")
def _rounded(w: Array, quantization: Quantization) -> Array:
    packed: Any = quantize(w, quantization.data_type, quantization.block_size, quantization.double_quantization)
    return dequantize(packed, jnp.float32)
