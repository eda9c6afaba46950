"""All records → examples, with a report of the records that were truncated or skipped, and why.

Records are processed in chunks: they are parsed, rendered, and tokenized by one call of the fast tokenizer (which works in
parallel). A row that cannot be used is an error that contains the row's number. A row that is only too long, or that has
nothing to learn, is counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from tqdm import tqdm

from qlora_jax.data.format import Example, Limits, encode_rendered
from qlora_jax.data.messages import is_answer
from qlora_jax.data.pieces import CannotRender
from qlora_jax.data.render import Rendered, Template, render
from qlora_jax.data.schemas import Record, parse
from qlora_jax.errors import DataError, OptionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["truncate", "drop", "error"]
CHUNK = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """The numbers of records that were used, truncated and skipped. Token counts are those of the used examples."""

    rows: int
    kept: int  # rows that became examples
    examples: int  # more than `kept` if the chat template rewrites earlier turns of conversations
    truncated: int
    dropped_long: int
    without_target: int  # records with nothing to learn, for any reason
    without_answer: int  # the part of these that has no turn of the assistant
    tokens: int
    learned_tokens: int
    longest_row: int  # in tokens, before truncation
    limits: Limits
    forms: dict[str, int]  # "schema as template" → rows
    templates: dict[Template, int]  # template → rows
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know of how rows were rendered → rows

    def __add__(self, other: "Report") -> "Report":
        """Return the report of the records of both, which were read with the same options."""
        return Report(
            rows=self.rows + other.rows,
            kept=self.kept + other.kept,
            examples=self.examples + other.examples,
            truncated=self.truncated + other.truncated,
            dropped_long=self.dropped_long + other.dropped_long,
            without_target=self.without_target + other.without_target,
            without_answer=self.without_answer + other.without_answer,
            tokens=self.tokens + other.tokens,
            learned_tokens=self.learned_tokens + other.learned_tokens,
            longest_row=max(self.longest_row, other.longest_row),
            limits=self.limits,
            forms=dict(Counter(self.forms) + Counter(other.forms)),
            templates=dict(Counter(self.templates) + Counter(other.templates)),
            notes=dict(Counter(self.notes) + Counter(other.notes)),
        )

    def __str__(self) -> str:
        forms = ", ".join(f"{form}{f' ({count})' if len(self.forms) > 1 else ''}" for form, count in self.forms.items())
        share = 100 * self.learned_tokens / max(1, self.tokens)
        parts = [f"{self.kept:,} of {self.rows:,} rows kept{f': {forms}' if self.kept else ''}"]
        if self.examples > self.kept:
            parts.append(f"they became {self.examples:,} examples, because the chat template rewrites earlier turns")
        parts += [f"{note} ({count:,} rows)" for note, count in self.notes.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {self.limits} (the longest had {self.longest_row:,})")
        if self.dropped_long:
            parts.append(f"{self.dropped_long:,} left out: over {self.limits} (the longest had {self.longest_row:,})")
        if self.without_answer:
            parts.append(f"{self.without_answer:,} left out: no answer to learn")
        if empty := self.without_target - self.without_answer:
            parts.append(f"{empty:,} left out: nothing to learn in {self.limits}")
        if self.kept:
            parts.append(f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned ({share:.0f} %)")
        return "; ".join(parts)


class NothingToLearn(DataError):
    """No record has anything to learn; `report` contains the reasons."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"records: expected at least one row with something to learn, found none: {report}")
        self.report = report


def encode_all(
    records: "Iterable[Mapping[str, Any]] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template = "auto",
    train_on_source: bool = False,
    on_long: OnLong = "truncate",
    source_max_length: int | None = None,
    target_max_length: int | None = None,
    first_row: int = 0,
    progress: bool = True,
) -> tuple[list[Example], Report]:
    """Return (the examples of all records that have something to learn, in order; a report).

    Args:
        records: the rows.
        tokenizer: a fast tokenizer.
        max_length: the most tokens of an example.
        template: how conversations are written as text.
        train_on_source: whether the text before the answers is learned too.
        on_long: what to do with an example that is too long.
        source_max_length: the most tokens before the first learned token; None: no limit.
        target_max_length: the most tokens from the first learned token on; None: no limit.
        first_row: the number of the first record in error messages.
        progress: whether to show a progress bar.

    Raises:
        DataError: a row cannot be used, or no row has anything to learn (NothingToLearn).
    """
    limits = Limits(max_length, source_max_length, target_max_length)
    if on_long not in get_args(OnLong):
        raise DataError(f"on_long: expected one of {', '.join(get_args(OnLong))}, found {on_long!r}")
    examples: list[Example] = []
    forms: Counter[str] = Counter()
    templates: Counter[Template] = Counter()
    notes: Counter[str] = Counter()
    rows, kept = first_row, 0
    truncated = dropped_long = without_target = without_answer = longest_row = 0
    total = len(records) if isinstance(records, Sized) else None
    with tqdm(total=total, desc="tokenizing", unit=" rows", disable=not progress) as bar:
        for chunk in _chunks(records):
            parsed = [_parse(row, rows + index) for index, row in enumerate(chunk)]
            trainable = [record for record in parsed if train_on_source or _has_target(record)]
            without_answer += len(parsed) - len(trainable)
            rendered = _render(trainable, parsed, rows, tokenizer, template)
            flat = [(record, row) for record, parts in zip(trainable, rendered, strict=True) for row in parts]
            encoded = encode_rendered([row for _, row in flat], tokenizer, train_on_source=train_on_source, limits=limits)
            forms.update(
                f"{record.schema} as {parts[0].template}" for record, parts in zip(trainable, rendered, strict=True)
            )
            templates.update(parts[0].template for parts in rendered)
            notes.update(note for _, row in flat for note in row.notes)
            last: Record | None = None  # the last record that was kept
            for (record, _), result in zip(flat, encoded, strict=True):
                longest_row = max(longest_row, result.full_length)
                if result.long and on_long == "error":
                    raise _too_long(_row_number(record, parsed, rows), result.full_length, limits)
                if result.long and on_long == "drop":
                    dropped_long += 1
                elif not result.teaches:
                    without_target += 1
                else:
                    truncated += result.long
                    kept, last = kept + (record is not last), record
                    examples.append(result.example)
            rows += len(chunk)
            bar.update(len(chunk))
    report = Report(
        rows=rows - first_row,
        kept=kept,
        examples=len(examples),
        truncated=truncated,
        dropped_long=dropped_long,
        without_target=without_target + without_answer,
        without_answer=without_answer,
        tokens=sum(len(example) for example in examples),
        learned_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        longest_row=longest_row,
        limits=limits,
        forms=dict(forms),
        templates=dict(templates),
        notes=dict(notes),
    )
    if not examples:
        raise NothingToLearn(report)
    return examples, report


def _too_long(row: int, length: int, limits: Limits) -> DataError:
    return DataError(
        f"row {row} (counted from 0): expected at most {limits}, found {length}; "
        "raise the limit, or choose on_long truncate or drop"
    )


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(records)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _parse(row: Mapping[str, Any], number: int) -> Record:
    try:
        return parse(row)
    except DataError as error:
        raise DataError(f"row {number} (counted from 0): {error}") from error


def _render(
    records: Sequence[Record], parsed: Sequence[Record], first: int, tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[tuple[Rendered, ...]]:
    """Render some of the parsed records, whose rows count from `first` in error messages."""
    try:
        return render(records, tokenizer, template)
    except CannotRender as error:
        number = _row_number(records[error.index], parsed, first)
        raise DataError(f"row {number} (counted from 0): {error}") from error


def _row_number(record: Record, parsed: Sequence[Record], first: int) -> int:
    return first + next(index for index, other in enumerate(parsed) if other is record)


def _has_target(record: Record) -> bool:
    # All of a text without turns is a target.
    no_turns = "text" in record.fields and not record.messages
    return no_turns or any(is_answer(message) for message in record.messages)


def train_eval_split(
    examples: Sequence[T], *, eval_fraction: float | None = None, eval_count: int | None = None, seed: int = 0
) -> tuple[list[T], list[T]]:
    """Return (training examples, held-out examples), both in the given order.

    Only the seed and the number of examples determine which ones are held out.

    Args:
        examples: the examples to split.
        eval_fraction: the share of held-out examples.
        eval_count: the number of held-out examples; exactly one of the two is given.
        seed: seed of the random choice.

    Raises:
        OptionError: both or none of eval_fraction and eval_count are given.
        DataError: no example would be held out, or none would remain.
    """
    if (eval_fraction is None) == (eval_count is None):
        raise OptionError(f"expected one of eval_fraction and eval_count, found {eval_fraction} and {eval_count}")
    count = eval_count if eval_count is not None else round(len(examples) * (eval_fraction or 0.0))
    if not 0 < count < len(examples):
        asked = f"eval_count {eval_count}" if eval_fraction is None else f"eval_fraction {eval_fraction}"
        raise DataError(f"{asked}: expected at least 1 of {len(examples)} examples on both sides, found {count} held out")
    held_out = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]
