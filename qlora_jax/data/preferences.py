"""Preference pairs → a common prompt, a chosen and a rejected sequence, and batches of both.

    columns                        contents of a pair
    prompt, chosen, rejected       three texts, joined as they are; or messages and two lists of messages
    question, chosen, rejected     a question (also instruction and input, with context) and two answers
    chosen, rejected               two texts `\\n\\nHuman: … \\n\\nAssistant: …` (hh-rlhf); two other texts, without a
                                   prompt; or two lists of messages

More columns are those of questions and answers: the system message, a history, tools (more_columns.py). With one of them,
or with the template chat or guanaco, a prompt of text is a question.

The two conversations must be equal up to an answer of the assistant. The part before it is the prompt; this answer and the
answers after it are learned, each with its end-of-turn token. A pair with equal answers, or whose first difference is not in
an answer, cannot be used. A pair whose answers do not differ within `max_length` tokens is left out and counted.

The prompt consists of the tokens at the start of both sequences that are equal and not learned. Chats are tokenized in one
piece, as in training on answers. If the first characters of an answer and the last ones of the prompt form one token, the
prompt ends before that token.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from qlora_jax.data.batch import Batch, batches
from qlora_jax.data.corpus import plain_rows, rendered_rows, unused_names
from qlora_jax.data.dialogue import is_dialogue, split_dialogue
from qlora_jax.data.format import Example, Limits, encode_rendered
from qlora_jax.data.messages import Message, checked_messages, not_learned
from qlora_jax.data.more_columns import MORE, column_text, earlier_messages, joined_texts, tools_of
from qlora_jax.data.odd_rows import OnBadRow, RowAccount, RowTally
from qlora_jax.data.pieces import Piece
from qlora_jax.data.render import Rendered, Template
from qlora_jax.data.schemas import Record, present_columns
from qlora_jax.data.token_ids import check_ids
from qlora_jax.data.values import check_characters, described
from qlora_jax.errors import DataError, OptionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREFERENCE_COLUMNS = ("chosen", "rejected")
# Columns that hold the prompt; of several, the first one is used.
_PROMPTS = ("prompt", "question", "instruction")
_USED = {*PREFERENCE_COLUMNS, *_PROMPTS, "input", "context", *MORE}


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """A tokenized pair; both sequences start with the tokens of `prompt`, none of which is learned."""

    prompt: np.ndarray  # int32 [n]
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class PreferenceReport:
    """The numbers of pairs that were used, cut and left out."""

    rows: int
    kept: int  # pairs that became examples
    truncated: int
    without_difference: int  # after they were cut
    max_length: int
    templates: dict[Template, int]  # template → pairs
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know of how pairs were rendered → pairs
    odd: RowAccount = field(default_factory=RowAccount)

    def check_bad_rows(self) -> None:
        """Raise DataError if more than one row in ten cannot be used."""
        self.odd.check(self.rows)

    def __str__(self) -> str:
        forms = f" as {', '.join(self.templates)}" if self.kept else ""
        parts = [f"{self.kept:,} of {self.rows:,} pairs kept{forms}"]
        parts += [f"{note} ({count:,} {'pair' if count == 1 else 'pairs'})" for note, count in self.notes.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {self.max_length:,} tokens")
        if self.without_difference:
            parts.append(f"{self.without_difference:,} left out: no two answers in {self.max_length:,} tokens")
        return "; ".join([*parts, *self.odd.sentences()])


@dataclass(frozen=True)
class _Pair:
    """A pair; without messages in the prompt, the answers are plain texts after the text `before`."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    before: str = ""
    unused: tuple[str, ...] = ()


def encode_preferences(
    records: "Iterable[Mapping[str, Any]] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template = "auto",
    on_bad_row: OnBadRow = "error",
    vocabulary: int | None = None,
) -> tuple[list[PreferenceExample], PreferenceReport]:
    """Return (the pairs of all records, in order; a report).

    Args:
        records: the rows.
        tokenizer: a fast tokenizer.
        max_length: the most tokens of a sequence.
        template: how conversations are written as text; "auto" is the chat template if the tokenizer has one, else guanaco.
            Texts without turns are then plain, because they may be rendered already.
        on_bad_row: what to do with a record that is no pair: raise an error, or leave it out and count it.
        vocabulary: the number of tokens for which the model has an embedding; None: all.

    Raises:
        DataError: a row is not a preference pair, where that is an error, or no pair remains.
    """
    if template not in get_args(Template):
        raise OptionError(f"template: expected one of {', '.join(get_args(Template))}, found {template!r}")
    tally, rows = RowTally(on_bad_row), 0
    flat: list[Rendered] = []
    numbers: list[int] = []
    for rows, row in enumerate(plain_rows(records), start=1):
        pair = tally.attempt(rows - 1, _parse, row, template)
        rendered = None if pair is None else tally.attempt(rows - 1, _render, pair, tokenizer, template)
        if pair is not None and rendered is not None:
            flat += rendered
            numbers.append(rows - 1)
            tally.unused({*pair.unused, *unused_names(_record(pair, pair.chosen), rendered[0].template, tokenizer)})
    encoded = encode_rendered(flat, tokenizer, limits=Limits(max_length))
    examples, truncated, equal = [], 0, 0
    for number, chosen, rejected in zip(numbers, encoded[::2], encoded[1::2], strict=True):
        ids = np.concatenate([chosen.example.tokens, rejected.example.tokens])
        if not tally.attempt(number, check_ids, ids, tokenizer, vocabulary):
            continue
        if chosen.teaches and rejected.teaches and not np.array_equal(chosen.example.tokens, rejected.example.tokens):
            truncated += chosen.long or rejected.long
            examples.append(_with_prompt(chosen.example, rejected.example))
        else:
            equal += 1
    report = PreferenceReport(
        rows=rows,
        kept=len(examples),
        truncated=truncated,
        without_difference=equal,
        max_length=max_length,
        templates=dict(Counter(text.template for text in flat[::2])),
        notes=dict(Counter(note for text in flat[::2] for note in text.notes)),
        odd=tally.account(),
    )
    if not examples:
        raise DataError(f"preference pairs: expected at least one, found none: {report}")
    return examples, report


def _parse(row: Any, template: Template) -> _Pair:
    present = present_columns(row)
    if not present.keys() >= set(PREFERENCE_COLUMNS):
        raise DataError(f"expected the columns chosen and rejected, found {sorted(map(str, present))}")
    column = next((name for name in _PROMPTS if name in present), None)
    unused = tuple(name for name, value in present.items() if name not in _USED and value not in ("", [], {}))
    unused += tuple(name for name in _PROMPTS if name in present and name != column)
    more = {"question": ("context",), "instruction": ("input", "context")}.get(column or "", ())
    unused += tuple(name for name in ("input", "context") if present.get(name) and name not in more)
    before, tools = earlier_messages(present), tools_of(present)
    answers = [present[name] for name in PREFERENCE_COLUMNS]
    texts = all(_is_text(value) for value in answers)
    if texts and column == "prompt" and template in ("auto", "plain") and not before and not tools:
        prompt = present["prompt"]
        if _is_text(prompt) and not is_dialogue(str(prompt)):
            chosen, rejected = ((_answer(column_text(present, name)),) for name in PREFERENCE_COLUMNS)
            _check_different(chosen, rejected)
            return _Pair((), chosen, rejected, before=column_text(present, "prompt"), unused=unused)
    asked = _prompt(present, column)
    chosen, rejected = ((*before, *_conversation(present, name, asked)) for name in PREFERENCE_COLUMNS)
    same = _first_difference(chosen, rejected)
    return _Pair(chosen[:same], chosen[same:], rejected[same:], tools, unused=unused)


def _is_text(value: object) -> bool:
    return not isinstance(value, list | tuple | Mapping)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _check_different(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    if chosen == rejected:
        raise DataError("expected two different answers, chosen and rejected, found equal ones")


def _first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the number of messages that both conversations start with, after which both go on with an answer."""
    _check_different(chosen, rejected)
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
    return same


def _prompt(row: Mapping[str, Any], column: str | None) -> tuple[Message, ...]:
    """Return the messages of the prompt, which is a text, hh-rlhf's dialogue, or a list of messages."""
    if column is None:
        return ()
    if not _is_text(row[column]):
        return checked_messages(row[column], column)
    column_text(row, column)
    parts = {"question": ("context", "question"), "instruction": ("instruction", "input", "context")}
    text = joined_texts(row, *parts.get(column, (column,)))
    if not is_dialogue(text):
        return ({"role": "user", "content": text},)
    turns = split_dialogue(text)
    # `\n\nAssistant:` with nothing after it is only the header of the answer.
    return turns[:-1] if turns[-1] == _answer("") else turns


def _conversation(row: Mapping[str, Any], column: str, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the complete conversation that ends with the answers of a column."""
    value = row[column]
    if _is_text(value):
        text = column_text(row, column)
        return split_dialogue(text) if not before and is_dialogue(text) else (*before, _answer(text))
    messages = checked_messages(value, column)
    if not messages or messages[0]["role"] == "assistant":
        return (*before, *messages)
    if any(message not in messages for message in before):
        raise DataError(f"column {column!r}: expected a conversation that holds the prompt, found {described(messages)}")
    return messages


def _render(pair: _Pair, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[Rendered, Rendered]:
    """Return the two texts of a pair; only the answers after the prompt are learned, not those within it."""
    chosen, rejected = (_render_one(pair, answers, tokenizer, template) for answers in (pair.chosen, pair.rejected))
    return chosen, rejected


def _render_one(
    pair: _Pair, answers: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> Rendered:
    if not pair.prompt:
        text = answers[0]["content"]
        check_characters(pair.before + text)
        before = (Piece(pair.before),) if pair.before else ()
        return Rendered((*before, Piece(text, ((0, len(text)),))), "plain", True)
    if template == "auto":
        template = "guanaco" if tokenizer.chat_template is None else "chat"
    first, *others = rendered_rows(_record(pair, answers), tokenizer, template)
    if others:
        raise DataError(
            "the chat template rewrites earlier turns, so that several answers of a column are no single text: expected one "
            f"answer in each column, found {1 + len(others)}"
        )
    return first


def _record(pair: _Pair, answers: Sequence[Message]) -> Record:
    return Record("messages", (*map(not_learned, pair.prompt), *answers), {}, pair.tools)


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
