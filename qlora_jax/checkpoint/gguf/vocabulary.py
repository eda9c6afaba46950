"""What a GGUF file does not say about its tokenizer, concluded from its vocabulary.

Files of older converters have no `tokenizer.ggml.pre` (or "default"), which names the pre-tokenizer of byte-level BPE, no id
of EOS, or no id for the end of a turn; those of newer converters may have a name that is not known here. Each conclusion
comes with a warning.

    pre-tokenizer   A token is made by merges within one word. So a pre-tokenizer that cuts tokens of the vocabulary in two
                    is not the one that the vocabulary was trained with, and of those that cut none, the finest is. Where
                    the vocabulary is too small to tell, its special tokens and the architecture decide.
    EOS             the first of `END_NAMES` in the vocabulary
    end of a turn   all of `TURN_NAMES` in the vocabulary, as in llama.cpp (src/llama-vocab.cpp), where the file names none
                    and EOS is none
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from qlora_jax.checkpoint.gguf.splits import named_pre_tokenizer
from qlora_jax.errors import CheckpointError

__all__ = ["TURN_NAMES", "conclude_eos", "conclude_pre", "end_ids", "warn_of_ends"]

TURN_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|end_of_turn|>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
    "<|return|>",
)
END_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
    *TURN_NAMES,
)
UNNAMED: tuple[object, ...] = (None, "", "default")  # values of `tokenizer.ggml.pre` that name none
# From the finest to the coarsest: each of them cuts texts that those after it leave whole. deepseek-v3 differs from
# llama-bpe in words with marks (Hindi, Thai) and in Chinese: a vocabulary that neither cuts is more often llama-bpe's.
FINEST_FIRST = ("deepseek-coder", "deepseek-llm", "tekken", "qwen2", "smollm", "gpt-4o", "llama-bpe", "deepseek-v3", "gpt-2")
SAMPLE = 20_000  # tokens that are tried
ENOUGH = 500  # tokens with anything to cut, from which the vocabulary is large enough
TOLERATED = 1e-3  # part of the tokens: some vocabularies were given words by hand
_logger = logging.getLogger(__name__)
# (a token that only these vocabularies have, or an architecture; its pre-tokenizer)
BY_TOKEN = {
    "<|begin_of_text|>": "llama-bpe",
    "<|eot_id|>": "llama-bpe",
    "<|vision_start|>": "qwen2",
    "[TOOL_CALLS]": "tekken",
    "<jupyter_start>": "smollm",
}
BY_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2", "smollm3": "llama-bpe", "gptneox": "gpt-2"}


def conclude_pre(place: Path, facts: Mapping[str, Any], architecture: str) -> str:
    """Return the name of the pre-tokenizer that fits a vocabulary of byte-level BPE, and warn.

    Args:
        place: the file, for the message.
        facts: the entries of `tokenizer.ggml`. Their name of the pre-tokenizer is none that is known.
        architecture: the value of `general.architecture`.

    Raises:
        CheckpointError: the file has a name that is not known, and the vocabulary is too small to tell.
    """
    stated, tokens = facts.get("pre"), facts["tokens"]
    words = list(_cuttable(tokens, facts.get("token_type")))
    if len(words) >= ENOUGH:
        words = words[:: -(-len(words) // SAMPLE)]
        cut = {name: _count_cut(named_pre_tokenizer(name), words) for name in FINEST_FIRST}
        fewest = min(cut.values())
        pre = next(name for name in FINEST_FIRST if cut[name] <= max(fewest, TOLERATED * len(words)))
        how = f"which cuts {cut[pre]} of {len(words)} tokens of the vocabulary"
    elif stated not in UNNAMED:
        # A wrong pre-tokenizer gives tokens that look right but that the model was not trained on.
        raise CheckpointError(
            f"{place}: tokenizer.ggml.pre: expected the name of a pre-tokenizer that is known, such as llama-bpe, qwen2 or "
            f"gpt-2, found {stated!r}, and the vocabulary is too small to find it out. Take the tokenizer from the Hugging "
            "Face folder or hub id of the model instead."
        )
    else:
        known = set(tokens)
        pre = next((name for token, name in BY_TOKEN.items() if token in known), BY_ARCHITECTURE.get(architecture, "gpt-2"))
        how = "by its special tokens and its architecture"
    what, note = f"names a pre-tokenizer {stated!r} that is not known", ""
    if stated in UNNAMED:
        what, note = "does not name its pre-tokenizer", "; files of newer converters name it"
    _logger.warning("%s: %s (tokenizer.ggml.pre): %r is used, %s%s", place, what, pre, how, note)
    return pre


def conclude_eos(place: Path, facts: Mapping[str, Any]) -> int | None:
    """Return the id of EOS of a file that names none, and warn; None where no token has a usual name."""
    ids = {token: index for index, token in reversed(list(enumerate(facts["tokens"])))}
    name = next((name for name in END_NAMES if name in ids), None)
    if name is None:
        return None
    _logger.warning("%s: names no end of a text (tokenizer.ggml.eos_token_id): %r is used", place, name)
    return ids[name]


def end_ids(metadata: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """Return (the ids of a file's tokens that end a text, a turn or a message; the tokens that are known by name alone)."""
    stated = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if stated[1] is not None or not isinstance(tokens, list):
        return stated, []
    eos = stated[0]
    if type(eos) is int and 0 <= eos < len(tokens) and tokens[eos] in TURN_NAMES:
        return stated, []
    found = [index for index, token in enumerate(tokens) if isinstance(token, str) and token in TURN_NAMES]
    return [*stated, *found], [tokens[index] for index in found]


def warn_of_ends(place: Path, metadata: Mapping[str, Any]) -> None:
    """Log a warning where the end of a turn is known by the name of its token alone."""
    _, names = end_ids(metadata)
    if names:
        listed = ", ".join(map(repr, names))
        _logger.warning("%s: names no end of a turn (tokenizer.ggml.eot_token_id): answers also end with %s", place, listed)


def _cuttable(tokens: Sequence[str], kinds: Sequence[int] | None) -> Iterator[str]:
    """Yield the texts of the ordinary tokens that hold more than one kind of character, or several digits."""
    octets = {character: octet for octet, character in _printable()}
    for index, token in enumerate(tokens):
        if kinds is not None and kinds[index] != 1:
            continue
        try:
            text = bytes(octets[character] for character in token).decode("utf-8")
        except (KeyError, UnicodeDecodeError):  # a part of a character, or no byte-level token
            continue
        if len(text) > 1 and not (text.isalpha() and text[1:].islower()):
            yield text


def _printable() -> Iterator[tuple[int, str]]:
    """Yield the (byte, character) of the alphabet of byte-level BPE: bytes that are no printable character of Latin-1 are
    represented by the characters from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [octet for octet in range(256) if octet not in shown]
    yield from ((octet, chr(octet)) for octet in shown)
    yield from ((octet, chr(256 + index)) for index, octet in enumerate(hidden))


def _count_cut(split: pre_tokenizers.PreTokenizer, words: Sequence[str]) -> int:
    return sum(len(split.pre_tokenize_str(word)) > 1 for word in words)
