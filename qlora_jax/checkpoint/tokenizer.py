"""The tokenizer of a checkpoint: read from Hugging Face's files (tokenizer_files.py), or built from a GGUF file's metadata
(gguf/tokenizer.py).

Padding. Where labels are masked by token and the padding token is EOS, EOS is masked too, and the model never learns to
stop. `load_tokenizer` therefore chooses another padding token from the vocabulary, by the first rule that finds one: a token
that was made for it (`<pad>`, `<|finetune_right_pad_id|>` …), a special token that is reserved or unused, the unknown token,
or another special token that is neither BOS, EOS nor part of the chat template. The vocabulary is never extended, since the
model has no embedding for more tokens. EOS remains only where no other token exists (GPT-2 has one special token).

Tokens without an embedding. A tokenizer may have a few tokens more than the embedding has rows: all sizes of Gemma 3 share a
tokenizer with a token for images, and a padding token is often added without resizing the model. Such a tokenizer is used;
only the text in which such a token occurs is refused (data/token_ids.py).
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.tokenizer import gguf_tokenizer
from qlora_jax.checkpoint.gguf.vocabulary import end_ids
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.checkpoint.tokenizer_files import folder_tokenizer
from qlora_jax.errors import CheckpointError, list_names

if TYPE_CHECKING:  # imported where it is used: transformers takes a second, and PyTorch with it where that is installed
    from transformers import PreTrainedTokenizerFast


__all__ = ["check_tokenizer", "load_tokenizer", "save_tokenizer", "stop_ids"]

FEW, MANY = 16, 256  # tokens without an embedding, of the vocabulary and with added ones, that a tokenizer may have
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endofpad|>")
_logger = logging.getLogger(__name__)


def load_tokenizer(name: str | Path | Snapshot, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a model, whose padding token is not EOS where the vocabulary has another one for it.

    Args:
        name: a folder, a .gguf file, a repository id, or a snapshot that was resolved before.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    path = resolve(name, revision).path
    tokenizer = gguf_tokenizer(path) if path.is_file() else folder_tokenizer(path)
    _separate_padding(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into a folder, for transformers' AutoTokenizer."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a new name for the same class. Version 4 knows only the old name, and version 5 knows both.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # These fields say how this process found the files, which is no property of the tokenizer.
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_ids(base: str | Path | Snapshot, tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Return the ids of all tokens that a model calls the end of a text, which often includes the end of a turn.

    Args:
        base: the files of the model; config.json and generation_config.json are read where they exist. Of a GGUF file that
            names no end of a turn, the tokens with the usual names are taken; `load_tokenizer` warns of it.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    path = resolve(base).path
    stated: list[tuple[object, Any]] = [(path, tokenizer.eos_token_id)]
    if path.is_file():
        stated += [(path, index) for index in end_ids(read_header(path).metadata)[0]]
    else:
        for file in (path / "config.json", path / "generation_config.json"):
            stated.append((file, (read_object(file) or {}).get("eos_token_id")))
    ids: set[int] = set()
    for place, value in stated:
        for index in value if isinstance(value, list) else [value]:
            if index is not None and (type(index) is not int or index < 0):
                raise CheckpointError(f"{place}: eos_token_id: expected ids of tokens, found {str(value)[:80]}.")
            ids |= set() if index is None else {index}
    return frozenset(ids)


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", config: Mapping[str, Any]) -> None:
    """Compare the vocabulary with the rows of the embedding of the model of this config.json.

    A padding token without a row is replaced by another token.

    Raises:
        CheckpointError: so many tokens have no row that the tokenizer is that of another model, or those have none that
            every text begins or ends with.
    """
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if type(size) is not int:
        raise CheckpointError(f"config: expected a number vocab_size, found {size!r}.")
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= size}
    if not beyond:
        return
    place, added = tokenizer.name_or_path or "tokenizer", tokenizer.get_added_vocab()
    own = [token for token in beyond if token not in added]
    if len(own) > max(FEW, len(tokenizer) // 100) or len(beyond) > max(MANY, len(tokenizer) // 10):
        token, highest = max(beyond.items(), key=lambda item: item[1])
        raise CheckpointError(
            f"{place}: does not belong to this model: expected token ids below {size} (vocab_size, the rows of the "
            f"embedding), found {len(beyond)} others, up to {highest} for {token!r}."
        )
    every = [*cast(list[int], tokenizer("a")["input_ids"]), tokenizer.eos_token_id]
    needed = set(beyond.values()).intersection(every)
    if needed:
        names = list_names([repr(token) for token, index in beyond.items() if index in needed])
        raise CheckpointError(
            f"{place}: {names}: every text has this token, and the model has no embedding for it: expected ids below {size} "
            f"(vocab_size), found {list_names([str(index) for index in sorted(needed)])}. Name another eos_token in "
            "tokenizer_config.json, or take the tokenizer of the base."
        )
    if tokenizer.pad_token in beyond:
        tokenizer.pad_token = _padding_choice(tokenizer, size) or tokenizer.eos_token
    _logger.info("%s: %d tokens have no embedding in this model: %s", place, len(beyond), list_names(list(beyond)))


def _separate_padding(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    choice = _padding_choice(tokenizer)
    if choice is not None:
        tokenizer.pad_token = choice
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _padding_choice(tokenizer: "PreTrainedTokenizerFast", size: int | None = None) -> str | None:
    """Return the token of the first rule in this module's docstring, with an id below `size` where that is given."""
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if size is None or index < size}
    taken = {str(tokenizer.eos_token), str(tokenizer.bos_token)}
    for name in PAD_NAMES:
        if name in vocabulary and name not in taken:
            return name
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = [item for item in sorted(tokenizer.added_tokens_decoder.items()) if str(item[1]) in vocabulary]
    spare = [str(token) for _, token in added if token.special and str(token) not in taken and str(token) not in template]
    for token in spare:
        if re.search("reserved|unused", token, re.IGNORECASE):
            return token
    if tokenizer.unk_token in vocabulary and str(tokenizer.unk_token) not in taken:
        return str(tokenizer.unk_token)
    return spare[0] if spare else None
