"""Preference pairs (pairs.py) → a common prompt, a chosen and a rejected sequence, and batches of both.

The answers after the prompt are learned, each with its end-of-turn token. A pair whose answers do not differ within
`max_length` tokens is left out and counted.

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
from qlora_jax.data.format import Example, Limits, encode_rendered
from qlora_jax.data.messages import Message, is_empty, not_learned
from qlora_jax.data.odd_rows import OnBadRow, RowAccount, RowTally
from qlora_jax.data.pairs import Pair, parse_pair
from qlora_jax.data.pieces import Piece
from qlora_jax.data.render import Rendered, Template
from qlora_jax.data.schemas import Record
from qlora_jax.data.token_ids import check_ids
from qlora_jax.data.values import check_characters
from qlora_jax.errors import DataError, OptionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
    empty: int  # one of the two answers is
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
        if self.empty:
            parts.append(f"{self.empty:,} left out: an answer is empty")
        if self.without_difference:
            parts.append(f"{self.without_difference:,} left out: no two answers in {self.max_length:,} tokens")
        return "; ".join([*parts, *self.odd.sentences()])


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
    tally, rows, empty = RowTally(on_bad_row), 0, 0
    flat: list[Rendered] = []
    numbers: list[int] = []
    for rows, row in enumerate(plain_rows(records), start=1):
        pair = tally.attempt(rows - 1, parse_pair, row, template)
        if pair is not None and any(all(map(is_empty, answers)) for answers in (pair.chosen, pair.rejected)):
            empty += 1
            continue
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
        empty=empty,
        max_length=max_length,
        templates=dict(Counter(text.template for text in flat[::2])),
        notes=dict(Counter(note for text in flat[::2] for note in text.notes)),
        odd=tally.account(),
    )
    if not examples:
        raise DataError(f"preference pairs: expected at least one, found none: {report}")
    return examples, report


def _render(pair: Pair, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[Rendered, Rendered]:
    """Return the two texts of a pair; only the answers after the prompt are learned, not those within it."""
    chosen, rejected = (_render_one(pair, answers, tokenizer, template) for answers in (pair.chosen, pair.rejected))
    return chosen, rejected


def _render_one(
    pair: Pair, answers: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: Template
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


def _record(pair: Pair, answers: Sequence[Message]) -> Record:
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
