"""Full fine-tuning, as a baseline: every parameter of a decoder trains. Linear layers may also train so beside adapters.

    y = x (W + D) (+ bias + d)        D, d float32, initialized with zeros; embeddings, output heads and norms: `nn.delta`

The trainable parameters are the changes of the base's parameters, as for LoRA's modules_to_save. So an adapter of zeros is
the base model, and a change too small for bfloat16 is not lost in a bfloat16 weight. Each parameter takes 4 bytes for its
change, plus the optimizer's state, in addition to the 2 or 4 bytes of the base. A tied output head remains tied to the
embedding. The base has to be dense, because weights that train must not be rounded to 4 bits.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.nn import AdapterConstant, Delta, LayerContext, Linear, add_delta
from qlora_jax.peft.method import FieldErrors, FilePart, Method
from qlora_jax.peft.option import Option
from qlora_jax.quant import QuantizedTensor, StackedTensor, matmul


@dataclasses.dataclass(frozen=True)
class FullFineTuning(Method):
    """Training of all parameters. PEFT has no adapter files for it, so a model is saved instead of an adapter.

    Attributes:
        save_dtype: dtype of the weights of the model that a run saves; "auto": that of the base.
    """

    name: ClassVar = "full"
    title: ClassVar = "All parameters"
    summary: ClassVar = "all parameters of a decoder with dense weights (data-type none), saved as a model"
    peft_type: ClassVar = "FULL"
    suffixes: ClassVar = ("weight",)
    learning_rate_factor: ClassVar = 0.1  # Schulman et al. 2025, "LoRA Without Regret"
    is_full: ClassVar = True
    options: ClassVar = (
        Option(
            "save_dtype",
            Literal["auto", "float32", "bfloat16", "float16"],
            "auto",
            "Dtype of the model that full fine-tuning saves; auto: that of the base.",
        ),
    )

    save_dtype: str = "auto"

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, FullLinearSpec]":
        """See `Method`."""
        return {path: FullLinearSpec(len(modules)) for path, modules in layers.items()}

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        return None if len(shape) == 2 else "expected a matrix"

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Method`."""
        return tensors["weight"]

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """Raise UnsupportedError: PEFT has no adapter files for full fine-tuning."""
        raise UnsupportedError("full fine-tuning: expected a model to be saved, found an adapter: PEFT has no files for it")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "FullFineTuning":
        """Raise FieldErrors: PEFT has no adapter files for full fine-tuning."""
        raise FieldErrors(["peft_type: expected a method of PEFT, found full fine-tuning, which has no adapter files"])


@dataclasses.dataclass(frozen=True)
class FullLinearSpec:
    """The trainable change of a linear layer's matrix, or of the matrices of a stack.

    Attributes:
        layers: number of layers in the stack.
        used: for each layer, whether its matrix trains; None: all of them do.
        packed: whether the matrices may be stored in 4 bits, which then remain as they are beside the change.
    """

    layers: int = 1
    used: tuple[bool, ...] | None = None
    packed: bool = False

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "FullLinear":
        """Return a change of zeros for one layer."""
        return FullLinear(in_features, out_features, spec=self, layer=layer)


class FullLinear(nnx.Module):
    """The trainable change of one linear layer's matrix.

    Attributes:
        delta: float32 `Delta` `[in, out]`.
        used: float32 `AdapterConstant`, 1 if the layer's matrix trains, else 0; None if those of all layers do.
        spec: the description of the stack.
    """

    def __init__(self, in_features: int, out_features: int, *, spec: FullLinearSpec, layer: int | Array) -> None:
        self.spec = spec
        self.delta = Delta(jnp.zeros((in_features, out_features), jnp.float32))
        used = None if spec.used is None else jnp.asarray(np.asarray(spec.used, np.float32))[layer]
        self.used = None if used is None else AdapterConstant(used)

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        weight = linear.weight.get_value()
        delta = self.delta[...] if self.used is None else self.delta[...] * self.used[...]
        if isinstance(weight, Array):
            return linear.with_bias(matmul(x, add_delta(weight, delta)))
        if self.spec.packed:
            return linear.base(x) + matmul(x, delta.astype(x.dtype))
        # A 4-bit matrix, or a layer of a stack of 4-bit matrices.
        found = "4-bit ones" if isinstance(weight, QuantizedTensor | StackedTensor) else type(weight).__name__
        raise OptionError(f"full fine-tuning: expected dense linear layers (data_type none), found {found}")

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`."""
        for layer in range(self.spec.layers):
            if self.spec.used is None or self.spec.used[layer]:
                yield FilePart(layer, "weight", "delta", transposed=True, changes=True)
