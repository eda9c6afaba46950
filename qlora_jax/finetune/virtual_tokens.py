"""Virtual tokens in a run: their initial values, and a check before the weights are read."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.models import Model, ModelConfig, T5Config
from qlora_jax.models.prompts import check_documents, initialize_from_tokens
from qlora_jax.peft import Method


def first_tokens(method: Method, tokenizer: PreTrainedTokenizerFast, config: ModelConfig, seed: int) -> np.ndarray | None:
    """Return the tokens whose embeddings the virtual tokens start from; None where they start at random, or there are none.

    Raises:
        OptionError: a text without tokens.
    """
    text = [] if method.init_text is None else tokenizer(method.init_text)["input_ids"]
    return method.initial_tokens(text, config.vocab_size, seed)  # pyright: ignore[reportArgumentType]


def start_from(model: Model, tokens: np.ndarray | None) -> Model:
    """Return the model whose virtual tokens start from the embeddings of these tokens."""
    return model if tokens is None else initialize_from_tokens(model, tokens)


def check_rows(method: Method, config: ModelConfig, length: int, *, packed: bool) -> None:
    """Raise OptionError where rows of so many tokens, with several documents if `packed`, cannot have virtual tokens."""
    if packed and method.virtual_tokens and not isinstance(config, T5Config):
        check_documents(config, method.virtual_tokens, length)
