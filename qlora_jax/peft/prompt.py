"""What prompt tuning, P-tuning and prefix tuning have in common: a module by itself, in place of adapters of linear layers.

    embeddings    [rows, hidden_size]              stand before the embedded tokens; an encoder-decoder puts them before the
                                                   sources
    prefix        [rows, layers * 2 * features]    keys and values before those of every layer of the decoder: those of layer
                                                   i are parts 2i and 2i + 1

What trains may be these values themselves, or an encoder that makes them: a method says which parameters it has
(`parameters`) and what they make (`encode`). PEFT's files hold the result alone, under one name, and so do ours; the
parameters of an encoder are saved beside them (checkpoint/prompts.py).

For an encoder-decoder PEFT makes twice as many rows of embeddings (`submodules` = 2) and leaves the second half unused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.peft.fields import Fields, is_whole
from qlora_jax.peft.method import Method, ModelShape
from qlora_jax.peft.option import Option

EMBEDDINGS = "prompt_embeddings"  # the one name in PEFT's files
EMBEDDING = "embedding.weight"  # the name of a table of values among an encoder's parameters, as in PEFT's modules
DEFAULT_VIRTUAL_TOKENS = 20
VIRTUAL_TOKENS = Option(
    "virtual_tokens",
    int | None,
    None,
    f"Number of virtual tokens of prompt-tuning, p-tuning and prefix-tuning; {DEFAULT_VIRTUAL_TOKENS} if left out.",
    lambda count: count > 0,
    "at least 1",
)
ENCODER_HIDDEN_SIZE = Option(
    "encoder_hidden_size",
    int | None,
    None,
    "Hidden features of the encoder of p-tuning or of prefix-projection; as many as a token's embedding or the keys of a "
    "layer have if left out.",
)
COMMON_FIELDS = frozenset(
    (
        "num_virtual_tokens",
        "token_dim",
        "num_layers",
        "num_attention_heads",
        "num_transformer_submodules",
        "modules_to_save",
    )
)


@dataclasses.dataclass(frozen=True)
class PromptShape:
    """What PEFT's configurations say of the model; None: it follows from the model.

    Attributes:
        token_dim: features of an embedding, or of all keys of a layer.
        layers: of the model, the encoder's where there is one.
        heads: of attention; for prefix tuning, those of keys.
        submodules: 2 for an encoder-decoder, else 1.
    """

    token_dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    submodules: int | None = None


UNKNOWN = PromptShape()


@runtime_checkable
class PromptMethod(Method, Protocol):
    """A method whose parameters make virtual tokens, or keys and values of virtual tokens (`is_prefix`)."""

    def parameters(self, key: Array) -> dict[str, Array]:
        """Return new float32 parameters, by the names and in the orientation of PEFT's modules."""
        ...

    def encode(self, parameters: Mapping[str, Array], key: Array | None = None) -> Array:
        """Return the values that the parameters make, float32 `[rows, features]`; `key` turns dropout on."""
        ...

    def projected(self) -> "PromptMethod":
        """Return the method without an encoder, in which the values that the encoder made train themselves."""
        ...


class Prompt(nnx.Module):
    """The virtual tokens of a model.

    Attributes:
        method: what made it.
        names: of its parameters, `nnx.LoRAParam` each.
    """

    def __init__(self, method: PromptMethod, rngs: nnx.Rngs) -> None:
        parameters = method.parameters(rngs.params())
        self.method, self.names = method, tuple(parameters)
        for name, value in parameters.items():
            setattr(self, attribute_of(name), nnx.LoRAParam(value))

    @property
    def virtual_tokens(self) -> int:
        return self.method.virtual_tokens

    @property
    def is_prefix(self) -> bool:
        return self.method.is_prefix

    def __call__(self, key: Array | None = None) -> Array:
        """float32 `[rows, features]`, as the files hold it."""
        return self.method.encode({name: getattr(self, attribute_of(name))[...] for name in self.names}, key)

    def embeddings(self, batch: int, dtype: Any, key: Array | None = None) -> Array:
        """`[batch, n, hidden_size]`."""
        rows = self(key)[: self.virtual_tokens].astype(dtype)
        return jnp.broadcast_to(rows, (batch, *rows.shape))

    def keys_and_values(self, layers: int, kv_heads: int, key: Array | None = None) -> tuple[Array, Array]:
        """float32 `[layers, n, kv_heads, head_dim]` each, of which an encoder-decoder's decoder takes `cross_order`."""
        parts = self(key).reshape(self.virtual_tokens, layers, 2, kv_heads, -1).transpose(2, 1, 0, 3, 4)
        return parts[0], parts[1]


def attribute_of(name: str) -> str:
    """The attribute of `Prompt` that holds a parameter."""
    return name.replace(".", "_")


def cross_order(layers: int, decoder_layers: int) -> list[int]:
    """Which of the keys and values each layer of an encoder-decoder's decoder takes.

    PEFT repeats all of them, takes four at a time for each layer, and drops the second two, which would be those of
    cross-attention: of L layers, layer i takes number 2i modulo L.
    """
    return [2 * layer % layers for layer in range(decoder_layers)]


def check_prompt(kind: str, virtual_tokens: int) -> None:
    """Raises OptionError where there is no virtual token."""
    if virtual_tokens < 1:
        raise OptionError(f"{kind} virtual_tokens: expected at least 1, found {virtual_tokens}")


def prompt_shape(kind: str, given: PromptShape, shape: ModelShape, *, is_prefix: bool) -> PromptShape:
    """What a prompt for that model has to be.

    Raises:
        OptionError: `given` is another.
    """
    expected = PromptShape(
        token_dim=shape.kv_heads * shape.head_dim if is_prefix else shape.hidden_size,
        layers=shape.layers,
        heads=shape.kv_heads if is_prefix else given.heads,
        submodules=2 if shape.encoder_decoder else 1,
    )
    if not is_prefix and given.submodules is not None:  # both work: the second half is unused
        expected = dataclasses.replace(expected, submodules=given.submodules)
    for field in dataclasses.fields(PromptShape):
        found, wanted = getattr(given, field.name), getattr(expected, field.name)
        if found is not None and found != wanted:
            raise OptionError(f"{kind} {field.name}: expected {wanted} as in the model, found {found}")
    if is_prefix and shape.decoder_layers > shape.layers:
        raise OptionError(f"{kind}: expected no more layers in the decoder than in the encoder, as PEFT does, found more")
    return expected


def misfit_of(shape: tuple[int, ...], rows: int, features: int | None) -> str | None:
    """What is wrong with the shape of the values in a file; None: nothing."""
    fits = len(shape) == 2 and shape[0] == rows and (features is None or shape[1] == features)
    return None if fits else f"expected [{rows}, {'features' if features is None else features}]"


def normal(key: Array, rows: int, features: int) -> Array:
    """A fresh table of values, as torch draws them."""
    return jax.random.normal(key, (rows, features), jnp.float32)


def dense(key: Array, name: str, inputs: int, outputs: int) -> dict[str, Array]:
    """Fresh weight `[outputs, inputs]` and bias of a dense layer, uniform in ±1/sqrt(inputs)."""
    return uniform(key, inputs, {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})


def uniform(key: Array, size: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Values uniform in ±1/sqrt(size)."""
    keys, bound = jax.random.split(key, len(shapes)), size**-0.5
    return {
        name: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def through(x: Array, parameters: Mapping[str, Array], name: str) -> Array:
    """A dense layer."""
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"][None]


def read_prompt(fields: Fields) -> dict[str, Any]:
    """The arguments that all methods here have in common."""

    def number(name: str) -> Any:
        return fields.get(name, lambda x: x is None or (is_whole(x) and x > 0), "a whole number above 0")

    virtual = fields.get("num_virtual_tokens", is_whole, "a whole number", 0)
    if fields.get("modules_to_save", lambda x: isinstance(x, list), "names of modules", []):
        fields.problems.append("modules_to_save beside virtual tokens is not supported")
    shape = PromptShape(*map(number, ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")))
    if shape.submodules not in (None, 1, 2):
        fields.problems.append(f"num_transformer_submodules: expected 1 or 2, found {shape.submodules}")
    return {"virtual_tokens": virtual, "shape": shape}


def write_prompt(virtual_tokens: int, shape: PromptShape) -> dict[str, Any]:
    """The fields that all methods here have in common."""
    return {
        "modules_to_save": None,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "num_transformer_submodules": shape.submodules,
        "num_virtual_tokens": virtual_tokens,
        "token_dim": shape.token_dim,
    }


def no_merging(kind: str) -> UnsupportedError:
    """Return the error of merging virtual tokens into weights."""
    return UnsupportedError(f"{kind}: virtual tokens are no weights of the model: they cannot be merged into it")
