"""The tokenizer of a checkpoint: read from Hugging Face's files, or built from a GGUF file's metadata (gguf/tokenizer.py).

Padding. Where labels are masked by token and the padding token is EOS, EOS is masked too, and the model never learns to
stop. `load_tokenizer` therefore chooses another padding token from the vocabulary, by the first rule that finds one: a token
that was made for it (`<pad>`, `<|finetune_right_pad_id|>` …), a special token that is reserved or unused, the unknown token,
or another special token that is neither BOS, EOS nor part of the chat template. The vocabulary is never extended, since the
model has no embedding for more tokens. EOS remains only where no other token exists (GPT-2 has one special token).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.tokenizer import gguf_tokenizer
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.errors import CheckpointError

if TYPE_CHECKING:  # imported where it is used: transformers takes a second, and PyTorch with it where that is installed
    from transformers import PreTrainedTokenizerFast

# Tokenizers need no PyTorch: without this transformers advises, on import, that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["check_tokenizer", "load_tokenizer", "save_tokenizer", "stop_ids"]

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endofpad|>")


def load_tokenizer(name: str | Path | Snapshot, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a model, whose padding token is not EOS where the vocabulary has another one for it.

    Args:
        name: a folder, a .gguf file, a repository id, or a snapshot that was resolved before.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    path = resolve(name, revision).path
    tokenizer = gguf_tokenizer(path) if path.is_file() else _from_folder(path)
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
        base: the files of the model; config.json and generation_config.json are read where they exist.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    path = resolve(base).path
    stated: list[Any] = [tokenizer.eos_token_id]
    if path.is_file():
        stated.append(read_header(path).metadata.get("tokenizer.ggml.eot_token_id"))
    for file in (path / "config.json", path / "generation_config.json"):
        if file.is_file():
            try:
                stated.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
            except (ValueError, AttributeError) as error:
                raise CheckpointError(f"{file}: expected a JSON object, found: {error}") from error
    return frozenset(index for value in stated for index in (value if isinstance(value, list) else [value])) - {None}


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the tokenizer has a token for which the model of this config.json has no embedding."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(size, int):
        raise CheckpointError(f"config: expected a number vocab_size, found {size!r}.")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= size:
        raise CheckpointError(
            f"{tokenizer.name_or_path or 'tokenizer'}: does not belong to this model: expected token ids "
            f"below {size} (vocab_size, the rows of the embedding), found {highest} for {token!r}."
        )


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointError(
            f"{folder}: has no tokenizer: expected tokenizer.json (or {', '.join(VOCABULARY_FILES[1:])}), "
            "found none of them."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The tokenizers library raises plain Exception for a damaged file.
    except Exception as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{folder}: expected a tokenizer that the tokenizers library can run (a tokenizer.json), found "
            f"{type(tokenizer).__name__}."
        )
    return tokenizer


def _separate_padding(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    choice = _padding_choice(tokenizer)
    if choice is not None:
        tokenizer.pad_token = choice
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _padding_choice(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    vocabulary = tokenizer.get_vocab()
    taken = {str(tokenizer.eos_token), str(tokenizer.bos_token)}
    for name in PAD_NAMES:
        if name in vocabulary and name not in taken:
            return name
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = sorted(tokenizer.added_tokens_decoder.items())
    spare = [str(token) for _, token in added if token.special and str(token) not in taken and str(token) not in template]
    for token in spare:
        if re.search("reserved|unused", token, re.IGNORECASE):
            return token
    if tokenizer.unk_token is not None and str(tokenizer.unk_token) not in taken:
        return str(tokenizer.unk_token)
    return spare[0] if spare else None
