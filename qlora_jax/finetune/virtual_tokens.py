"""Virtual tokens in a run: what they start from, and what is found wrong before the weights are read."""

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.models import Model, ModelConfig, T5Config
from qlora_jax.models.prompts import check_documents, initialize_from_tokens
from qlora_jax.peft import Method, PromptMethod, PromptTuning


def named_tokenizer(method: Method, name: str) -> Method:
    """The method with the path or hub id of its text's tokenizer, where it starts from a text."""
    if isinstance(method, PromptTuning) and method.init == "TEXT":
        return dataclasses.replace(method, tokenizer=name)
    return method


def first_tokens(method: Method, tokenizer: PreTrainedTokenizerFast, config: ModelConfig, seed: int) -> np.ndarray | None:
    """The tokens that the virtual ones start as; None where they start at random, or there are none.

    Raises:
        ValueError: a text without tokens.
    """
    if not isinstance(method, PromptTuning):
        return None
    text = [] if method.init_text is None else tokenizer(method.init_text)["input_ids"]
    return method.initial_tokens(text, config.vocab_size, seed)  # pyright: ignore[reportArgumentType]


def started(model: Model, tokens: np.ndarray | None) -> Model:
    """The model whose virtual tokens start as those."""
    return model if tokens is None else initialize_from_tokens(model, tokens)


def check_rows(method: Method, config: ModelConfig, length: int, *, packed: bool) -> None:
    """Raises ValueError where rows of so many tokens, of several documents if `packed`, cannot have virtual tokens."""
    if packed and isinstance(method, PromptMethod) and not isinstance(config, T5Config):
        check_documents(config, method.virtual_tokens, length)
