"""The tokenizer of a checkpoint: read from Hugging Face's files (tokenizer_files.py), or built from a GGUF file's metadata
(gguf/tokenizer.py).

Padding. Where labels are masked by token and the padding token is EOS, EOS is masked too, and the model never learns to
stop. `load_tokenizer` therefore chooses another padding token from the vocabulary, by the first rule that finds one: a token
that was made for it (`<pad>`, `<|finetune_right_pad_id|>` …), a special token that is reserved or unused, the unknown token,
or another special token that is not part of the chat template. BOS is never chosen, nor a token that ends a text or a turn:
what is trained or masked by the padding token would have no end. The vocabulary is never extended, since the model has no
embedding for more tokens. EOS remains only where no other token exists (GPT-2 has one special token); it is saved as the
padding token only if the files called it so.

Tokens without an embedding. A tokenizer may have a few tokens more than the embedding has rows: all sizes of Gemma 3 share a
tokenizer with a token for images, and a padding token is often added without resizing the model. Such a tokenizer is used;
only the text in which such a token occurs is refused (data/token_ids.py).
"""

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.tokenizer import gguf_tokenizer
from qlora_jax.checkpoint.gguf.vocabulary import TURN_NAMES, end_ids
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.checkpoint.tokenizer_files import folder_tokenizer
from qlora_jax.errors import CheckpointError, list_names, shortened
from qlora_jax.models.bounds import token_ids

if TYPE_CHECKING:  # imported where it is used: transformers takes a second, and PyTorch with it where that is installed
    from transformers import PreTrainedTokenizerFast


__all__ = ["check_tokenizer", "load_tokenizer", "save_tokenizer", "stated_ends", "stop_ids", "warn_of_unknown_ends"]

FEW, MANY = 16, 256  # tokens without an embedding, of the vocabulary and with added ones, that a tokenizer may have
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endofpad|>")
_logger = logging.getLogger(__name__)


def load_tokenizer(
    name: str | Path | Snapshot, revision: str | None = None, *, model: Snapshot | None = None
) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a model, whose padding token is not EOS where the vocabulary has another one for it.

    Args:
        name: a folder, a .gguf file, a repository id, or a snapshot that was resolved before.
        revision: branch, tag or commit of a repository.
        model: the base model, where the tokenizer is that of an adapter: no token that ends its texts becomes the padding
            token. None: `name` is the base.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    path = resolve(name, revision).path
    tokenizer = gguf_tokenizer(path) if path.is_file() else folder_tokenizer(path)
    _separate_padding(tokenizer, stated_ends(path if model is None else resolve(model).path, tokenizer))
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
    # These fields say how this process found the files, which is no property of the tokenizer. Nor is EOS in the place of a
    # padding token that the files do not name.
    chosen = tokenizer.pad_token == tokenizer.eos_token and tokenizer.init_kwargs.get("pad_token") is None
    for key in ("is_local", "local_files_only", *(("pad_token",) if chosen else ())):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    names = folder / "special_tokens_map.json"  # of transformers 4
    if chosen and (named := read_object(names)) is not None:
        named.pop("pad_token", None)
        names.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_ids(base: str | Path | Snapshot, tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Return the ids of all tokens that a model calls the end of a text, which often includes the end of a turn.

    Ids that are no token of the model are left out; `warn_of_unknown_ends` says so.

    Args:
        base: the files of the model; config.json and generation_config.json are read where they exist. Of a GGUF file that
            names no end of a turn, the tokens with the usual names are taken; `load_tokenizer` warns of it.

    Raises:
        CheckpointError: one of these files is damaged.
    """
    path = resolve(base).path
    size = _known_ids(path, tokenizer)
    return frozenset(index for index in stated_ends(path, tokenizer) if index < size)


def warn_of_unknown_ends(base: Snapshot, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Log a warning where a model calls ids the end of a text that are none of its tokens."""
    size = _known_ids(base.path, tokenizer)
    if beyond := sorted(index for index in stated_ends(base.path, tokenizer) if index >= size):
        _logger.warning(
            "%s: names as the end of a text %s, which is no token of this model (ids are below %d): left out",
            base.path,
            list_names([str(index) for index in beyond]),
            size,
        )


def _known_ids(path: Path, tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the number below which ids are tokens, or rows of the embedding, of a model."""
    size = (read_object(path / "config.json") or {}).get("vocab_size") if path.is_dir() else None
    return max(len(tokenizer), size) if type(size) is int else len(tokenizer)


def stated_ends(path: Path, tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Return the ids that the files of a model name as the end of a text, and EOS of its tokenizer."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {cast(int, tokenizer.eos_token_id)}
    if path.is_file():
        return ids.union(
            *(token_ids(path, {"eot_token_id": index}, "eot_token_id") for index in end_ids(read_header(path).metadata)[0])
        )
    for file in (path / "config.json", path / "generation_config.json"):
        ids.update(token_ids(file, read_object(file) or {}))
    return ids


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", config: Mapping[str, Any], ends: Collection[int] = ()) -> None:
    """Compare the vocabulary with the rows of the embedding of the model of this config.json.

    A padding token without a row is replaced by another token.

    Args:
        ends: the ids that end a text of the model, of which none becomes the padding token.

    Raises:
        CheckpointError: so many tokens have no row that the tokenizer is that of another model, or those have none that
            every text begins or ends with.
    """
    part = config.get("text_config")
    size = config.get("vocab_size", part.get("vocab_size") if isinstance(part, dict) else None)
    if type(size) is not int:
        raise CheckpointError(f"config.json: expected a number vocab_size, found {shortened(size)}.")
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
        tokenizer.pad_token = _padding_choice(tokenizer, ends, size) or tokenizer.eos_token
    _logger.info("%s: %d tokens have no embedding in this model: %s", place, len(beyond), list_names(list(beyond)))


def _separate_padding(tokenizer: "PreTrainedTokenizerFast", ends: Collection[int]) -> None:
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    choice = _padding_choice(tokenizer, ends)
    if choice is not None:
        tokenizer.pad_token = choice
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _padding_choice(tokenizer: "PreTrainedTokenizerFast", ends: Collection[int], size: int | None = None) -> str | None:
    """Return the token of the first rule in this module's docstring, with an id below `size` where that is given.

    Args:
        ends: the ids that end a text of the model; tokens with the usual names of ends are none either.
    """
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if size is None or index < size}
    taken = {str(tokenizer.eos_token), str(tokenizer.bos_token), *TURN_NAMES}
    taken.update(token for token, index in vocabulary.items() if index in ends)
    for name in PAD_NAMES:
        if name in vocabulary and name not in taken:
            return name
    templates = str(tokenizer.chat_template or "")  # one, or several by their names
    added = [item for item in sorted(tokenizer.added_tokens_decoder.items()) if str(item[1]) in vocabulary]
    spare = [str(token) for _, token in added if token.special and str(token) not in taken and str(token) not in templates]
    for token in spare:
        if re.search("reserved|unused", token, re.IGNORECASE):
            return token
    if tokenizer.unk_token in vocabulary and str(tokenizer.unk_token) not in taken:
        return str(tokenizer.unk_token)
    return spare[0] if spare else None
