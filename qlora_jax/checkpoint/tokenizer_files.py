"""The tokenizer in a folder of Hugging Face's files.

`tokenizer.json` is what runs: normalizer, pre-tokenizer, model, added tokens, post-processor and decoder are those of that
file, as the tokenizers library reads it. No class of transformers takes part. Many of them build another pipeline around the
vocabulary (`LlamaTokenizer` beside a byte-level file gives other ids, without an error), and which class is taken depends on
the version and on the model_type beside the file. The other files only give names, texts and options:

    tokenizer_config.json      the named tokens (bos_token, eos_token …), the chat template, options
    special_tokens_map.json    the named tokens, in older folders
    added_tokens.json          tokens that were added to older tokenizers, with their ids
    chat_template.jinja, additional_chat_templates/*.jinja, chat_template.json    chat templates
    config.json, generation_config.json    ids of BOS, EOS and padding, where the other files do not name these tokens

A folder without tokenizer.json, with a SentencePiece model or with vocab.json and merges.txt, is converted by transformers,
and the result is what runs. No Python file of a folder is ever run.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from qlora_jax.checkpoint.files import read_object, read_text
from qlora_jax.checkpoint.tokenizer_backend import guarded, read_backend
from qlora_jax.errors import CheckpointError, list_names, shortened

if TYPE_CHECKING:  # imported where it is used: transformers takes a second, and PyTorch with it where that is installed
    from transformers import PreTrainedTokenizerFast

__all__ = ["add_from_folder", "chat_template_of", "folder_tokenizer", "has_tokenizer"]

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Options of tokenizer_config.json that do not change the pipeline of tokenizer.json.
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "model_max_length": (int, float),
    "padding_side": str,
    "truncation_side": str,
    "clean_up_tokenization_spaces": bool,
    "split_special_tokens": bool,
}
# The tokens that transformers' classes name where the files do not: (BOS, EOS, unknown, padding).
_NAMED_BY_CLASS: dict[str, tuple[str | None, str, str, str | None]] = {
    "Llama": ("<s>", "</s>", "<unk>", None),
    "CodeLlama": ("<s>", "</s>", "<unk>", None),
    "GPT2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", None),
    "GPTNeoX": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|padding|>"),
    "Qwen2": (None, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "Gemma": ("<bos>", "<eos>", "<unk>", "<pad>"),
    "T5": (None, "</s>", "<unk>", "<pad>"),
}
_CLASS_BY_TYPE = {
    "llama": "Llama",
    "mistral": "Llama",
    "phi3": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3_text": "Gemma",
    "gemma3": "Gemma",
    "gpt_neox": "GPTNeoX",
    "t5": "T5",
}
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")  # of an added token
ENOUGH = 5000  # tokens of two characters and more, from which the absence of digits in them says something
_logger = logging.getLogger(__name__)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer, in any of the forms that `folder_tokenizer` reads."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def folder_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: has no tokenizer: expected tokenizer.json (or {', '.join(VOCABULARY_FILES[1:])}), "
            "found none of them."
        )
    config = read_object(folder / "tokenizer_config.json") or {}
    model = read_object(folder / "config.json") or {}
    if (folder / "tokenizer.json").is_file():
        backend, by_class = read_backend(folder), {}
        _compare_splitter(folder, backend)
    else:
        backend, by_class = _converted(folder, config, model)
    _add_missing(folder, backend, config)
    named = _named_tokens(folder, backend, config, model, by_class)
    return _wrapped(folder, backend, named, config)


def add_from_folder(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Give the tokenizer of a base what the folder of an adapter without a vocabulary holds: tokens, names, a chat template.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = read_object(folder / "tokenizer_config.json") or {}
    before = len(tokenizer)
    _add_missing(folder, tokenizer.backend_tokenizer, config)
    if len(tokenizer) > before:
        added = list_names(sorted(tokenizer.get_vocab(), key=lambda token: tokenizer.get_vocab()[token])[before:])
        _logger.info("%s: adds %d tokens to the tokenizer: %s", folder, len(tokenizer) - before, added)
    stated = {key: value for key, value in config.items() if key != "tokenizer_class"}  # names of the class are the base's
    for name, text in _named_tokens(folder, tokenizer.backend_tokenizer, stated, {}, {}).items():
        if name != "pad_token" or text != tokenizer.eos_token:  # for which another one was chosen, if there is one
            setattr(tokenizer, name, text)
    if (template := chat_template_of(folder)) is not None:
        tokenizer.chat_template = template


def chat_template_of(folder: Path) -> str | dict[str, str] | None:
    """Return the chat template of a folder; several ones by their names; None where it has none.

    Raises:
        CheckpointError: a template is no text.
    """
    default = read_text(folder / "chat_template.jinja")
    templates = {} if default is None else {"default": default}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path) or ""
    if templates:
        return default if list(templates) == ["default"] else templates
    stated = (read_object(folder / "tokenizer_config.json") or {}).get("chat_template")
    place = "tokenizer_config.json"
    if stated is None:
        stated, place = (read_object(folder / "chat_template.json") or {}).get("chat_template"), "chat_template.json"
    if isinstance(stated, list) and all(isinstance(item, dict) for item in stated):
        stated = {item.get("name"): item.get("template") for item in stated}
    texts = list(stated.items()) if isinstance(stated, dict) else [("default", stated)]
    if stated is not None and not all(isinstance(text, str) for pair in texts for text in pair):
        raise CheckpointError(f"{folder / place}: chat_template: expected a text, found a {type(stated).__name__}.")
    return cast(str | dict[str, str] | None, stated)


def _compare_splitter(folder: Path, backend: Tokenizer) -> None:
    """Warn where the vocabulary was trained on single digits, and the pre-tokenizer does not split them off.

    Where transformers converts a GGUF file, it writes GPT-2's pre-tokenizer, whatever the file names. A large vocabulary
    that was trained with GPT-2's has tokens that join a digit to another one or to a space. The file runs nevertheless.
    """
    split = backend.pre_tokenizer
    if not isinstance(split, pre_tokenizers.ByteLevel) or not split.use_regex:  # pyright: ignore[reportAttributeAccessIssue]
        return
    joined = [token for token in backend.get_vocab(with_added_tokens=False) if len(token) > 1]
    if len(joined) >= ENOUGH and not any(letter in "0123456789" for token in joined for letter in token):
        _logger.warning(
            "%s: splits texts as GPT-2 does, but its vocabulary was trained on single digits (no token joins a digit to "
            "anything). Digits after spaces may get other tokens than in training, as after a conversion from GGUF by "
            "transformers; the tokenizer.json of the original model, or the GGUF file, gives the right ones",
            folder / "tokenizer.json",
        )


def _converted(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer that transformers makes of other files, and the tokens that its class names.

    transformers sees a folder of links to the data files, without the fields that name Python files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = config.get("tokenizer_class")
    known = isinstance(name, str) and tokenizer_class_from_name(name) is not None
    if isinstance(name, str) and not known:
        _logger.warning(
            "%s: tokenizer_class %s is Python code that is not part of transformers, and is not run; the vocabulary is read "
            "without it",
            folder,
            name,
        )
    clean = {key: value for key, value in config.items() if key != "auto_map" and (key != "tokenizer_class" or known)}
    with tempfile.TemporaryDirectory(prefix="qlora-jax-tokenizer-") as temporary:
        for file in (*VOCABULARY_FILES[1:], "merges.txt", "added_tokens.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                os.symlink((folder / file).absolute(), Path(temporary) / file)
        (Path(temporary) / "tokenizer_config.json").write_text(json.dumps(clean), encoding="utf-8")
        if isinstance(kind := model.get("model_type"), str):
            (Path(temporary) / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
        found: list[Any] = []

        def convert() -> Tokenizer:
            found.append(AutoTokenizer.from_pretrained(temporary, local_files_only=True, trust_remote_code=False))
            return getattr(found[0], "backend_tokenizer", None)  # pyright: ignore[reportReturnType]

        backend = guarded(folder, convert)
    if not isinstance(found[0], PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{folder}: expected a tokenizer that the tokenizers library can run (a tokenizer.json), found "
            f"{type(found[0]).__name__}."
        )
    named = {name: str(token) for name, token in found[0].special_tokens_map.items() if isinstance(token, (str, AddedToken))}
    return backend, named


def _add_missing(folder: Path, backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json or added_tokens.json lists beyond the vocabulary, if they get their ids."""
    listed = {index: token for index, token in (_object(config, "added_tokens_decoder")).items() if index.isdecimal()} or {
        str(index): token for token, index in (read_object(folder / "added_tokens.json") or {}).items()
    }
    vocabulary = backend.get_vocab()
    lost: list[str] = []
    for index in sorted(listed, key=lambda index: (len(index), index)):
        token, text = listed[index], _text(listed[index])
        if text is None or text in vocabulary:
            continue
        if index != str(max(vocabulary.values(), default=-1) + 1):
            lost.append(text)
            continue
        flags = {key: token[key] for key in FLAGS if token.get(key) in (True, False)} if isinstance(token, dict) else {}
        backend.add_tokens([AddedToken(text, **({"special": True, "normalized": False} | flags))])
        vocabulary[text] = int(index)
    if lost:
        _logger.warning(
            "%s: the tokenizer's vocabulary does not have %d tokens that are listed beside it: %s",
            folder,
            len(lost),
            list_names(lost),
        )


def _named_tokens(
    folder: Path, backend: Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any], by_class: Mapping[str, str]
) -> dict[str, str]:
    """Return the named tokens, from the first place that names one of the vocabulary: the tokenizer's files, its class, the
    ids in the files of the model."""
    beside = read_object(folder / "special_tokens_map.json") or {}
    # Folders of older versions of transformers have no added_tokens_decoder; the map was then the later word.
    places: list[Mapping[str, Any]] = [config, beside] if "added_tokens_decoder" in config else [beside, config]
    name = config.get("tokenizer_class")
    if isinstance(name, str):
        name = name.removesuffix("Fast").removesuffix("Tokenizer")
    defaults = _defaults(backend, name if isinstance(name, str | None) else "", model.get("model_type"))
    generation = read_object(folder / "generation_config.json") or {}
    ids = {
        f"{key}_token": _first(model.get(f"{key}_token_id", generation.get(f"{key}_token_id")))
        for key in ("bos", "eos", "pad")
    }
    by_id: dict[str, str | None] = {key: backend.id_to_token(index) for key, index in ids.items() if index is not None}
    vocabulary = backend.get_vocab()
    named: dict[str, str] = {}
    for key in NAMED:
        known: list[Mapping[str, Any]] = [*places, by_class, defaults, by_id]
        texts = [_text(place.get(key)) for place in known]
        if found := next((text for text in texts if text is not None and text in vocabulary), None):
            named[key] = found
        stated = next(filter(None, (place.get(key) for place in places)), None)
        if stated is not None and _text(stated) not in vocabulary:
            instead = f"{found!r} is used" if found else "none is used"
            _logger.warning("%s: %s %s is no token of the vocabulary: %s", folder, key, shortened(stated), instead)
    return named


def _defaults(backend: Tokenizer, name: str | None, kind: object) -> dict[str, str | None]:
    """Return the tokens that a class of transformers names, by its name, or by the model's type if the files name no class.

    A named token is found within texts too. transformers 5 takes no class by the type alone, so the tokens of such a class
    are named only if tokenizer.json itself finds them within texts: `<s>` in a text has the ids that transformers gives it.
    """
    by_type = _CLASS_BY_TYPE.get(kind) if isinstance(kind, str) and name is None else None
    tokens = _NAMED_BY_CLASS.get(name or by_type or "", ())
    if by_type is not None:
        found = {token.content for token in backend.get_added_tokens_decoder().values()}
        tokens = [token if token in found else None for token in tokens]
    return dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), tokens, strict=False))


def _wrapped(
    folder: Path, backend: Tokenizer, named: Mapping[str, str], config: Mapping[str, Any]
) -> "PreTrainedTokenizerFast":
    """Return the tokenizer in the class that the rest of the package, transformers' templates and TRL know."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = backend.get_vocab()
    options = {key: config[key] for key, kind in OPTIONS.items() if isinstance(config.get(key), kind)}
    if {options.get("padding_side", "left"), options.get("truncation_side", "left")} - {"left", "right"}:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: padding_side, truncation_side: expected left or right.")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = {key: value for key, value in config.items() if key.endswith("_token") and key not in NAMED}
    if isinstance(extra, dict):
        extra, more = [], more | extra
    texts = [text for item in extra if (text := _text(item)) in vocabulary] if isinstance(extra, list) else []
    more = {key: _text(value) for key, value in more.items() if _text(value) in vocabulary}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template_of(folder),
        extra_special_tokens=texts,
        model_specific_special_tokens=more,
        **named,
        **options,
    )
    # The constructor puts a post-processor where the file has none, and "repairs" some pre-tokenizers.
    ours = tokenizer.backend_tokenizer
    ours.normalizer, ours.pre_tokenizer = backend.normalizer, backend.pre_tokenizer  # pyright: ignore
    ours.decoder, ours.post_processor = backend.decoder, backend.post_processor  # pyright: ignore
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _text(token: object) -> str | None:
    """Return the text of a token, which the files hold as it is or as `content` of an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _first(value: object) -> int | None:
    """Return an id, or the first of a list of ids; None where it is neither."""
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < 2**32 else None
