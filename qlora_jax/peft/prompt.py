"""The common parts of prompt tuning, P-tuning and prefix tuning, which add one module to a model.

Linear layers get no adapters.

    embeddings    [rows, hidden_size]              are put before the embedded tokens; in an encoder-decoder, before the
                                                   encoder's tokens
    prefix        [rows, layers * 2 * features]    keys and values, put before those of the tokens in every layer of the
                                                   decoder; parts 2i and 2i + 1 belong to layer i

Either these values themselves train, or an encoder that computes them. A method defines its parameters (`parameters`) and
the values that they give (`encode`). PEFT's adapter files hold only the values, under one name, and so do ours; the
parameters of an encoder are saved in a second file (adapters/virtual_tokens.py).

For an encoder-decoder, PEFT creates twice as many rows of embeddings (`submodules` = 2) and does not use the second half.
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

EMBEDDINGS = "prompt_embeddings"  # the only tensor's name in PEFT's adapter files
EMBEDDING = "embedding.weight"  # the name of the trainable vectors among a method's parameters, as in PEFT's modules
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
    """The sizes of the model that PEFT's configurations contain; None: not given, any model fits.

    Attributes:
        token_dim: features of an embedding; for prefix tuning, of all keys of a layer.
        layers: number of layers of the encoder, or of the decoder in a decoder-only model.
        heads: number of attention heads; for prefix tuning, of key and value heads.
        submodules: 2 for an encoder-decoder, else 1.
    """

    token_dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    submodules: int | None = None


UNKNOWN = PromptShape()


@runtime_checkable
class PromptMethod(Method, Protocol):
    """A method whose parameters give the embeddings of virtual tokens, or their keys and values (`is_prefix`)."""

    def parameters(self, key: Array) -> dict[str, Array]:
        """Return new float32 parameters, with the names and the orientation of PEFT's modules."""
        ...

    def encode(self, parameters: Mapping[str, Array], key: Array | None = None) -> Array:
        """Return the values that the parameters give, float32 `[rows, features]`; with a random key, dropout is applied."""
        ...

    def projected(self) -> "PromptMethod":
        """Return the method without its encoder: the values that `encode` returned are then the parameters."""
        ...


class Prompt(nnx.Module):
    """The virtual tokens of a model.

    Attributes:
        method: the method that defines the parameters.
        names: names of the parameters; each is an `nnx.LoRAParam` in the attribute `attribute_of(name)`.
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
        """Return the values that adapter files hold, float32 `[rows, features]`; with a random key, dropout is applied."""
        return self.method.encode({name: getattr(self, attribute_of(name))[...] for name in self.names}, key)

    def embeddings(self, batch: int, dtype: Any, key: Array | None = None) -> Array:
        """Return the embeddings of the virtual tokens, repeated for each row of a batch: `[batch, n, hidden_size]`."""
        rows = self(key)[: self.virtual_tokens].astype(dtype)
        return jnp.broadcast_to(rows, (batch, *rows.shape))

    def keys_and_values(self, layers: int, kv_heads: int, key: Array | None = None) -> tuple[Array, Array]:
        """Return keys and values, float32 `[layers, n, kv_heads, head_dim]` each; an encoder-decoder uses `cross_order`."""
        parts = self(key).reshape(self.virtual_tokens, layers, 2, kv_heads, -1).transpose(2, 1, 0, 3, 4)
        return parts[0], parts[1]


def attribute_of(name: str) -> str:
    """Return the name of the attribute of `Prompt` that holds a parameter."""
    return name.replace(".", "_")


def cross_order(layers: int, decoder_layers: int) -> list[int]:
    """Return, for each layer of an encoder-decoder's decoder, the index of the keys and values that it uses.

    PEFT repeats the keys and values of all L layers, assigns four tensors to each layer, and ignores the last two, which are
    meant for cross-attention. So layer i uses the keys and values with index 2i modulo L.
    """
    return [2 * layer % layers for layer in range(decoder_layers)]


def check_prompt(kind: str, virtual_tokens: int) -> None:
    """Raise OptionError if there is no virtual token."""
    if virtual_tokens < 1:
        raise OptionError(f"{kind} virtual_tokens: expected at least 1, found {virtual_tokens}")


def prompt_shape(kind: str, given: PromptShape, shape: ModelShape, *, is_prefix: bool) -> PromptShape:
    """Return the sizes that virtual tokens for this model must have.

    Raises:
        OptionError: `given` contradicts the model.
    """
    expected = PromptShape(
        token_dim=shape.kv_heads * shape.head_dim if is_prefix else shape.hidden_size,
        layers=shape.layers,
        heads=shape.kv_heads if is_prefix else given.heads,
        submodules=2 if shape.encoder_decoder else 1,
    )
    if not is_prefix and given.submodules is not None:  # 1 and 2 both work, because the second half is not used
        expected = dataclasses.replace(expected, submodules=given.submodules)
    for field in dataclasses.fields(PromptShape):
        found, wanted = getattr(given, field.name), getattr(expected, field.name)
        if found is not None and found != wanted:
            raise OptionError(f"{kind} {field.name}: expected {wanted} as in the model, found {found}")
    if is_prefix and shape.decoder_layers > shape.layers:
        raise OptionError(f"{kind}: expected no more layers in the decoder than in the encoder, as PEFT does, found more")
    return expected


def prompt_shape_error(shape: tuple[int, ...], rows: int, features: int | None) -> str | None:
    """Return what is wrong with the shape of the values in an adapter file, or None if it is right."""
    fits = len(shape) == 2 and shape[0] == rows and (features is None or shape[1] == features)
    return None if fits else f"expected [{rows}, {'features' if features is None else features}]"


def init_normal(key: Array, rows: int, features: int) -> Array:
    """Return values from the standard normal distribution, float32 `[rows, features]`, as torch initializes embeddings."""
    return jax.random.normal(key, (rows, features), jnp.float32)


def init_dense(key: Array, name: str, inputs: int, outputs: int) -> dict[str, Array]:
    """Return a weight `[outputs, inputs]` and a bias `[outputs]` of a dense layer, uniform in ±1/sqrt(inputs)."""
    return init_uniform(key, inputs, {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})


def init_uniform(key: Array, size: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return float32 arrays of the given shapes, uniform in ±1/sqrt(size)."""
    keys, bound = jax.random.split(key, len(shapes)), size**-0.5
    return {
        name: jax.random.uniform(k, shape, jnp.float32, -bound, bound)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def dense(x: Array, parameters: Mapping[str, Array], name: str) -> Array:
    """Apply the dense layer of that name to x `[n, inputs]`."""
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"][None]


def read_prompt(fields: Fields) -> dict[str, Any]:
    """Return the arguments that the three methods have in common."""

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
    """Return the fields of adapter_config.json that the three methods have in common."""
    return {
        "modules_to_save": None,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "num_transformer_submodules": shape.submodules,
        "num_virtual_tokens": virtual_tokens,
        "token_dim": shape.token_dim,
    }


def merging_error(kind: str) -> UnsupportedError:
    """Return the error for an attempt to merge virtual tokens into weights."""
    return UnsupportedError(f"{kind}: virtual tokens are no weights of the model: they cannot be merged into it")
