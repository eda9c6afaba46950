"""What a method of parameter-efficient fine-tuning is, for the models that carry it and the files that hold it.

A method is a frozen dataclass, one file here. It says what each linear layer gets (`targets`), and reads and writes PEFT's
adapter_config.json (`from_peft`, `to_peft`). What trains is `nnx.LoRAParam` in the modules that it makes; the names of these
parameters in PEFT's files are theirs to tell (`file_parts`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from qlora_jax.nn import MakesAdapter

TokenRows = tuple[tuple[str | None, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A tensor of the files within a stacked variable of an adapter.

    Attributes:
        layer: number in the stack.
        suffix: what follows the module's name, e.g. "lora_A.weight".
        attribute: of the adapter, e.g. "lora_a".
        index: the part of the layer's value that is no padding.
        transposed: whether the files hold its transpose.
        changes: whether it is a change of the layer's weight, which the files hold with the change in it.
        offset: what the files hold more than the value.
        changes_own: attribute of the adapter to whose value it is a change, which the files hold with the change in it.
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
    """The adapter of a linear layer as files see it; in a model, that of all layers of a stack."""

    def file_parts(self) -> Iterator[FilePart]:
        """The tensors of the files."""
        ...


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a method may have to know of a model.

    Attributes:
        family: the model_type of its config.json.
        layers: of a decoder; of the encoder, where there is one.
        decoder_layers: of the decoder.
        kv_heads: heads of keys and values.
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
    """A method with choices that a model makes, where they are left open."""

    def for_model(self, shape: ModelShape) -> "Method":
        """The same with nothing left open.

        Raises:
            ValueError: it does not go with such a model.
        """
        ...


@runtime_checkable
class ScalesBias(Protocol):
    """A method that changes the bias of a linear layer as well."""

    def merged_bias(self, bias: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """A module's bias with its adapter in it, float32 `[out]`; see `Method.merged`."""
        ...


class Method(Protocol):
    """A method.

    Attributes:
        peft_type: PEFT's name of it.
        modules_to_save: ends of the names of token tables, heads and norms that train as a whole.
        suffixes: what follows a module's name in the names of the files' tensors.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def peft_type(self) -> str: ...
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...

    def token_rows(self) -> TokenRows:
        """(end of a table's name, or None for the token table, tokens) of each table of which some rows train."""
        ...

    def targets(self, layers: Mapping[str, Sequence[str]]) -> Mapping[str, MakesAdapter]:
        """For keys of `layers`, each with the full names of the modules that it stacks, what makes their adapter.

        Raises:
            ValueError: it names what is not there.
        """
        ...

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the shape of a module's tensor in the files, whatever the model; None: nothing."""
        ...

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """A module's dense weight with its adapter in it.

        Args:
            weight: `[out, in]`, of any float dtype.
            tensors: those of the module's adapter, by their suffixes.

        Returns:
            float32 `[out, in]`.
        """
        ...

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """The fields of adapter_config.json that are the method's own; `modules` have an adapter."""
        ...

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The method that the fields describe.

        Raises:
            FieldErrors: fields with no meaning here, or values that do not fit.
        """
        ...


class FieldErrors(ValueError):
    """What is wrong with the fields of a configuration.

    Attributes:
        problems: each of it.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
