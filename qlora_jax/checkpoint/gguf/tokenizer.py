"""Builds a tokenizer from the metadata of a GGUF file, of either kind that llama.cpp knows for the supported models.

`tokenizer.ggml.model` "gpt2", byte-level BPE, has four steps. The metadata hold all of them except the second, of which they
hold the name only (`tokenizer.ggml.pre`, splits.py):

    1. added tokens   are found in the raw text first and never split: those of type CONTROL (special) or USER_DEFINED
    2. pre-tokenizer  a regular expression that cuts the text between them into words
    3. merges         each word's bytes, written in an alphabet of 256 printable characters, are joined pair
                      by pair in the order of the list; the results are looked up in the vocabulary
    4. post-processor adds BOS and EOS where the file says so

Bytes that the vocabulary does not have are dropped: SmolLM2's has no token for 21 of the 256 (control characters, and bytes
that occur in UTF-8 only beyond plane 3), so that text with those bytes is not restored by decoding. This is a property of
the model.

"llama" is SentencePiece's BPE: text is not cut into words, spaces are written as U+2581, one space is put before each
stretch of text, and characters that the vocabulary does not have become tokens of their bytes. The file has scores in place
of merges: two neighbours are joined where the vocabulary has the result, the result with the highest score first. A list of
all such pairs in that order is equivalent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.splits import OTHER_KINDS, SPLITS, Split, pre_tokenizer
from qlora_jax.checkpoint.gguf.vocabulary import conclude_eos, conclude_pre, warn_of_ends
from qlora_jax.errors import CheckpointError, shortened

if TYPE_CHECKING:  # imported where it is used: transformers takes a second, and PyTorch with it where that is installed
    from transformers import PreTrainedTokenizerFast

__all__ = ["gguf_tokenizer"]

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SPACE = "\u2581"


def gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a file, with its chat template.

    Raises:
        CheckpointError: a kind of tokenizer or a pre-tokenizer that is not known, or entries that do not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = read_header(path).metadata
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    architecture = str(metadata.get("general.architecture"))
    _check_metadata(path, facts)
    warn_of_ends(path, metadata)
    if facts.get("eos_token_id") is None:
        facts["eos_token_id"] = conclude_eos(path, facts)
    split = None
    if facts["model"] == "llama":
        backend = _sentencepiece(facts, reversed_order=architecture.startswith("gemma"))
    else:
        stated = facts.get("pre")
        split = SPLITS[stated if isinstance(stated, str) and stated in SPLITS else conclude_pre(path, facts, architecture)]
        backend = _byte_level(path, facts, split)
    tokens: list[str] = facts["tokens"]
    vocabulary = backend.get_vocab()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, facts.get("token_type", []), strict=False)
            if kind in (CONTROL, USER_DEFINED) and token in vocabulary
        ]
    )
    named: dict[str, Any] = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (index := facts.get(f"{key}_token_id")) is not None:
            named[f"{name}_token"] = tokens[index]
    add_bos = split is None or split.add_bos
    backend.post_processor = _post_processor(  # pyright: ignore[reportAttributeAccessIssue]
        backend,
        named.get("bos_token") if facts.get("add_bos_token", add_bos) else None,
        named.get("eos_token") if facts.get("add_eos_token", False) else None,
    )
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        named["chat_template"] = template
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.name_or_path = str(path)
    return tokenizer


def _byte_level(path: Path, facts: Mapping[str, Any], split: Split) -> Tokenizer:
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(facts["tokens"])},
            merges=[tuple(merge.split(" ")) for merge in facts["merges"]],
            ignore_merges=split.whole_words,
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(split)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(facts: Mapping[str, Any], *, reversed_order: bool) -> Tokenizer:
    """Return SentencePiece's BPE. With `reversed_order` merges are in the order of the vocabulary, as in Gemma, whose scores
    are no scores."""
    tokens, kinds = facts["tokens"], facts["token_type"]
    # Gemma's runs of spaces are stored as spaces and USER_DEFINED; its model has them as ordinary results of merges.
    spaces = {index for index, token in enumerate(tokens) if len(token) > 1 and not token.strip(" ")}
    vocabulary = {SPACE * len(token) if index in spaces else token: index for index, token in enumerate(tokens)}
    scores = [-float(index) for index in range(len(tokens))] if reversed_order else facts["scores"]
    joined = [item for item in vocabulary.items() if len(item[0]) > 1 and (kinds[item[1]] == NORMAL or item[1] in spaces)]
    merges = [
        (token[:cut], token[cut:])
        for token, _ in sorted(joined, key=lambda item: (-scores[item[1]], item[1]))
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = facts.get("unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = facts.get("add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])  # pyright: ignore
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend


def _check_metadata(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError where an entry that the other functions read is missing or of another kind."""
    model, pre = facts.get("model"), facts.get("pre")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece's BPE), found "
            f"{shortened(model)}. Take the tokenizer from the Hugging Face folder or hub id of the model instead."
        )
    problems: list[str] = []
    if model == "gpt2" and pre is not None and (not isinstance(pre, str) or pre in OTHER_KINDS):
        problems.append(
            "tokenizer.ggml.pre: expected the name of a pre-tokenizer of byte-level BPE, such as llama-bpe, qwen2 or gpt-2; "
            f"found {shortened(pre)}."
        )
    kinds: dict[str, tuple[type | tuple[type, ...], str]] = {"tokens": (str, "strings")}
    kinds["token_type"] = (int, "numbers")
    kinds |= {"merges": (str, "strings")} if model == "gpt2" else {"scores": ((int, float), "numbers")}
    for key, (kind, what) in kinds.items():
        value = facts.get(key)
        if value is None and key == "token_type" and model == "gpt2":
            continue
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            found = "nothing" if value is None else f"a {type(value).__name__} of other things"
            problems.append(f"tokenizer.ggml.{key}: expected a list of {what}, found {found}.")
    if not problems:
        count = len(facts["tokens"])
        if (distinct := len(set(facts["tokens"]))) != count:
            problems.append(f"tokenizer.ggml.tokens: expected {count} different tokens, found {distinct}.")
        if bad := [merge for merge in facts.get("merges", []) if merge.count(" ") != 1 and model == "gpt2"]:
            problems.append(f"tokenizer.ggml.merges: expected pairs, found {shortened(bad[0])} and {len(bad) - 1} more.")
        for key in ("token_type", "scores"):
            if isinstance(facts.get(key), list) and (given := len(facts.get(key, facts["tokens"]))) != count:
                problems.append(f"tokenizer.ggml.{key}: expected {count}, one for each token, found {given}.")
        for key in ("bos", "eos", "unknown", "padding"):
            index = facts.get(f"{key}_token_id", 0)
            if type(index) is not int or not 0 <= index < count:
                problems.append(f"tokenizer.ggml.{key}_token_id: expected a number below {count}, found {shortened(index)}.")
    if problems:
        raise CheckpointError.of(path, problems)


def _post_processor(backend: Tokenizer, bos: str | None, eos: str | None) -> processors.PostProcessor:
    if bos is None and eos is None:
        # Changes no ids, but keeps transformers from adding its own.
        return processors.ByteLevel(trim_offsets=False)
    before, after = (f"{bos} " if bos else ""), (f" {eos}" if eos else "")
    return processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B:1{after}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None],
    )
