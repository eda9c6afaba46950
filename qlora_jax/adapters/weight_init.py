"""Adapters that start from the original weights (PiSSA, LoftQ): how they are made, saved, and found again.

    trained     4 bits of (W - s A0 B0) + s A B        A0 B0 is taken off each matrix while it is loaded
    its files   s (A B - A0 B0)                        an ordinary LoRA of rank 2r for the original W, as PEFT converts them:
                                                       lora_A [A; A0], lora_B [B, -B0], alpha twice as large
    found again from the two halves, and `converted_from` in qlora_jax.json, which says that there are two

PEFT and every other program take the files for what they are, on the original weights; here the base is rounded anew as it
was, to the bit. With LoftQ of one turn nothing is taken off, and the files are an ordinary LoRA of rank r for the quantised
base. An adapter that PEFT saved without converting it (`init_lora_weights` "pissa") names the same base, and is read.

One matrix at a time is dense: a matrix is read, changed, stored, and dropped.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlora_jax.adapters.bind import adapter_tensors, load_adapter
from qlora_jax.adapters.files import Adapter, tensor_name
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.errors import CheckpointError
from qlora_jax.models import Model
from qlora_jax.peft import LoRA, Method, module_matches, reads_weights
from qlora_jax.peft.initialization import pissa_iterations
from qlora_jax.peft.loftq import loftq
from qlora_jax.peft.pissa import best_update, subtract_update
from qlora_jax.quant import Quantization, dequantize, quantize

__all__ = ["FromWeights", "TakenOff", "converted", "converted_from", "parted", "rewriting"]

A, B = "lora_A.weight", "lora_B.weight"
AnyModel = TypeVar("AnyModel", bound=Model)


@dataclasses.dataclass(frozen=True)
class TakenOff:
    """Takes the starts of adapters off the weights that they were taken from.

    Attributes:
        tensors: A0 and B0 by the files' names, float32.
    """

    method: LoRA
    tensors: Mapping[str, np.ndarray]

    def __call__(self, module: str, w: Array) -> Array | None:
        """See `fill.Rewrite`."""
        names = [tensor_name(module, suffix) for suffix in (A, B)]
        if names[0] not in self.tensors:
            return None
        a, b = (jnp.asarray(self.tensors[name].T) for name in names)
        return subtract_update(w, a, b, self.method.scaling_of(module))


class FromWeights:
    """Makes the starts of adapters from weights that are being loaded, and takes them off those.

    Attributes:
        start: A and B that training starts from, by the files' names.
        tensors: those that were taken off.
    """

    def __init__(self, method: LoRA, quantization: Quantization | None) -> None:
        """
        Raises:
            ValueError: LoftQ for layers that are not in 4 bits.
        """
        if method.init_lora_weights == "loftq" and quantization is None:
            raise ValueError("init_lora_weights loftq: expected linear layers in 4 bits, found dense ones (data_type none)")
        self._method, self._quantization = method, quantization
        self.start: dict[str, np.ndarray] = {}
        self.tensors: dict[str, np.ndarray] = {}

    def __call__(self, module: str, w: Array) -> Array | None:
        """See `fill.Rewrite`."""
        method = self._method
        if not module_matches(method, module):
            return None
        scaling, rank, name = method.scaling_of(module), method.rank_of(module), str(method.init_lora_weights)
        try:
            if self._quantization is not None and name == "loftq":
                rounded = partial(_rounded, quantization=self._quantization)
                taken, start = loftq(w, scaling, rank=rank, iterations=method.loftq_iter, rounded=rounded)
            else:
                taken = start = best_update(w, scaling, rank=rank, iterations=pissa_iterations(name))
        except ValueError as error:
            raise ValueError(f"init_lora_weights {name}: {module}: {error}") from error
        self.start |= _named(module, start)
        if taken is None:
            return None
        self.tensors |= _named(module, taken)
        return subtract_update(w, *taken, scaling)

    def fill(self, model: AnyModel) -> AnyModel:
        """The model that was loaded, with the starts in its slots."""
        source = f"init_lora_weights {self._method.init_lora_weights}"
        return load_adapter(model, Adapter(source, self._method, None, adapter_tensors(model) | self.start))


def rewriting(
    method: Method | None, taken: TakenOff | None, quantization: Quantization | None
) -> TakenOff | FromWeights | None:
    """What `load_model` and `merge` have to do to the original weights for a method.

    Args:
        taken: what `parted` found of an adapter.
    """
    if taken is not None:
        return taken
    if isinstance(method, LoRA) and reads_weights(method.init_lora_weights):
        return FromWeights(method, quantization)
    return None


def converted_from(method: Method) -> str | None:
    """The start of which `converted` makes files of two halves; None: it is none of those."""
    return str(method.init_lora_weights) if isinstance(method, LoRA) and method.changes_base else None


def converted(
    tensors: Mapping[str, np.ndarray], method: Method, taken: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Method]:
    """An adapter and what was taken off its base as one ordinary LoRA for the original weights; both as they
    are where nothing was."""
    if not taken or not isinstance(method, LoRA):
        return dict(tensors), method
    result = dict(tensors)
    for name, start in taken.items():
        parts, axis = ((tensors[name], start), 0) if name.endswith(A) else ((tensors[name], -start), 1)
        result[name] = np.concatenate(parts, axis)
    return result, _scaled(method, 2.0)


def parted(adapter: Adapter, record: AdapterMetadata | None) -> tuple[Adapter, TakenOff | None]:
    """(the adapter that was trained, what was taken off its base) of files that `converted` made; others as they are.

    Raises:
        CheckpointError: they are no LoRA of an even rank.
    """
    if record is None or record.converted_from is None:
        return adapter, None
    method, tensors, taken = adapter.method, dict(adapter.tensors), dict[str, np.ndarray]()
    if not isinstance(method, LoRA) or method.use_dora:
        raise CheckpointError(f"{adapter.source}: expected a LoRA, which qlora_jax.json says it is, found {method}")
    for module in adapter.modules:
        for name, axis, sign in ((tensor_name(module, A), 0, 1), (tensor_name(module, B), 1, -1)):
            if tensors[name].shape[axis] % 2:
                raise CheckpointError(f"{adapter.source}: {name}: expected an even rank, found {tensors[name].shape}")
            tensors[name], start = np.split(tensors[name].astype(np.float32), 2, axis)
            taken[name] = sign * start
    method = _scaled(method, 0.5)
    return dataclasses.replace(adapter, method=method, tensors=tensors), TakenOff(method, taken)


def _scaled(method: LoRA, factor: float) -> LoRA:
    """So many times the rank, with the same scaling."""
    of_alpha = math.sqrt(factor) if method.use_rslora else factor
    return dataclasses.replace(
        method,
        rank=int(method.rank * factor),
        alpha=method.alpha * of_alpha,
        rank_pattern=tuple((name, int(rank * factor)) for name, rank in method.rank_pattern),
        alpha_pattern=tuple((name, alpha * of_alpha) for name, alpha in method.alpha_pattern),
        init_lora_weights=True,
        loftq_iter=1,
    )


def _named(module: str, pair: tuple[Array, Array]) -> dict[str, np.ndarray]:
    return {
        tensor_name(module, suffix): np.ascontiguousarray(np.asarray(value).T)
        for suffix, value in zip((A, B), pair, strict=True)
    }


@partial(jax.jit, static_argnames="quantization")
def _rounded(w: Array, quantization: Quantization) -> Array:
    packed: Any = quantize(w, quantization.data_type, quantization.block_size, quantization.double_quantization)
    return dequantize(packed, jnp.float32)
