"""Preference pairs → a common prompt, a chosen and a rejected sequence, and batches of both.

    columns                        contents of a pair
    prompt, chosen, rejected       a question and two answers (texts); or messages and two lists of messages
    chosen, rejected               two texts `\\n\\nHuman: … \\n\\nAssistant: …` (hh-rlhf); two other texts, without a
                                   prompt; or two lists of messages

The two conversations must be equal up to an answer of the assistant. The part before it is the prompt; this answer and the
answers after it are learned, each with its end-of-turn token. A pair with equal answers, or whose first difference is not in
an answer, is an error that contains the row's number. If truncation to `max_length` removes the answer of a pair or makes
the two sequences equal, the pair is skipped and counted.

The prompt consists of the tokens at the start of both sequences that are equal and not learned. Chats are tokenized in one
piece, as in training on answers. If the first characters of an answer and the last ones of the prompt form one token, the
prompt ends before that token.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data.batch import Batch, batches
from qlora_jax.data.format import Example, Limits, encode_rendered
from qlora_jax.data.messages import Message, checked_messages, checked_tools, not_learned
from qlora_jax.data.pieces import CannotRender, Piece
from qlora_jax.data.render import Rendered, Template, render
from qlora_jax.data.schemas import Record
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """A tokenized pair; both sequences start with the tokens of `prompt`, none of which is learned."""

    prompt: np.ndarray  # int32 [n]
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PreferenceReport:
    """The numbers of pairs that were used, truncated and skipped."""

    rows: int
    kept: int  # pairs that became examples
    truncated: int
    without_difference: int  # after truncation
    max_length: int
    templates: dict[Template, int]  # template → pairs

    def __str__(self) -> str:
        parts = [f"{self.kept:,} of {self.rows:,} pairs kept"]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {self.max_length:,} tokens")
        if self.without_difference:
            parts.append(f"{self.without_difference:,} left out: no two answers in {self.max_length:,} tokens")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Pair:
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Any, ...] = ()


def encode_preferences(
    records: "Iterable[Mapping[str, Any]] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template = "auto",
) -> tuple[list[PreferenceExample], PreferenceReport]:
    """Return (the pairs of all records, in order; a report).

    Args:
        records: the rows.
        tokenizer: a fast tokenizer.
        max_length: the most tokens of a sequence.
        template: how conversations are written as text; "auto" is the chat template if the tokenizer has one, else guanaco.
            Two texts without turns are always plain.

    Raises:
        DataError: a row is not a preference pair, or no pair remains.
    """
    if template == "auto":
        template = "guanaco" if tokenizer.chat_template is None else "chat"
    rows: Iterable[Any] = records  # a Dataset is iterable, but its type does not declare it
    pairs = [_parse(row, index) for index, row in enumerate(rows)]
    with_turns = [index for index, pair in enumerate(pairs) if pair.prompt]
    rendered = {
        index: (_plain(pair.chosen), _plain(pair.rejected)) for index, pair in enumerate(pairs) if not pair.prompt
    } | _render([pairs[index] for index in with_turns], with_turns, tokenizer, template)
    flat = [text for index in range(len(pairs)) for text in rendered[index]]
    encoded = encode_rendered(flat, tokenizer, limits=Limits(max_length))
    examples, truncated = [], 0
    for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True):
        if chosen.teaches and rejected.teaches and not np.array_equal(chosen.example.tokens, rejected.example.tokens):
            truncated += chosen.long or rejected.long
            examples.append(_with_prompt(chosen.example, rejected.example))
    templates: Counter[Template] = Counter(text.template for text in flat[::2])
    report = PreferenceReport(len(pairs), len(examples), truncated, len(pairs) - len(examples), max_length, dict(templates))
    if not examples:
        raise DataError(f"preference pairs: expected at least one, found none: {report}")
    return examples, report


def _parse(row: Mapping[str, Any], index: int) -> _Pair:
    try:
        return _parse_row({name: value for name, value in row.items() if value is not None})
    except DataError as error:
        raise DataError(f"row {index} (counted from 0): {error}") from error


def _parse_row(row: Mapping[str, Any]) -> _Pair:
    if not {"chosen", "rejected"} <= row.keys():
        raise DataError(f"expected the columns chosen and rejected, found {sorted(row)}")
    chosen, rejected = (_conversation(row, column) for column in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("expected two different answers, chosen and rejected, found equal ones")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        role = messages[same]["role"] if same < len(messages) else "nothing"
        if role != "assistant":
            raise DataError(
                f"column {column!r}, message {same}: expected the assistant's answer as the first difference of chosen and "
                f"rejected, found {role}"
            )
    if same == 0 and max(len(chosen), len(rejected)) > 1:
        raise DataError("expected a message before the answers, found none")
    return _Pair(chosen[:same], chosen[same:], rejected[same:], checked_tools(row.get("tools")))


def _conversation(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """Return the complete conversation that ends with the answers of a column."""
    prompt, value = row.get("prompt"), row[column]
    if isinstance(prompt, str):
        before = split_dialogue(prompt) if _TURN.match(prompt) else ({"role": "user", "content": prompt},)
        # `\n\nAssistant:` with nothing after it is only the header of the answer.
        before = before[:-1] if before[-1] == {"role": "assistant", "content": ""} else before
    else:
        before = () if prompt is None else checked_messages(prompt, "prompt")
    if isinstance(value, str):
        if prompt is None and _TURN.match(value):
            return split_dialogue(value)
        return (*before, {"role": "assistant", "content": value})
    messages = checked_messages(value, column)
    if not messages or messages[0]["role"] == "assistant":
        return (*before, *messages)
    if any(message not in messages for message in before):
        raise DataError(f"column {column!r}: expected a conversation that holds the prompt, found {messages!r:.60}")
    return messages


def split_dialogue(text: str) -> tuple[Message, ...]:
    """Return the turns of a text in the form of hh-rlhf."""
    markers = list(_TURN.finditer(text))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return tuple(
        {"role": _ROLES[marker.group(1)], "content": text[marker.end() : end].strip()}
        for marker, end in zip(markers, ends, strict=True)
    )


def _plain(answer: Sequence[Message]) -> Rendered:
    text = answer[0]["content"]
    return Rendered((Piece(text, ((0, len(text)),)),), "plain", True)


def _render(
    pairs: Sequence[_Pair], rows: Sequence[int], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> dict[int, tuple[Rendered, Rendered]]:
    """Return the two rendered texts of each row; only the answers after the prompt are learned, not those within it."""
    both = [(pair, answers) for pair in pairs for answers in (pair.chosen, pair.rejected)]
    records = [Record("messages", (*map(not_learned, pair.prompt), *answers), {}, pair.tools) for pair, answers in both]
    try:
        rendered = render(records, tokenizer, template)
    except CannotRender as error:
        raise DataError(f"row {rows[error.index // 2]} (counted from 0): {error}") from error
    for index, parts in enumerate(rendered):
        if len(parts) > 1:
            raise DataError(
                f"row {rows[index // 2]} (counted from 0): the chat template rewrites earlier turns, so that "
                f"several answers of a column are no single text, found {len(parts)} of them; give pairs of one answer each"
            )
    learned = [parts[0] for parts in rendered]
    return dict(zip(rows, zip(learned[::2], learned[1::2], strict=True), strict=True))


def _with_prompt(chosen: Example, rejected: Example) -> PreferenceExample:
    not_learned = min(int(np.argmax(example.loss_mask)) for example in (chosen, rejected))
    differ = np.flatnonzero(chosen.tokens[:not_learned] != rejected.tokens[:not_learned])
    return PreferenceExample(chosen.tokens[: int(differ[0]) if len(differ) else not_learned], chosen, rejected)


class PreferenceBatches:
    """The iterator of `preference_batches`.

    Chosen and rejected sequences are shuffled with the same seed and number of examples, so rows remain pairs.
    """

    def __init__(self, examples: Sequence[PreferenceExample], **options: Any):
        self._halves = {
            "chosen": batches([example.chosen for example in examples], **options),
            "rejected": batches([example.rejected for example in examples], **options),
        }

    def __iter__(self) -> "PreferenceBatches":
        return self

    def __next__(self) -> Batch:
        return {
            f"{half}_{name}": batch[name]
            for half, iterator in self._halves.items()
            for batch in (next(iterator),)
            for name in ("inputs", "targets", "loss_mask")
        }

    def batches_in_epoch(self, epoch: int = 0) -> int:
        return self._halves["chosen"].batches_in_epoch(epoch)

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as values that JSON can hold."""
        return {half: iterator.get_state() for half, iterator in self._halves.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        for half, iterator in self._halves.items():
            iterator.set_state(state[half])


def preference_batches(
    examples: Sequence[PreferenceExample],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> PreferenceBatches:
    """Return an iterator over batches of `batch_size` pairs.

    A batch has `chosen_inputs`, `chosen_targets`, `chosen_loss_mask` and the same for `rejected`, each
    `[batch_size, length]`. Row i of the chosen and row i of the rejected arrays are a pair. See `batches` for the arguments.
    """
    return PreferenceBatches(
        examples,
        batch_size=batch_size,
        length=length,
        pad_id=pad_id,
        shuffle=shuffle,
        seed=seed,
        epochs=epochs,
        shard_index=shard_index,
        shard_count=shard_count,
    )
