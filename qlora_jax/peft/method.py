"""The protocols of a method of parameter-efficient fine-tuning and of the adapters that it makes.

A method is a frozen dataclass in a file of its own. It says which adapter each linear layer gets (`targets`), and it reads
and writes PEFT's adapter_config.json (`from_peft`, `to_peft`). The trainable parameters are `nnx.LoRAParam` in the modules
that the method makes. These modules also say how their parameters are named in PEFT's files (`file_parts`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.nn import MakesAdapter

# (end of the name of an embedding or output head, or None for the input embedding; the token ids whose rows train)
TokenRows = tuple[tuple[str | None, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class FilePart:
    """The correspondence of one tensor of an adapter file to a part of a stacked variable of the adapter.

    Attributes:
        layer: index of the layer in the stack.
        suffix: the part of the tensor's name after the module's name, e.g. "lora_A.weight".
        attribute: name of the adapter's variable, e.g. "lora_a".
        index: slices that select the part of the layer's value without padding.
        transposed: whether the file holds the transpose.
        changes: whether the value is a change of the layer's weight; the file then holds the changed weight.
        offset: number that is added to the value in the file.
        changes_own: name of the adapter's variable that the value is a change of; the file then holds the changed variable.
    """

    layer: int
    suffix: str
    attribute: str
    index: tuple[slice, ...] = ()
    transposed: bool = False
    changes: bool = False
    offset: float = 0.0
    changes_own: str | None = None


@runtime_checkable
class AdapterModule(Protocol):
    """An adapter of a linear layer, or of a stack of linear layers, that can be saved in PEFT's format."""

    def file_parts(self) -> Iterator[FilePart]:
        """Yield one part for each tensor in the adapter file."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that a method may need.

    Attributes:
        family: the model_type of the model's config.json.
        hidden_size: features of the residual stream.
        layers: number of layers of the encoder, or of the decoder in a decoder-only model.
        decoder_layers: number of layers of the decoder.
        kv_heads: number of key and value heads.
        head_dim: features of one head.
        encoder_decoder: whether the model has an encoder.
    """

    family: str
    hidden_size: int
    layers: int
    decoder_layers: int
    kv_heads: int
    head_dim: int
    encoder_decoder: bool


@runtime_checkable
class OfModel(Protocol):
    """A method some of whose fields may be None until the model is known."""

    def for_model(self, shape: ModelShape) -> "Method":
        """Return the method with every open field filled in for this model.

        Raises:
            OptionError: the method does not fit the model.
        """
        ...


@runtime_checkable
class ScalesBias(Protocol):
    """A method that changes the bias of a linear layer as well."""

    def merged_bias(self, bias: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the module's bias with the adapter merged into it, float32 `[out]`; see `Method.merged`."""
        ...


class Method(Protocol):
    """A method of parameter-efficient fine-tuning.

    Attributes:
        peft_type: PEFT's name of the method.
        modules_to_save: ends of the names of embeddings, output heads and norms that train in full.
        suffixes: the parts of tensor names in adapter files that follow a module's name.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def peft_type(self) -> str: ...
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def token_rows(self) -> TokenRows:
        """Return the embeddings and output heads of which some rows train, and these rows; see `TokenRows`."""
        ...

    def targets(self, layers: Mapping[str, Sequence[str]]) -> Mapping[str, MakesAdapter]:
        """Return, for each stacked layer that gets an adapter, the object that makes the adapter.

        Args:
            layers: for each stacked linear layer, the full names of the modules that it stacks.

        Raises:
            OptionError: the method names a module that the model does not have.
        """
        ...

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """Return why no model can have a tensor of this shape in its adapter file, or None if the shape is possible."""
        ...

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the module's dense weight with the adapter merged into it.

        Args:
            weight: `[out, in]`, of any float dtype.
            module: full name of the module.
            tensors: the tensors of the module's adapter, by their suffixes.

        Returns:
            float32 `[out, in]`.
        """
        ...

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """Return the method's fields of adapter_config.json; `modules` are the full names of the modules with an adapter."""
        ...

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Return the method that the fields of an adapter_config.json describe.

        Raises:
            FieldErrors: some fields are not supported, or some values are invalid.
        """
        ...


class FieldErrors(CheckpointError):
    """Some fields of an adapter_config.json are invalid.

    Attributes:
        problems: one message for each invalid field.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
