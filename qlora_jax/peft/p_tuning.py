"""P-tuning (Liu et al. 2021): an encoder computes the embeddings e of n virtual tokens from n trainable vectors t.

    MLP     e = W3 relu(W2 relu(W1 t + b1) + b2) + b3               features: hidden, hidden, the model's hidden_size
    LSTM    e = W2 relu(W1 [forward(t); backward(t)] + b1) + b2     a bidirectional LSTM along the virtual tokens

The LSTM follows torch's: gates in the order i, f, g, o, two biases, and dropout between its layers while training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.peft.fields import Fields, is_number, is_whole
from qlora_jax.peft.method import ModelShape
from qlora_jax.peft.option import Option
from qlora_jax.peft.prompt import (
    COMMON_FIELDS,
    DEFAULT_VIRTUAL_TOKENS,
    EMBEDDING,
    EMBEDDINGS,
    ENCODER_HIDDEN_SIZE,
    UNKNOWN,
    VIRTUAL_TOKENS,
    Prompt,
    PromptMethod,
    PromptShape,
    check_prompt,
    dense,
    init_dense,
    init_normal,
    init_uniform,
    merging_error,
    prompt_shape,
    prompt_shape_error,
    read_prompt,
    write_prompt,
)

Encoder = Literal["MLP", "LSTM"]
_READ = COMMON_FIELDS | {
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
}


@dataclasses.dataclass(frozen=True)
class PTuning(PromptMethod):
    """P-tuning, with the fields of PEFT's PromptEncoderConfig.

    Attributes:
        virtual_tokens: n, the number of virtual tokens.
        encoder: MLP or LSTM.
        hidden_size: features of the encoder; None: the model's hidden_size.
        layers: number of layers of the LSTM.
        dropout: rate of dropout between the layers of the LSTM.
        encoded: whether there is an encoder; without one the embeddings themselves train.
        shape: the sizes that the model must have.

    Raises:
        OptionError: no virtual token, or an encoder of an unknown kind or with invalid sizes.
    """

    name: ClassVar = "p-tuning"
    title: ClassVar = "Virtual tokens (P-tuning)"
    summary: ClassVar = "virtual tokens that an encoder makes"
    peft_type: ClassVar = "P_TUNING"
    suffixes: ClassVar = (EMBEDDINGS,)
    options: ClassVar = (
        VIRTUAL_TOKENS,
        Option("prompt_encoder", Literal["mlp", "lstm"], "mlp", "The encoder that makes the virtual tokens of p-tuning."),
        Option("encoder_layers", int, 2, "Layers of the LSTM of p-tuning."),
        Option("encoder_dropout", float, 0.0, "Share of the values dropped between the layers of the LSTM while training."),
        ENCODER_HIDDEN_SIZE,
    )

    virtual_tokens: int = DEFAULT_VIRTUAL_TOKENS
    encoder: Encoder = "MLP"
    hidden_size: int | None = None
    layers: int = 2
    dropout: float = 0.0
    encoded: bool = True
    shape: PromptShape = UNKNOWN

    def __post_init__(self) -> None:
        check_prompt("PTuning", self.virtual_tokens)
        if self.encoder not in get_args(Encoder):
            raise OptionError(f"PTuning encoder: expected one of {', '.join(get_args(Encoder))}, found {self.encoder!r}")
        if self.layers < 1 or (self.hidden_size is not None and self.hidden_size < 1):
            raise OptionError(f"PTuning layers, hidden_size: expected at least 1, found {self.layers}, {self.hidden_size}")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"PTuning dropout: expected 0 <= dropout < 1, found {self.dropout}")

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "PTuning":
        """See `Method`."""
        encoder, layers, dropout = (values[name] for name in ("prompt_encoder", "encoder_layers", "encoder_dropout"))
        problems = [
            f"{option.name}: expected prompt_encoder lstm beside it, found {encoder}"
            for option in cls.options
            if option.name in ("encoder_layers", "encoder_dropout") and option.is_given(values) and encoder != "lstm"
        ]
        if problems:
            raise OptionError("; ".join(problems))
        count, hidden_size = values["virtual_tokens"] or DEFAULT_VIRTUAL_TOKENS, values["encoder_hidden_size"]
        return cls(count, "LSTM" if encoder == "lstm" else "MLP", hidden_size, layers, dropout)

    @property
    def default_learning_rate(self) -> float:
        """The learning rate of PEFT's examples, and a tenth of it where an encoder trains."""
        return 1e-3 if self.encoded else 1e-2

    @property
    def rows(self) -> int:
        """Number of rows of the embeddings in the adapter file."""
        return self.virtual_tokens * (self.shape.submodules or 1)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return nothing: no linear layer gets an adapter."""
        return {}

    def for_model(self, shape: ModelShape) -> "PTuning":
        """See `Method`."""
        found = prompt_shape("PTuning", self.shape, shape, is_prefix=False)
        return dataclasses.replace(self, shape=found, hidden_size=self.hidden_size or found.token_dim)

    def make_prompt(self, rngs: nnx.Rngs) -> Prompt:
        """See `Method`."""
        return Prompt(self, rngs)

    def parameters(self, key: Array) -> dict[str, Array]:
        """See `PromptMethod`."""
        features, hidden = self.shape.token_dim or 0, self.hidden_size or 0
        first, *keys = jax.random.split(key, 4)
        parameters = {EMBEDDING: init_normal(first, self.rows, features)}
        if not self.encoded:
            return parameters
        if self.encoder == "MLP":
            sizes = (features, hidden, hidden, features)
            names = ("mlp_head.0", "mlp_head.2", "mlp_head.4")
        else:
            sizes, names = (2 * hidden, 2 * hidden, features), ("mlp_head.0", "mlp_head.2")
            parameters |= self._init_lstm(keys.pop(), features, hidden)
        for key, name, inputs, outputs in zip(keys, names, sizes, sizes[1:], strict=False):
            parameters |= init_dense(key, name, inputs, outputs)
        return parameters

    def encode(self, parameters: Mapping[str, Array], key: Array | None = None) -> Array:
        """See `PromptMethod`."""
        x = parameters[EMBEDDING]
        if not self.encoded:
            return x
        if self.encoder == "LSTM":
            x = self._run_lstm(x, parameters, key)
            return dense(jax.nn.relu(dense(x, parameters, "mlp_head.0")), parameters, "mlp_head.2")
        x = jax.nn.relu(dense(x, parameters, "mlp_head.0"))
        return dense(jax.nn.relu(dense(x, parameters, "mlp_head.2")), parameters, "mlp_head.4")

    def _init_lstm(self, key: Array, features: int, hidden: int) -> dict[str, Array]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            inputs = features if layer == 0 else 2 * hidden
            for end in (f"l{layer}", f"l{layer}_reverse"):
                shapes |= {f"lstm_head.weight_ih_{end}": (4 * hidden, inputs)}
                shapes |= {f"lstm_head.weight_hh_{end}": (4 * hidden, hidden)}
                shapes |= {f"lstm_head.bias_ih_{end}": (4 * hidden,), f"lstm_head.bias_hh_{end}": (4 * hidden,)}
        return init_uniform(key, hidden, shapes)

    def _run_lstm(self, x: Array, parameters: Mapping[str, Array], key: Array | None) -> Array:
        for layer in range(self.layers):
            if layer and key is not None and self.dropout > 0:
                mask = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.dropout, x.shape)
                x = jnp.where(mask, x / (1 - self.dropout), 0)
            sides = [_lstm(x, parameters, f"l{layer}"), _lstm(x[::-1], parameters, f"l{layer}_reverse")[::-1]]
            x = jnp.concatenate(sides, axis=-1)
        return x

    def projected(self) -> "PTuning":
        """See `PromptMethod`."""
        return dataclasses.replace(self, encoded=False)

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        return prompt_shape_error(shape, self.rows, self.shape.token_dim)

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raise UnsupportedError: virtual tokens cannot be merged into weights."""
        raise merging_error("PTuning")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "PTuning":
        """See `Method`."""
        fields = Fields(config, read=_READ)
        encoder = fields.get("encoder_reparameterization_type", lambda x: x in get_args(Encoder), "MLP or LSTM", "MLP")
        hidden = fields.get("encoder_hidden_size", lambda x: x is None or is_whole(x), "a whole number")
        layers = fields.get("encoder_num_layers", is_whole, "a whole number", 2)
        dropout = fields.get("encoder_dropout", is_number, "a number", 0.0)
        common = read_prompt(fields)
        fields.check()
        return cls(encoder=encoder, hidden_size=hidden, layers=layers, dropout=dropout, **common)

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        return write_prompt(self.virtual_tokens, self.shape) | {
            "encoder_dropout": self.dropout,
            "encoder_hidden_size": self.hidden_size,
            "encoder_num_layers": self.layers,
            "encoder_reparameterization_type": self.encoder,
        }


def _lstm(x: Array, parameters: Mapping[str, Array], end: str) -> Array:
    """Return the outputs `[n, hidden]` of one direction of one layer, e.g. "l0_reverse", for inputs `[n, inputs]`."""
    of_input, of_state = parameters[f"lstm_head.weight_ih_{end}"], parameters[f"lstm_head.weight_hh_{end}"]
    bias = parameters[f"lstm_head.bias_ih_{end}"] + parameters[f"lstm_head.bias_hh_{end}"]

    def step(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        output, cell = state
        i, f, g, o = jnp.split(gates + of_state @ output, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        output = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (output, cell), output

    zero = jnp.zeros(of_state.shape[1], x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ of_input.T + bias[None])[1]
