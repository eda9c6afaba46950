"""The interface of a method of parameter-efficient fine-tuning: to models, to files, and to the command line.

A method is a frozen dataclass in one file of this package and one line of `METHODS` (`__init__.py`). It names itself and its
options on the command line (`name`, `options`), says what each linear layer gets (`targets`), and reads and writes PEFT's
adapter_config.json (`from_peft`, `to_peft`). What trains is `nnx.LoRAParam` in the modules that the method makes; these
modules say how PEFT's files name their parameters (`file_parts`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from flax import nnx

from qlora_jax.errors import CheckpointError
from qlora_jax.nn import MakesAdapter
from qlora_jax.peft.option import Option

if TYPE_CHECKING:
    from qlora_jax.peft.prompt import Prompt

Bias = Literal["none", "lora_only", "all"]
EMBEDDING_KEYS = ("embed_tokens", "lm_head")  # keys of the token embedding and the output head in `Method.targets`
# (end of the name of an embedding or output head, or None for the input embedding; the token ids whose rows train)
TrainableTokens = tuple[tuple[str | None, tuple[int, ...]], ...]


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


class Method(Protocol):
    """A method of fine-tuning: a frozen dataclass that inherits the defaults below and defines what differs.

    Attributes of the class:
        name: the name on the command line, `--method NAME`.
        title: what the method trains, for the model card, such as "An IA3 adapter".
        summary: what the method does, for `--help`, in half a sentence.
        peft_type: PEFT's name of the method; where PEFT does not have the method, a name of our own.
        suffixes: what follows a module's name in the names of the files' tensors; a property where options change it.
        in_peft: whether PEFT has the method, and so can load its adapters.
        options: the method's own options on the command line.
        lora_options: names of the options of LoRA that the method takes as well; `target_modules` includes `target_regex`.
        learning_rate_factor: a factor on LoRA's default learning rate, where the method has no default of its own.
        is_full: whether all parameters of the model train and a model is saved, not an adapter.
        is_prefix: whether the virtual tokens are keys and values of every layer.
        adapts_embeddings: whether the method also has adapters for the token embedding and the output head (`targets`).

    Attributes:
        from_files: whether this is the method of an adapter that exists. Its tensors then say what it adapts, and names of
            its configuration that match nothing are no error.
        modules_to_save: ends of the names of embeddings, output heads and norms that train in full.
        rank: the inner size of a low-rank update (LoRA's r); 0 for a method without one.
        use_dora: whether a low-rank update is DoRA's.
        init_lora_weights: the initialization of a low-rank update, by PEFT's names.
        virtual_tokens: how many virtual tokens stand before those of the text.
        bias: the biases of the base that train: none, those of the adapted linear layers, or all.
        layer_replication: ranges of layers (start, end) of which the model is made, in this order; empty: its own layers.
        ensure_weight_tying: whether a head that is tied to the token embedding remains so when one of them is adapted.
        init_text: a text whose tokens the virtual tokens start from; None: there is none.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    peft_type: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    in_peft: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = ()
    lora_options: ClassVar[tuple[str, ...]] = ()
    learning_rate_factor: ClassVar[float] = 1.0
    is_full: ClassVar[bool] = False
    is_prefix: ClassVar[bool] = False
    adapts_embeddings: ClassVar[bool] = False

    from_files: bool = False
    bias: Bias = "none"
    layer_replication: tuple[tuple[int, int], ...] = ()
    ensure_weight_tying: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank: int = 0
    use_dora: bool = False
    init_lora_weights: bool | str = True
    virtual_tokens: int = 0
    init_text: str | None = None

    # What a method has to define.

    def targets(self, layers: Mapping[str, Sequence[str]]) -> Mapping[str, MakesAdapter]:
        """Return what makes the adapter of each stack of linear layers that gets one.

        Args:
            layers: for the key of each stack, the full names of the modules that it stacks. For a method that adapts
                embeddings also the token embedding and the output head, under `EMBEDDING_KEYS`.

        Raises:
            OptionError: the method names a module that does not exist.
        """
        ...

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a module's dense weight with its adapter in it.

        Args:
            weight: `[out, in]`, of any float dtype.
            tensors: those of the module's adapter, by their suffixes.

        Returns:
            float32 `[out, in]`.
        """
        ...

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """Return the fields of adapter_config.json that are the method's own; `modules` have an adapter."""
        ...

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """Return the method that the fields of adapter_config.json describe.

        Raises:
            FieldErrors: fields with no meaning here, or values that do not fit.
        """
        ...

    # What has a default.

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> Self:
        """Return the method that the command line describes.

        Args:
            values: the values of `options` and `lora_options`, by name.

        Raises:
            OptionError: values that contradict each other.
        """
        constructor: Any = cls
        return constructor(**values)

    @property
    def default_learning_rate(self) -> float | None:
        """The learning rate for models of any size; None: it follows from the size, as LoRA's does."""
        return None

    @property
    def reads_original_weights(self) -> bool:
        """Whether the initial values follow from the original weights."""
        return False

    @property
    def reads_inputs(self) -> bool:
        """Whether the initial values follow from the inputs of the layers on the training data."""
        return False

    @property
    def changes_base(self) -> bool:
        """Whether the initialization subtracts something from the base's weights."""
        return False

    def trainable_tokens(self) -> TrainableTokens:
        """Return the embeddings and output heads of which some rows train, and these rows; see `TrainableTokens`."""
        return ()

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """Return what is wrong with the shape of a module's tensor in the files, whatever the model; None: nothing."""
        return None

    def merged_bias(self, bias: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a module's bias `[out]` with its adapter in it; see `merged`."""
        return bias

    def for_model(self, shape: ModelShape) -> "Method":
        """Return the method with every choice made that it leaves to the model.

        Raises:
            UnsupportedError: the method does not work with such a model.
        """
        return self

    def renamed(self, modules: Mapping[str, str]) -> "Method":
        """Return the method that selects modules by our names as this one does by those of an adapter's files.

        Args:
            modules: our full name of each adapted module by its full name in the files; empty where no two differ.
        """
        return self

    def with_targets(self, modules: Sequence[str]) -> "Method":
        """Return the method with these full names of modules as its targets, where it has targets."""
        return self

    def with_dropout(self, dropout: float) -> "Method":
        """Return the method with another dropout of its inputs, where it has one."""
        return self

    def with_tokenizer(self, name: str) -> "Method":
        """Return the method with the name of the tokenizer of its `init_text` recorded, where it has one."""
        return self

    def initial_tokens(self, text: Sequence[int], vocabulary: int, seed: int) -> np.ndarray | None:
        """Return the tokens whose embeddings the virtual tokens start from, int32 `[rows]`; None for other methods.

        Args:
            text: the tokens of `init_text`.
            vocabulary: how many tokens there are to draw from.
        """
        return None

    def projected(self) -> "Method":
        """Return the method without the encoder that makes its virtual tokens, where it has one."""
        return self

    def make_prompt(self, rngs: nnx.Rngs) -> "Prompt | None":
        """Return the module that holds the virtual tokens of a model; None for a method without them."""
        return None


class FieldErrors(CheckpointError):
    """Some fields of an adapter_config.json are invalid.

    Attributes:
        problems: one message for each invalid field.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
