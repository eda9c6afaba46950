"""New special tokens: in the tokenizer, as rows of the token embedding and the head, and as rows that an adapter trains.

    tokenizer          the new tokens get the ids after its last one; where its padding token was EOS, a padding token is
                       added before them
    embedding, head    spare rows of the checkpoint are used, else rows are appended; all are initialised to the mean of the
                       other rows
    adapter            trains those rows alone (PEFT's trainable_token_indices), or holds them where it trains the whole
                       embedding and head

The tokenizer is saved beside the adapter, so that whoever loads the adapter needs only the base: `resized_for_adapter`
appends the rows that the base does not have. (With PEFT: call `model.resize_token_embeddings(len(tokenizer))` before the
adapter is loaded.)
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.names import PREFIX
from qlora_jax.adapters.replicated import with_replicated_layers
from qlora_jax.adapters.resized_base import embedding_names, with_resized_embeddings
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError, OptionError, UnsupportedError
from qlora_jax.models import DecoderConfig, tied_head
from qlora_jax.models.trainable import EMBEDDING, HEAD, TIED_HEAD, trainable_base
from qlora_jax.peft import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["add_special_tokens", "resized_for_adapter", "train_token_rows", "with_token_rows"]

PADDING = "<pad>"


def add_special_tokens(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> tuple[int, ...]:
    """Add special tokens to a tokenizer, in place; return their ids.

    Raises:
        OptionError: an empty token, one given twice, or one that the vocabulary has already.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if not token.strip():
            raise OptionError(f"special_tokens: expected text, found {token!r}")
        if tokens.count(token) > 1:
            raise OptionError(f"special_tokens: expected each once, found {token!r} twice")
        if token in vocabulary or token == PADDING:
            raise OptionError(f"special_tokens: expected tokens that the vocabulary lacks, found {token!r}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens)


def with_token_rows(checkpoint: Checkpoint, tokens: Sequence[int]) -> Checkpoint:
    """Return the checkpoint whose embedding and head have rows for these tokens and for all tokens before them.

    The new rows are the mean of the other rows.

    Raises:
        UnsupportedError: the model is not decoder-only.
    """
    config = checkpoint.model_config
    if not isinstance(config, DecoderConfig):
        raise UnsupportedError(f"special_tokens: expected a decoder-only model, found {config.family}")
    size = config.vocab_size
    names = [mapping.name for mapping in config.parameter_mappings if mapping.path in (EMBEDDING, HEAD)]
    larger = max(size, max(tokens) + 1)
    new = sorted({*tokens, *range(size, larger)})
    old = np.setdiff1d(np.arange(size), new)
    read = checkpoint.read

    def read_with_tokens(name: str) -> np.ndarray:
        tensor = read(name)
        if name not in names:
            return tensor
        rows = np.empty((larger, tensor.shape[1]), tensor.dtype)
        rows[:size] = tensor
        others = tensor if len(old) == size else tensor[old]
        rows[new] = others.mean(0, dtype=np.float32).astype(tensor.dtype)
        return rows

    shapes = {name: (larger, *shape[1:]) if name in names else shape for name, shape in checkpoint.shapes.items()}
    changed = checkpoint.config | {"vocab_size": larger}
    return dataclasses.replace(checkpoint, config=changed, shapes=shapes, read=read_with_tokens)


def resized_for_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint with the layers, the embedding and the head that an adapter needs.

    Layers are repeated where the adapter says so. Embeddings that PEFT had resized are taken from the adapter's files. Rows
    are appended where the adapter trained rows beyond those of the checkpoint.

    Raises:
        CheckpointError: the adapter's embeddings or rows are those of another base.
    """
    checkpoint = with_resized_embeddings(with_replicated_layers(checkpoint, adapter.method), adapter)
    size = checkpoint.config.get("vocab_size", 0)
    tokens = {token for _, tokens in adapter.method.trainable_tokens() for token in tokens}
    beyond = sorted(token for token in tokens.union(range(size, _trained_rows(checkpoint, adapter))) if token >= size)
    if not beyond:
        return checkpoint
    if beyond[-1] - size > 2 * len(beyond):  # rows of an embedding that was far larger: this is another base
        raise CheckpointError(
            f"{adapter.name}: expected trainable_token_indices below {size} or next to it, found {beyond[-1]}"
        )
    return with_token_rows(checkpoint, beyond)


def _trained_rows(checkpoint: Checkpoint, adapter: Adapter) -> int:
    """Return the number of rows of the embedding and the head that an adapter trains as a whole; 0: it trains neither."""
    mappings = checkpoint.model_config.parameter_mappings
    names = [PREFIX + name for path in (EMBEDDING, HEAD) for name in embedding_names(mappings, path)]
    return max((len(adapter.tensors[name]) for name in names if name in adapter.tensors), default=0)


def train_token_rows(lora: LoRA, checkpoint: Checkpoint, tokens: tuple[int, ...]) -> LoRA:
    """Return the method that also trains the rows of these tokens, in the token embedding and in the head.

    Raises:
        OptionError: the rows cannot be trained, because the method trains the token embedding and leaves a head that was
            tied to it.
    """
    config = checkpoint.model_config
    trained = trainable_base(lora, config.parameter_mappings, vocabulary=config.vocab_size)
    whole = {mapping.path for mapping in trained.full}
    unties = trained.unties and tied_head(config.parameter_mappings) is not None
    if unties and not {EMBEDDING, TIED_HEAD} <= whole:
        raise OptionError(
            "special_tokens: expected both the token embedding and lm_head in modules_to_save, found one of them"
        )
    rows: dict[str, tuple[int, ...]] = {}
    for mapping in config.parameter_mappings:
        if mapping.path in (EMBEDDING, HEAD) and mapping.path not in whole and not unties:
            module = "lm_head" if mapping.path == HEAD else mapping.modules()[0].rsplit(".", 1)[-1]
            rows[module] = (*(trained.rows_of(mapping.path) or ()), *tokens)
    both = tuple(rows.items())
    return dataclasses.replace(
        lora, trainable_token_indices=rows[both[0][0]] if config.tie_word_embeddings and both else both
    )
