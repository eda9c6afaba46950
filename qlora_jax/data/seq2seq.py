"""Pairs of texts → tokens → batches of fixed shape for an encoder-decoder.

    source, target texts     "a b", "p q"
    sources     a b E . .    E is the EOS token, . is padding
    source_mask 1 1 1 0 0
    inputs      S p q . .    the targets, shifted right after the decoder's start token S
    targets     p q E . .
    loss_mask   1 1 1 0 0

A source that is too long is cut and still ends in EOS, as with T5's tokenizer. A target that is cut has no EOS, because the
model would learn to stop within a word. Records of all schemas become pairs: the last answer is the target, and all text
before it is the source.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data.batch import Batch, batches
from qlora_jax.data.corpus import OnLong, check_on_long, plain_rows, rendered_rows, unused_names
from qlora_jax.data.format import Example
from qlora_jax.data.messages import is_answer
from qlora_jax.data.odd_rows import OnBadRow, RowAccount, RowTally
from qlora_jax.data.render import Rendered, Template
from qlora_jax.data.schemas import Record, parse
from qlora_jax.data.token_ids import NAME_EOS, check_ids
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Seq2SeqExample:
    """A tokenized pair; the source ends in EOS, and so does a target that is not cut."""

    source: np.ndarray  # int32 [n]
    target: np.ndarray  # int32 [m]


def encode_seq2seq(
    source: str,
    target: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> Seq2SeqExample:
    """Tokenize one pair; lengths include EOS, which a target that is cut has not.

    Raises:
        DataError: the tokenizer has no EOS token, or a length is below 1.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(f"tokenizer: expected one with an EOS token, found eos_token_id {eos!r}. {NAME_EOS}")

    def encode(text: str, limit: int | None) -> np.ndarray:
        if limit is not None and limit < 1:
            raise DataError(f"longest source or target: expected at least 1 token, found {limit}")
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        return np.asarray(tokens if tokens[-1:] == [eos] else [*tokens, eos], np.int32)

    whole = Seq2SeqExample(encode(source, max_source_length), encode(target, max_target_length))
    return _cut(whole, max_source_length, max_target_length)


@dataclass(frozen=True)
class Seq2SeqReport:
    """The numbers of records that were used, cut and left out; lengths are in tokens with EOS, before any cut."""

    rows: int
    kept: int  # records that became examples
    truncated: int
    dropped_long: int
    without_target: int  # records without an answer, or with an empty one
    empty: int  # the part of these whose answer is empty
    longest: tuple[int, int]  # source, target
    limits: tuple[int, int]
    templates: dict[Template, int]  # template → rows
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know of how rows were rendered → rows
    odd: RowAccount = field(default_factory=RowAccount)

    def check_bad_rows(self) -> None:
        """Raise DataError if more than one row in ten cannot be used."""
        self.odd.check(self.rows)

    def __str__(self) -> str:
        limits = "{:,} source and {:,} target tokens".format(*self.limits)
        longest = "(the longest had {:,} and {:,})".format(*self.longest)
        parts = [f"{self.kept:,} of {self.rows:,} rows kept as pairs of source and target: {', '.join(self.templates)}"]
        parts += [f"{note} ({count:,} {'row' if count == 1 else 'rows'})" for note, count in self.notes.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {limits} {longest}")
        if self.dropped_long:
            parts.append(f"{self.dropped_long:,} left out: over {limits} {longest}")
        if unanswered := self.without_target - self.empty:
            parts.append(f"{unanswered:,} left out: no target")
        if self.empty:
            parts.append(f"{self.empty:,} left out: the target is empty")
        return "; ".join([*parts, *self.odd.sentences()])


def encode_all_seq2seq(
    records: "Iterable[Mapping[str, Any]] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_source_length: int,
    max_target_length: int,
    template: Template = "auto",
    on_long: OnLong = "cut",
    on_bad_row: OnBadRow = "error",
    vocabulary: int | None = None,
) -> tuple[list[Seq2SeqExample], Seq2SeqReport]:
    """Return (the examples of all records that have a target, in order; a report).

    Args:
        records: the rows.
        tokenizer: a tokenizer with an EOS token.
        max_source_length: the most tokens of a source, including EOS.
        max_target_length: the most tokens of a target, including EOS.
        template: how conversations are written as text.
        on_long: what to do with a pair that is too long; a pair cannot be split, so "split" cuts it.
        on_bad_row: what to do with a record that is no pair: raise an error, or leave it out and count it.
        vocabulary: the number of tokens for which the model has an embedding; None: all.

    Raises:
        DataError: a row is not a pair of texts or is too long, where that is an error, or no row remains.
    """
    check_on_long(on_long)
    limits, longest = (max_source_length, max_target_length), (0, 0)
    examples: list[Seq2SeqExample] = []
    templates: Counter[Template] = Counter()
    notes: Counter[str] = Counter()
    tally = RowTally(on_bad_row)
    rows = truncated = dropped_long = without_target = empty = 0
    for rows, row in enumerate(plain_rows(records), start=1):
        if (record := tally.attempt(rows - 1, parse, row)) is None:
            continue
        if record.messages and not any(map(is_answer, record.messages)):
            without_target += 1
            continue
        if (found := tally.attempt(rows - 1, _texts, record, tokenizer, template)) is None:
            continue
        (source, target), rendered = found
        templates[rendered.template] += 1
        notes.update(rendered.notes)
        tally.unused(unused_names(record, rendered.template, tokenizer))
        if not target.strip():
            without_target, empty = without_target + 1, empty + 1
            continue
        full = encode_seq2seq(source, target, tokenizer)
        if not tally.attempt(rows - 1, check_ids, [*full.source, *full.target], tokenizer, vocabulary):
            continue
        lengths = (len(full.source), len(full.target))
        longest = (max(longest[0], lengths[0]), max(longest[1], lengths[1]))
        long = lengths[0] > limits[0] or lengths[1] > limits[1]
        if long and on_long == "error":
            raise DataError(
                f"row {rows - 1} (counted from 0): expected at most {limits[0]:,} source and {limits[1]:,} target tokens, "
                f"found {lengths[0]:,} and {lengths[1]:,}; raise the limits, or choose on_long cut or drop"
            )
        if long and on_long == "drop":
            dropped_long += 1
            continue
        truncated += long
        examples.append(_cut(full, *limits))
    report = Seq2SeqReport(
        rows=rows,
        kept=len(examples),
        truncated=truncated,
        dropped_long=dropped_long,
        without_target=without_target,
        empty=empty,
        longest=longest,
        limits=limits,
        templates=dict(templates),
        notes=dict(notes),
        odd=tally.account(),
    )
    if not examples:
        raise DataError(f"records: expected at least one pair of source and target, found none: {report}")
    return examples, report


def _texts(record: Record, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[tuple[str, str], Rendered]:
    """Return (source and target of a record, the text that they are from), which is the one of its last answer."""
    rendered = rendered_rows(record, tokenizer, template)[-1]
    return split_target(rendered), rendered


def split_target(rendered: Rendered) -> tuple[str, str]:
    """Return (source, target): all text before the last answer of a record, and that answer.

    Raises:
        DataError: the record has no answer, or no text before it.
    """
    with_answers = [index for index, piece in enumerate(rendered.pieces) if piece.answers]
    if not with_answers:
        raise DataError("expected an answer, the target of an encoder-decoder, found none")
    last = rendered.pieces[with_answers[-1]]
    start, end = last.answers[-1]
    source = "".join(piece.text for piece in rendered.pieces[: with_answers[-1]]) + last.text[:start]
    if not source.strip():
        raise DataError("expected a text before the answer, the source of an encoder-decoder, found none")
    return source, last.text[start:end]


def _cut(pair: Seq2SeqExample, most_source: int | None, most_target: int | None) -> Seq2SeqExample:
    """Return the pair within limits: the source with its EOS, the target without it if it is cut."""
    source = pair.source
    if most_source is not None and len(source) > most_source:
        source = np.append(source[: most_source - 1], source[-1])
    return Seq2SeqExample(source, pair.target[:most_target])


class Seq2SeqBatches:
    """The iterator of `seq2seq_batches`.

    Sources and targets are shuffled with the same seed and number of examples, so rows remain pairs. The rows are those of
    `batches`, which shifts tokens by one: targets are made from [start, *target], and sources are the inputs of
    [*source, any token].
    """

    def __init__(self, sources: Sequence[Example], targets: Sequence[Example], lengths: tuple[int, int], **options: Any):
        self._sides = {
            side: batches(examples, length=length, **options)
            for side, examples, length in zip(("sources", "targets"), (sources, targets), lengths, strict=True)
        }

    def __iter__(self) -> "Seq2SeqBatches":
        return self

    def __next__(self) -> Batch:
        sources, targets = next(self._sides["sources"]), next(self._sides["targets"])
        return {
            "sources": sources["inputs"],
            "source_mask": sources["segment_ids"] > 0,
            **{name: targets[name] for name in ("inputs", "targets", "loss_mask")},
        }

    def batches_in_epoch(self, epoch: int = 0) -> int:
        return self._sides["targets"].batches_in_epoch(epoch)

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as values that JSON can hold."""
        return {side: iterator.get_state() for side, iterator in self._sides.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""
        for side, iterator in self._sides.items():
            iterator.set_state(state[side])


def seq2seq_batches(
    examples: Sequence[Seq2SeqExample],
    *,
    batch_size: int,
    source_length: int,
    target_length: int,
    pad_id: int,
    decoder_start_id: int,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = None,
) -> Seq2SeqBatches:
    """Return an iterator over batches of pairs; see the module's docstring for the contents of a batch.

    Each epoch has a different order. The last batch of an epoch is filled with padding rows.

    Args:
        examples: the tokenized pairs.
        batch_size: number of rows.
        source_length: length of the rows of sources, in tokens.
        target_length: length of the rows of targets, in tokens.
        pad_id: token id of the padding.
        decoder_start_id: token id of the decoder's start token.
        shuffle: whether to shuffle the examples in each epoch.
        seed: seed of the shuffling.
        epochs: number of epochs; None: endless.

    Raises:
        DataError: no example, or an example that is longer than its row.
    """
    if not examples:
        raise DataError("examples: expected at least one, found none")
    for index, example in enumerate(examples):
        n, m = len(example.source), len(example.target)
        if n > source_length or m > target_length:
            raise DataError(
                f"example {index}: expected at most {source_length} source and {target_length} target tokens, "
                f"found {n} and {m}"
            )

    def learned(tokens: np.ndarray) -> Example:
        return Example(tokens, np.arange(len(tokens)) > 0)

    return Seq2SeqBatches(
        [learned(np.append(example.source, np.int32(pad_id))) for example in examples],
        [learned(np.insert(example.target, 0, decoder_start_id)) for example in examples],
        (source_length, target_length),
        batch_size=batch_size,
        pad_id=pad_id,
        shuffle=shuffle,
        seed=seed,
        epochs=epochs,
    )
