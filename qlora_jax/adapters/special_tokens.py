"""New special tokens: in the tokenizer, as rows of the token table and the head, and as what an adapter trains.

    tokenizer      the tokens get the ids after its last; where its padding was EOS, a padding token comes before them
    table, head    spare rows of the checkpoint are used, else rows are appended; all start as the mean of the others
    adapter        trains those rows alone, by PEFT's trainable_token_indices

Where the adapter trains the whole table and head, these hold the rows. Its files hold the tokenizer as well, so that whoever
loads it needs only the base: `grown` makes room for rows that the base lacks. (In PEFT that is
`model.resize_token_embeddings(len(tokenizer))`, before the adapter is loaded.)
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.adapters.files import PREFIX, Adapter
from qlora_jax.adapters.resized_base import names_of, with_tables
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.models import DecoderConfig, family_of, tied_head
from qlora_jax.models.trainable import EMBEDDING, HEAD, TIED_HEAD, trainable_base
from qlora_jax.peft import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["add_special_tokens", "grown", "training_tokens", "with_tokens"]

PADDING = "<pad>"


def add_special_tokens(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of special tokens that the tokenizer has from now on.

    Raises:
        ValueError: an empty token, one given twice, or one that the vocabulary has.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if not token.strip():
            raise ValueError(f"special_tokens: expected text, found {token!r}")
        if tokens.count(token) > 1:
            raise ValueError(f"special_tokens: expected each once, found {token!r} twice")
        if token in vocabulary or token == PADDING:
            raise ValueError(f"special_tokens: expected tokens that the vocabulary lacks, found {token!r}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens)


def with_tokens(checkpoint: Checkpoint, tokens: Sequence[int]) -> Checkpoint:
    """The checkpoint whose table and head have rows for these tokens, and any before them: the mean of the other rows.

    Raises:
        ValueError: the model is not decoder-only.
    """
    config = family_of(checkpoint.config).config(checkpoint.config)
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"special_tokens: expected a decoder-only model, found {config.family}")
    size, names = config.vocab_size, [key.name for key in config.parameter_mappings if key.path in (EMBEDDING, HEAD)]
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


def grown(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with room for the rows that an adapter has trained beyond its table, alone or in a whole table; with
    the token table and head that PEFT had resized where the adapter's files hold them."""
    checkpoint = with_tables(checkpoint, adapter)
    size = checkpoint.config.get("vocab_size", 0)
    tokens = {token for _, tokens in adapter.method.trainable_tokens() for token in tokens}
    beyond = sorted(token for token in tokens.union(range(size, _rows_of_whole(checkpoint, adapter))) if token >= size)
    if not beyond:
        return checkpoint
    if beyond[-1] - size > 2 * len(beyond):  # rows of a table that was far larger: this is another base
        raise CheckpointError(
            f"{adapter.source}: expected trainable_token_indices below {size} or next to it, found {beyond[-1]}"
        )
    return with_tokens(checkpoint, beyond)


def _rows_of_whole(checkpoint: Checkpoint, adapter: Adapter) -> int:
    """The rows of the token table and the head that an adapter trains as a whole; 0: it trains neither."""
    keys = family_of(checkpoint.config).config(checkpoint.config).parameter_mappings
    names = [name for path in (EMBEDDING, HEAD) for name in names_of(keys, path)]
    return max((len(adapter.tensors[PREFIX + name]) for name in names if PREFIX + name in adapter.tensors), default=0)


def training_tokens(lora: LoRA, checkpoint: Checkpoint, tokens: tuple[int, ...]) -> LoRA:
    """The adapter that also trains the rows of these tokens, in the token table and in the head.

    Raises:
        ValueError: the rows cannot train, as the adapter trains the token table apart from a head that was one with it.
    """
    config = family_of(checkpoint.config).config(checkpoint.config)
    trained = trainable_base(lora, config.parameter_mappings, vocabulary=config.vocab_size)
    whole = {key.path for key in trained.full}
    unties = trained.unties and tied_head(config.parameter_mappings) is not None
    if unties and not {EMBEDDING, TIED_HEAD} <= whole:
        raise ValueError("special_tokens: expected both the token table and lm_head in modules_to_save, found one of them")
    rows: dict[str, tuple[int, ...]] = {}
    for key in config.parameter_mappings:
        if key.path in (EMBEDDING, HEAD) and key.path not in whole and not unties:
            module = "lm_head" if key.path == HEAD else key.modules()[0].rsplit(".", 1)[-1]
            rows[module] = (*(trained.rows_of(key.path) or ()), *tokens)
    both = tuple(rows.items())
    return dataclasses.replace(
        lora, trainable_token_indices=rows[both[0][0]] if config.tie_word_embeddings and both else both
    )
