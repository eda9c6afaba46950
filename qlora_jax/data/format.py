"""One record → token ids, and for each token whether it is learned.

1. The row is parsed into a conversation (schemas.py) and rendered into pieces of text with the character
   ranges of the answers (render.py).
2. Each piece is tokenized. A token is learned when its characters overlap an answer's. Nothing is ever
   compared with the pad token, so pad = end-of-sequence (EOS) changes nothing.
3. Beginning of sequence: a chat template writes its own; other renderings get what the tokenizer puts
   before a text.
4. A sequence that ends in an answer ends in EOS, learned. If the chat template closes the last answer with
   another token, EOS follows that directly. If the text closes it with EOS, nothing is added, and a line end
   after it stays.
5. A sequence that is too long is cut after the last answer token that fits (the last token, where the source is learned
   too). EOS is only where an answer ended: an answer that is cut has none, because the model would learn to stop within a
   word. A row of which nothing but EOS is learned teaches nothing (and an empty answer never did): encode_all leaves it out.
6. A text without turns that is too long can be split instead: into as few rows as hold it, of nearly equal length. Each
   token is learned in one of them. A row after the first starts with what the tokenizer puts before a text, or, if that is
   nothing, with the last token of the row before it, which is not learned again. EOS is at the end of the last one. A limit
   of the target cuts such a text too.
7. `source` and `target` limit the two parts of a sequence, before and from its first answer token, as the QLoRA
   authors' source_max_len and target_max_len do: of the source and of the target the first tokens stay.

The first token of a sequence is nobody's target: it is never marked as learned.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data.chat import chat_prompt
from qlora_jax.data.messages import Message
from qlora_jax.data.pieces import Piece, Span
from qlora_jax.data.records import DataError
from qlora_jax.data.render import Rendered, Template, alpaca_prompt, join_guanaco, render
from qlora_jax.data.schemas import parse
from qlora_jax.data.token_ids import NAME_EOS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a token belongs to.
PROMPT, ANSWER, EXCLUDED = np.int8(0), np.int8(1), np.int8(2)


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenized conversation. `loss_mask[i]`: token i is a target of the loss."""

    tokens: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n], False at 0
    conversation: int | None = None  # the number of its record, if other examples have turns of the same conversation

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Limits:
    """The most tokens of a whole sequence, of what comes before its first answer, and of the rest; None for no limit."""

    whole: int | None = None
    source: int | None = None
    target: int | None = None

    def __post_init__(self) -> None:
        if self.whole is not None and self.whole < 2:
            raise DataError(f"max_length: expected at least 2 tokens, a target and one before it, found {self.whole}")
        if self.source is not None and self.source < 1:
            raise DataError(f"source_max_length: expected at least 1 token, found {self.source}")
        if self.target is not None and self.target < 2:
            raise DataError(f"target_max_length: expected at least 2 tokens, one and the end, found {self.target}")
        if self.whole is not None and self.source is not None and self.source >= self.whole:
            raise DataError(f"source_max_length: expected less than max_length {self.whole}, found {self.source}")
        if self.whole is not None and self.target is not None and self.target > self.whole:
            raise DataError(f"target_max_length: expected at most max_length {self.whole}, found {self.target}")

    def most(self, source: int) -> float:
        """Return the most tokens of a sequence whose first answer token has so many before it; infinite for no limit."""
        whole = math.inf if self.whole is None else self.whole
        return min(whole, math.inf if self.target is None else source + self.target)

    def __str__(self) -> str:
        parts = {"": self.whole, " before the answer": self.source, " from the answer on": self.target}
        return ", ".join(f"{limit:,} tokens{where}" for where, limit in parts.items() if limit is not None)


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Encoded:
    """The examples of a text, more than one if it was split, and what became of it on the way."""

    examples: tuple[Example, ...]
    full_length: int  # tokens before any cut
    long: bool  # it was over one of the limits
    teaches: bool  # at least one token besides EOS is learned

    @property
    def example(self) -> Example:
        """The first example."""
        return self.examples[0]


def encode(
    record: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template = "auto",
    train_on_source: bool = False,
    max_length: int | None = None,
) -> Example:
    """The tokens of one record, cut to `max_length` if given. `train_on_source` learns the prompts too.

    Raises:
        DataError: the record cannot be used, or the chat template makes several rows of it, which `encode_all` returns.
    """
    (rendered,) = render([parse(record)], tokenizer, template)
    if len(rendered) > 1:
        raise DataError(
            f"encode: expected a record that becomes one row, found {len(rendered)} rows, because the chat template writes "
            "earlier turns otherwise than the last one; encode_all returns all of them"
        )
    return encode_rendered(rendered, tokenizer, train_on_source=train_on_source, limits=Limits(max_length))[0].example


def encode_prompt(
    messages: str | Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: Template = "auto",
    tools: Sequence[Any] = (),
) -> np.ndarray:
    """int32 tokens of a prompt, up to where the answer starts: what generation continues.

    They are the first tokens of `encode` for the same conversation and template. "auto" is the chat template
    where the tokenizer has one, else guanaco. A string is one user message. `tools` may be called by the answer; only
    a chat template writes them.

    Raises:
        DataError: no message, an unknown template, or messages or tools that the template cannot write.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise DataError("prompt: expected at least one message, found none")
    if template == "auto":
        template = "guanaco" if tokenizer.chat_template is None else "chat"
    if tools and template != "chat":
        raise DataError(f"template {template!r}: expected no tools, found {len(tools)}; choose the template chat")
    if template == "chat":
        text, _ = chat_prompt(messages, tokenizer, tools)
    elif template == "guanaco":
        text = join_guanaco(messages).text + " ### Assistant:"
    elif template in ("alpaca", "plain"):
        if [message["role"] for message in messages] != ["user"]:
            raise DataError(f"template {template!r}: expected one user message, found {len(messages)} messages")
        text = alpaca_prompt(messages[0]["content"]) if template == "alpaca" else messages[0]["content"]
    else:
        raise DataError(f"template: expected auto, chat, guanaco, alpaca or plain, found {template!r}")
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [] if template == "chat" else start_tokens(tokenizer)
    return np.asarray(_missing_start(tokens, start) + tokens, np.int32)


def encode_rendered(
    rendered: Sequence[Rendered],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_on_source: bool = False,
    limits: Limits = NO_LIMITS,
    split: bool = False,
) -> list[Encoded]:
    """Tokens and masks of rendered texts, by one call of the tokenizer; `split`: long texts without turns become rows."""
    _check_tokenizer(tokenizer)
    pieces = [piece for record in rendered for piece in record.pieces]
    tokenized = iter(_tokenize(pieces, tokenizer))
    start = start_tokens(tokenizer)
    encoded = []
    for record in rendered:
        parts = [next(tokenized) for _ in record.pieces]
        first = next((tokens.tolist() for tokens, _ in parts if len(tokens)), [])
        before = [] if record.template == "chat" else _missing_start(first, start)
        parts = [(np.asarray(before, np.int32), np.full(len(before), PROMPT)), *parts]
        tokens, kinds = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        tokens, kinds = _closed(tokens, kinds, record, tokenizer, train_on_source)
        if split and _is_text(record) and limits.whole is not None and len(tokens) > limits.whole and limits.target is None:
            own = len(start) if tokens[: len(start)].tolist() == start else 0
            encoded.append(Encoded(_split(tokens, kinds == ANSWER, own, limits.whole), len(tokens), True, True))
        else:
            encoded.append(_limited(tokens, kinds, tokenizer.eos_token_id, train_on_source, limits))
    return encoded


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before a text by itself: the beginning-of-sequence token or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _missing_start(tokens: Sequence[int], start: list[int]) -> list[int]:
    """The beginning of sequence that a text lacks: none if whoever wrote the text has put it there."""
    return [] if list(tokens[: len(start)]) == start else start


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer: expected a fast one (with tokenizer.json), which knows the characters of a token, "
            f"found {type(tokenizer).__name__}"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer: expected an end-of-sequence token, found none. {NAME_EOS}")


def _tokenize(pieces: Sequence[Piece], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    if not pieces:
        return []
    batch = tokenizer(
        [piece.text for piece in pieces],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        # Length is our business, and is reported once; the tokenizer would warn of its own limit.
        verbose=False,
    )
    return [
        (np.asarray(tokens, np.int32), _kinds(np.asarray(offsets, np.int64).reshape(-1, 2), piece))
        for tokens, offsets, piece in zip(batch["input_ids"], batch["offset_mapping"], pieces, strict=True)
    ]


def _kinds(offsets: np.ndarray, piece: Piece) -> np.ndarray:
    """int8 [n]: the kind of each token: of an answer, of an excluded range, or of the prompt."""
    if piece.answers == ((0, len(piece.text)),):
        return np.full(len(offsets), ANSWER)
    kinds = np.full(len(offsets), PROMPT)
    kinds[_overlaps(offsets, piece.excluded)] = EXCLUDED
    kinds[_overlaps(offsets, piece.answers)] = ANSWER
    return kinds


def _overlaps(offsets: np.ndarray, ranges: Sequence[Span]) -> np.ndarray:
    """bool [n]: the tokens whose characters overlap a range."""
    first, last = offsets[:, 0], offsets[:, 1]
    within = np.zeros(len(offsets), bool)
    for start, end in ranges:
        within |= (first < end) & (last > start)
        # Tokenizers that trim offsets give a token of white space no characters, at the place where it ended.
        within |= (first == last) & (start < first) & (first <= end)
    return within


def _closed(
    tokens: np.ndarray, kinds: np.ndarray, record: Rendered, tokenizer: "PreTrainedTokenizerBase", train_on_source: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequence with EOS after its last answer, if it ends in one, or after a text that is learned as a whole."""
    learned = np.flatnonzero(kinds == ANSWER)
    if record.ends_in_answer and len(learned):
        end = int(learned[-1]) + 1
    elif train_on_source and len(tokens) and not len(learned) and not (kinds == EXCLUDED).any():
        end = len(tokens)
    else:
        return tokens, kinds
    # The text may end in EOS and a line end, which is learned if the whole text is.
    closed = bool(tokenizer.eos_token) and record.pieces[-1].text.rstrip().endswith(str(tokenizer.eos_token))
    if closed and ((kinds == ANSWER) & (tokens == tokenizer.eos_token_id)).any():
        return tokens, kinds
    return _end_with_eos(tokens, kinds, end, tokenizer.eos_token_id)


def _is_text(record: Rendered) -> bool:
    """Return whether a record is one text without turns, all of which is learned."""
    return (
        record.template == "plain"
        and len(record.pieces) == 1
        and record.pieces[0].answers == ((0, len(record.pieces[0].text)),)
    )


def _split(tokens: np.ndarray, answer: np.ndarray, start: int, most: int) -> tuple[Example, ...]:
    """Return the rows of a text that starts with so many tokens of the tokenizer; each has at most `most` tokens."""
    before = max(start, 1)  # tokens that each row has before those that it teaches
    if most <= before:
        raise DataError(f"max_length: expected more than {before} tokens, with which each row starts, found {most}")
    count = -(-(len(tokens) - before) // (most - before))
    edges = np.linspace(before, len(tokens), count + 1).round().astype(int)
    rows = []
    for first, last in itertools.pairwise(edges.tolist()):
        context = slice(0, start) if start else slice(first - 1, first)
        mask = np.concatenate([np.zeros(before, bool), answer[first:last]])
        rows.append(Example(np.concatenate([tokens[context], tokens[first:last]]), mask))
    return tuple(rows)


def _limited(tokens: np.ndarray, kinds: np.ndarray, eos: Any, train_on_source: bool, limits: Limits) -> Encoded:
    """Return the sequence as an example within the limits."""
    full_length = len(tokens)
    source = int(np.argmax(kinds == ANSWER)) if (kinds == ANSWER).any() else full_length
    if limits.source is not None and source > limits.source:
        tokens, kinds = (np.concatenate([part[: limits.source], part[source:]]) for part in (tokens, kinds))
        source = limits.source
    most = limits.most(source)
    long = len(tokens) > most or len(tokens) < full_length
    if len(tokens) > most:
        tokens, kinds = _cut(tokens, kinds, int(most), eos, train_on_source)
    mask = kinds != EXCLUDED if train_on_source else kinds == ANSWER
    mask[:1] = False
    return Encoded((Example(tokens, mask),), full_length, long, bool((mask & (tokens != eos)).any()))


def _cut(tokens: np.ndarray, kinds: np.ndarray, most: int, eos: Any, train_on_source: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequence up to the last learned token that fits, with EOS after it if an answer ends there."""
    kept = np.flatnonzero(kinds[:most] == ANSWER)
    end = int(kept[-1]) + 1 if len(kept) and not train_on_source else most
    if kinds[end - 1] == ANSWER and kinds[end] != ANSWER and end < most:
        return _end_with_eos(tokens[:end], kinds[:end], end, eos)
    return tokens[:end], kinds[:end]


def _end_with_eos(tokens: np.ndarray, kinds: np.ndarray, end: int, eos: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequence up to `end`, closed by a learned EOS; one that is closed there already stays as it is."""
    if end and tokens[end - 1] == eos:
        return tokens, kinds
    return np.append(tokens[:end], np.int32(eos)), np.append(kinds[:end], ANSWER)
