"""Full fine-tuning, to compare with: every parameter of a decoder trains.

    y = x (W + D) (+ bias + d)        D, d float32, zero at first; so for token tables, heads and norms (`nn.delta`)

What trains is the change of each parameter, as for what LoRA's modules_to_save name: an adapter of zeros is the base model,
and a change too small for bfloat16 is not lost on a bfloat16 weight. A parameter takes 4 bytes for its change, and what the
optimizer keeps of it, beside the base's 2 or 4. A tied head stays the token table. The base has to be dense: there is no
sense in rounding to 4 bits what trains.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.nn import Delta, Linear, changed
from qlora_jax.peft.method import FieldErrors, FilePart, Method
from qlora_jax.quant import QuantizedTensor, matmul


@dataclasses.dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains all parameters. PEFT has no files for it: what is saved is a model, not an adapter."""

    name: ClassVar = "full"
    title: ClassVar = "All parameters"
    summary: ClassVar = "all parameters of a decoder with dense weights (data-type none), saved as a model"
    peft_type: ClassVar = "FULL"
    learning_rate_factor: ClassVar = 0.1  # Schulman et al. 2025, "LoRA Without Regret"
    is_full: ClassVar = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("weight",)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, WholeWeight]":
        """See `Method`."""
        return {key: WholeWeight(len(modules)) for key, modules in layers.items()}

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        return None if len(shape) == 2 else "expected a matrix"

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        return tensors["weight"]

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """Raise UnsupportedError: there are no such files."""
        raise UnsupportedError("full fine-tuning: expected a model to be saved, found an adapter: PEFT has no files for it")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "FullFineTuning":
        """Raise FieldErrors: there are no such files."""
        raise FieldErrors(["peft_type: there are no adapters of full fine-tuning"])


@dataclasses.dataclass(frozen=True)
class WholeWeight:
    """Makes the change of a matrix, or of each of a stack of `layers`."""

    layers: int = 1

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "WholeLinear":
        """The change of one matrix."""
        return WholeLinear(in_features, out_features, self.layers)


class WholeLinear(nnx.Module):
    """The change of a linear layer's matrix.

    Attributes:
        delta: float32 `[in, out]`.
        layers: of the stack.
    """

    def __init__(self, in_features: int, out_features: int, layers: int) -> None:
        self.delta = Delta(jnp.zeros((in_features, out_features), jnp.float32))
        self.layers = layers

    def __call__(self, x: Array, linear: Linear, key: Array | None) -> Array:
        weight = linear.weight.get_value()
        if not isinstance(weight, Array):  # what is packed, or lies in a packed stack
            found = "4-bit ones" if isinstance(weight, QuantizedTensor) else type(weight).__name__
            raise OptionError(f"full fine-tuning: expected dense linear layers (data_type none), found {found}")
        return linear.with_bias(matmul(x, changed(weight, self.delta[...])))

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        for layer in range(self.layers):
            yield FilePart(layer, "weight", "delta", transposed=True, changes=True)
