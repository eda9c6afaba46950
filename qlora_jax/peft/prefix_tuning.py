"""Prefix tuning (Li and Liang 2021): n trainable keys and values are put before those of the tokens in every layer.

    keys and values = P                                       P [n, layers * 2 * features]
    keys and values = W2 tanh(W1 e + b1) + b2                 e [n, features], the reparameterisation of the paper

Rotary position embeddings are not applied to these keys. The positions of the tokens count from n on, as in PEFT.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.peft.fields import Fields, is_whole
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
    merging_error,
    prompt_shape,
    prompt_shape_error,
    read_prompt,
    write_prompt,
)

_READ = COMMON_FIELDS | {"encoder_hidden_size", "prefix_projection", "init_weights"}


@dataclasses.dataclass(frozen=True)
class PrefixTuning(PromptMethod):
    """Prefix tuning, with the fields of PEFT's PrefixTuningConfig.

    Attributes:
        virtual_tokens: n, the number of keys and values in each layer.
        projection: whether an MLP computes the keys and values (the paper's reparameterisation).
        hidden_size: features of that MLP; None: the features of all keys of a layer.
        zero: whether the keys and values are initialized with zeros instead of random values.
        encoded: whether the MLP of `projection` is still present; without it the keys and values themselves train.
        shape: the sizes that the model must have.

    Raises:
        OptionError: no virtual token, or no features in the MLP.
    """

    name: ClassVar = "prefix-tuning"
    title: ClassVar = "Keys and values (prefix tuning)"
    summary: ClassVar = "keys and values of virtual tokens in every layer"
    peft_type: ClassVar = "PREFIX_TUNING"
    suffixes: ClassVar = (EMBEDDINGS,)
    is_prefix: ClassVar = True
    options: ClassVar = (
        VIRTUAL_TOKENS,
        Option("prefix_projection", bool, False, "Let an MLP make the keys and values of prefix-tuning."),
        ENCODER_HIDDEN_SIZE,
    )

    virtual_tokens: int = DEFAULT_VIRTUAL_TOKENS
    projection: bool = False
    hidden_size: int | None = None
    zero: bool = False
    encoded: bool = True
    shape: PromptShape = UNKNOWN

    def __post_init__(self) -> None:
        check_prompt("PrefixTuning", self.virtual_tokens)
        if self.hidden_size is not None and self.hidden_size < 1:
            raise OptionError(f"PrefixTuning hidden_size: expected at least 1, found {self.hidden_size}")

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "PrefixTuning":
        """See `Method`."""
        projection, hidden_size = values["prefix_projection"], values["encoder_hidden_size"]
        if hidden_size is not None and not projection:
            raise OptionError("encoder_hidden_size: expected prefix_projection beside it, found none")
        return cls(values["virtual_tokens"] or DEFAULT_VIRTUAL_TOKENS, projection, hidden_size)

    @property
    def default_learning_rate(self) -> float:
        """The learning rate of PEFT's examples, and a tenth of it where an MLP trains."""
        return 1e-3 if self.projection and self.encoded else 1e-2

    @property
    def features(self) -> int | None:
        """Number of features of the keys and values of all layers together, or None if the model is unknown."""
        shape = self.shape
        return None if shape.layers is None or shape.token_dim is None else 2 * shape.layers * shape.token_dim

    def targets(self, layers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return nothing: no linear layer gets an adapter."""
        return {}

    def for_model(self, shape: ModelShape) -> "PrefixTuning":
        """See `Method`."""
        found = prompt_shape("PrefixTuning", self.shape, shape, is_prefix=True)
        return dataclasses.replace(self, shape=found, hidden_size=self.hidden_size or found.token_dim)

    def make_prompt(self, rngs: nnx.Rngs) -> Prompt:
        """See `Method`."""
        return Prompt(self, rngs)

    def parameters(self, key: Array) -> dict[str, Array]:
        """See `PromptMethod`."""
        n, features, all_features = self.virtual_tokens, self.shape.token_dim or 0, self.features or 0
        first, second, third = jax.random.split(key, 3)
        if not (self.projection and self.encoded):
            values = init_normal(first, n, all_features)
            return {EMBEDDING: jnp.zeros_like(values) if self.zero else values}
        hidden = self.hidden_size or 0
        last = init_dense(third, "transform.2", hidden, all_features)
        if self.zero:
            last = jax.tree.map(jnp.zeros_like, last)
        return {EMBEDDING: init_normal(first, n, features), **init_dense(second, "transform.0", features, hidden), **last}

    def encode(self, parameters: Mapping[str, Array], key: Array | None = None) -> Array:
        """See `PromptMethod`."""
        x = parameters[EMBEDDING]
        if not (self.projection and self.encoded):
            return x
        return dense(jnp.tanh(dense(x, parameters, "transform.0")), parameters, "transform.2")

    def projected(self) -> "PrefixTuning":
        """See `PromptMethod`."""
        return dataclasses.replace(self, encoded=False)

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        return prompt_shape_error(shape, self.virtual_tokens, self.features)

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raise UnsupportedError: virtual tokens cannot be merged into weights."""
        raise merging_error("PrefixTuning")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "PrefixTuning":
        """See `Method`."""
        fields = Fields(config, read=_READ)
        projection = fields.get("prefix_projection", lambda x: isinstance(x, bool), "true or false", False)
        hidden = fields.get("encoder_hidden_size", lambda x: x is None or is_whole(x), "a whole number")
        initialization = fields.get("init_weights", lambda x: x in (None, "zero"), "zero or nothing")
        common = read_prompt(fields)
        fields.check()
        return cls(projection=projection, hidden_size=hidden, zero=initialization == "zero", **common)

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        return write_prompt(self.virtual_tokens, self.shape) | {
            "encoder_hidden_size": self.hidden_size,
            "init_weights": "zero" if self.zero else None,
            "prefix_projection": self.projection,
        }
