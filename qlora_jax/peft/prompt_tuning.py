"""Prompt tuning (Lester et al. 2021): n trainable embeddings are put before the embedded tokens.

They are initialized from a normal distribution, with rows of the input embedding drawn at random, or with the embeddings of
the tokens of a text. The last two need the input embedding, which has no values yet when a model is constructed:
`initial_tokens` returns the token ids, and `models.prompts.initialize_from_tokens` copies their rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError, shortened
from qlora_jax.peft.fields import Fields
from qlora_jax.peft.method import ModelShape
from qlora_jax.peft.option import Option
from qlora_jax.peft.prompt import (
    COMMON_FIELDS,
    DEFAULT_VIRTUAL_TOKENS,
    EMBEDDING,
    EMBEDDINGS,
    UNKNOWN,
    VIRTUAL_TOKENS,
    Prompt,
    PromptMethod,
    PromptShape,
    check_prompt,
    init_normal,
    merging_error,
    prompt_shape,
    prompt_shape_error,
    read_prompt,
    write_prompt,
)

PromptInit = Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"]
_INITS: dict[str, PromptInit] = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}  # by flags
_READ = COMMON_FIELDS | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}


@dataclasses.dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """Prompt tuning, with the fields of PEFT's PromptTuningConfig.

    Attributes:
        virtual_tokens: n, the number of virtual tokens.
        init: the initialization: RANDOM, SAMPLE_VOCAB (random rows of the input embedding) or TEXT.
        init_text: the text whose tokens initialize the embeddings, with TEXT.
        tokenizer: path or hub id of the tokenizer of that text; only PEFT reads it.
        shape: the sizes that the model must have.

    Raises:
        OptionError: no virtual token, an unknown initialization, a text without TEXT, or TEXT without a text.
    """

    name: ClassVar = "prompt-tuning"
    title: ClassVar = "Virtual tokens (prompt tuning)"
    summary: ClassVar = "virtual tokens before those of the text"
    peft_type: ClassVar = "PROMPT_TUNING"
    suffixes: ClassVar = (EMBEDDINGS,)
    options: ClassVar = (
        VIRTUAL_TOKENS,
        Option(
            "prompt_init",
            Literal["random", "vocabulary", "text"],
            "random",
            "Initial values of the virtual tokens of prompt-tuning: a normal distribution, embeddings of random tokens, or "
            "the embeddings of a text.",
        ),
        Option("prompt_init_text", str | None, None, "The text of prompt-init text."),
    )

    virtual_tokens: int = DEFAULT_VIRTUAL_TOKENS
    init: PromptInit = "RANDOM"
    init_text: str | None = None
    tokenizer: str | None = None
    shape: PromptShape = UNKNOWN

    def __post_init__(self) -> None:
        check_prompt("PromptTuning", self.virtual_tokens)
        if self.init not in get_args(PromptInit):
            raise OptionError(
                f"PromptTuning init: expected one of {', '.join(get_args(PromptInit))}, found {shortened(self.init)}"
            )
        if (self.init == "TEXT") != (self.init_text is not None):
            raise OptionError(
                f"PromptTuning init_text: expected one with init TEXT alone, found {shortened(self.init_text)}"
            )

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "PromptTuning":
        """See `Method`."""
        count = values["virtual_tokens"] or DEFAULT_VIRTUAL_TOKENS
        return cls(count, _INITS[values["prompt_init"]], values["prompt_init_text"])

    @property
    def default_learning_rate(self) -> float:
        """The learning rate of PEFT's examples."""
        return 3e-2

    def with_tokenizer(self, name: str) -> "PromptTuning":
        """See `Method`."""
        return dataclasses.replace(self, tokenizer=name) if self.init == "TEXT" else self

    def initial_tokens(self, text: Sequence[int], vocabulary: int, seed: int) -> np.ndarray | None:
        """Return the token ids whose embeddings are the initial values, int32 `[rows]`; None if these are random.

        Args:
            text: the token ids of `init_text`, which are truncated or repeated to n.
            vocabulary: number of rows of the input embedding to draw from.
            seed: seed of the draw.

        Raises:
            OptionError: a text without tokens.
        """
        if self.init == "RANDOM":
            return None
        if self.init == "SAMPLE_VOCAB":
            return np.random.default_rng(seed).integers(0, vocabulary, self.rows, np.int32)
        if not len(text):
            raise OptionError("PromptTuning init_text: expected a text with at least one token, found none")
        return np.resize(np.asarray(text, np.int32), self.rows)

    @property
    def rows(self) -> int:
        """Number of rows of the embeddings in the adapter file."""
        return self.virtual_tokens * (self.shape.submodules or 1)

    def targets(self, layers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return nothing: no linear layer gets an adapter."""
        return {}

    def for_model(self, shape: ModelShape) -> "PromptTuning":
        """See `Method`."""
        return dataclasses.replace(self, shape=prompt_shape("PromptTuning", self.shape, shape, is_prefix=False))

    def make_prompt(self, rngs: nnx.Rngs) -> Prompt:
        """See `Method`."""
        return Prompt(self, rngs)

    def parameters(self, key: Array) -> dict[str, Array]:
        """See `PromptMethod`."""
        return {EMBEDDING: init_normal(key, self.rows, self.shape.token_dim or 0)}

    def encode(self, parameters: Mapping[str, Array], key: Array | None = None) -> Array:
        """See `PromptMethod`."""
        return parameters[EMBEDDING]

    def projected(self) -> "PromptTuning":
        """See `PromptMethod`."""
        return self

    def shape_error(self, module: str, suffix: str, shape: tuple[int, ...]) -> str | None:
        """See `Method`."""
        return prompt_shape_error(shape, self.rows, self.shape.token_dim)

    def merged(self, weight: np.ndarray, module: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raise UnsupportedError: virtual tokens cannot be merged into weights."""
        raise merging_error("PromptTuning")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "PromptTuning":
        """See `Method`."""
        fields = Fields(config, read=_READ, inert=frozenset(("tokenizer_kwargs",)))
        init = fields.get("prompt_tuning_init", lambda x: x in get_args(PromptInit), "a known initialization", "RANDOM")
        text = fields.get("prompt_tuning_init_text", lambda x: x is None or isinstance(x, str), "a text")
        tokenizer = fields.get("tokenizer_name_or_path", lambda x: x is None or isinstance(x, str), "a path")
        common = read_prompt(fields)
        fields.check()
        return cls(init=init, init_text=text if init == "TEXT" else None, tokenizer=tokenizer, **common)

    def to_peft(self, modules: Sequence[str]) -> dict[str, Any]:
        """See `Method`."""
        return write_prompt(self.virtual_tokens, self.shape) | {
            "prompt_tuning_init": self.init,
            "prompt_tuning_init_text": self.init_text,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": self.tokenizer,
        }
