"""All records → examples, with a report of the records that were split, cut or left out, and why.

Records are processed in chunks: they are parsed, rendered, and tokenized by one call of the fast tokenizer (which works in
parallel). A record that cannot be used is an error that contains its number, or it is left out and counted (odd_rows.py). A
record that is only too long, or that has nothing to learn, is counted.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from tqdm import tqdm

from qlora_jax.data.format import Encoded, Example, Limits, encode_rendered
from qlora_jax.data.messages import is_answer, is_empty, unread_keys
from qlora_jax.data.odd_rows import OnBadRow, RowAccount, RowTally
from qlora_jax.data.render import Rendered, Template, render
from qlora_jax.data.schemas import Record, parse
from qlora_jax.data.token_ids import check_ids
from qlora_jax.data.values import check_characters, table_row
from qlora_jax.errors import DataError, OptionError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OnLong = Literal["split", "cut", "error", "drop"]
CHUNK = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """The numbers of records that were used, split, cut and left out. Token counts are those of the examples."""

    rows: int
    kept: int  # records that became examples
    examples: int  # more than `kept` if texts were split, or if a chat template rewrites earlier turns of conversations
    split: int  # records that were too long and became several examples
    truncated: int  # examples that were too long and were cut
    dropped_long: int
    without_target: int  # records with nothing to learn, for any reason
    without_answer: int  # the part of these that has no turn of the assistant
    empty: int  # the part of these whose answers are all empty
    tokens: int
    learned_tokens: int
    longest_row: int  # in tokens, before it was split or cut
    limits: Limits
    forms: dict[str, int]  # "schema as template" → records
    templates: dict[Template, int]  # template → records
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know of how records were rendered → records
    odd: RowAccount = field(default_factory=RowAccount)

    def __add__(self, other: "Report") -> "Report":
        """Return the report of the records of both, which were read with the same options."""
        counts = ("forms", "templates", "notes")
        sums: dict[str, Any] = {
            one.name: getattr(self, one.name) + getattr(other, one.name)
            for one in fields(self)
            if one.name not in (*counts, "limits")
        }
        sums |= {name: dict(Counter(getattr(self, name)) + Counter(getattr(other, name))) for name in counts}
        return Report(**sums | {"longest_row": max(self.longest_row, other.longest_row), "limits": self.limits})

    def check_bad_rows(self) -> None:
        """Raise DataError if more than one row in ten cannot be used."""
        self.odd.check(self.rows)

    def __str__(self) -> str:
        forms = ", ".join(f"{form}{f' ({count})' if len(self.forms) > 1 else ''}" for form, count in self.forms.items())
        share = 100 * self.learned_tokens / max(1, self.tokens)
        longest = f"{self.limits} (the longest had {self.longest_row:,})"
        parts = [f"{self.kept:,} of {self.rows:,} rows kept{f': {forms}' if self.kept else ''}"]
        if self.split:
            parts.append(f"{self.split:,} split, over {longest}")
        if self.examples > self.kept:
            parts.append(f"they became {self.examples:,} examples")
        parts += [f"{note} ({count:,} {'row' if count == 1 else 'rows'})" for note, count in self.notes.items()]
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to {longest}")
        if self.dropped_long:
            parts.append(f"{self.dropped_long:,} left out: over {longest}")
        if self.without_answer:
            parts.append(f"{self.without_answer:,} left out: no answer to learn")
        if self.empty:
            parts.append(f"{self.empty:,} left out: the answer is empty")
        if cut := self.without_target - self.without_answer - self.empty:
            parts.append(f"{cut:,} left out: nothing to learn in {self.limits}")
        if self.kept:
            parts.append(f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned ({share:.0f} %)")
        return "; ".join([*parts, *self.odd.sentences()])


class NothingToLearn(DataError):
    """No record has anything to learn; `report` contains the reasons."""

    def __init__(self, report: Report) -> None:
        ways_out = {
            "train_on_source learns prompts too": report.without_answer > 0,
            "raise max_length": report.without_target > report.without_answer + report.empty,
        }
        hints = "".join(f"; {way_out}" for way_out, helps in ways_out.items() if helps)
        super().__init__(f"records: expected at least one row with something to learn, found none: {report}{hints}")
        self.report = report


def encode_all(
    records: "Iterable[Mapping[str, Any]] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    template: Template = "auto",
    train_on_source: bool = False,
    on_long: OnLong = "split",
    on_bad_row: OnBadRow = "error",
    source_max_length: int | None = None,
    target_max_length: int | None = None,
    vocabulary: int | None = None,
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
        on_long: what to do with a record that is too long: split a text without turns and cut a conversation, cut both,
            raise an error, or leave it out.
        on_bad_row: what to do with a record that cannot be used: raise an error, or leave it out and count it;
            `Report.check_bad_rows` raises an error if these are too many.
        source_max_length: the most tokens before the first learned token; None: no limit.
        target_max_length: the most tokens from the first learned token on; None: no limit.
        vocabulary: the number of tokens for which the model has an embedding; None: all.
        first_row: the number of the first record in error messages.
        progress: whether to show a progress bar.

    Raises:
        DataError: a record cannot be used or is too long, where that is an error, or none has anything to learn
            (NothingToLearn).
    """
    limits = Limits(max_length, source_max_length, target_max_length)
    check_on_long(on_long)
    tally, totals = RowTally(on_bad_row), _Totals()
    examples: list[Example] = []
    total = len(records) if isinstance(records, Sized) else None
    with tqdm(total=total, desc="tokenizing", unit=" rows", disable=not progress) as bar:
        for chunk in _chunks(plain_rows(records)):
            rendered: list[tuple[int, tuple[Rendered, ...]]] = []
            for number, row in enumerate(chunk, first_row + totals.counts["rows"]):
                if (record := tally.attempt(number, parse, row)) is None:
                    continue
                if reason := _without_target(record, train_on_source):
                    totals.counts[reason] += 1
                    continue
                if (parts := tally.attempt(number, rendered_rows, record, tokenizer, template)) is None:
                    continue
                tally.unused(unused_names(record, parts[0].template, tokenizer))
                totals.add_rendered(record, parts)
                rendered.append((number, parts))
            flat = [part for _, parts in rendered for part in parts]
            encoded = iter(
                encode_rendered(flat, tokenizer, train_on_source=train_on_source, limits=limits, split=on_long == "split")
            )
            for number, parts in rendered:
                results = list(islice(encoded, len(parts)))
                ids = [example.tokens for result in results for example in result.examples]
                if tally.attempt(number, check_ids, np.concatenate([*ids, [0]]), tokenizer, vocabulary):
                    made = totals.kept(number, results, on_long, limits)
                    examples += [replace(one, conversation=number) for one in made] if len(parts) > 1 else made
            totals.counts["rows"] += len(chunk)
            bar.update(len(chunk))
    report = totals.report(examples, limits, tally.account())
    if not examples:
        raise NothingToLearn(report)
    return examples, report


def check_on_long(on_long: str) -> None:
    """Raise OptionError for an unknown way to treat long records."""
    if on_long not in get_args(OnLong):
        raise OptionError(f"on_long: expected one of {', '.join(get_args(OnLong))}, found {on_long!r}")


def plain_rows(records: "Iterable[Any] | Dataset") -> Iterator[Any]:
    """Return the rows of a list, a stream or a table; those of a table of `datasets` are without its nulls."""
    rows: Iterable[Any] = records  # a Dataset is iterable, but its type does not declare it
    return map(table_row, rows) if hasattr(records, "features") else iter(rows)


def rendered_rows(record: Record, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[Rendered, ...]:
    """Return the texts of a record.

    Raises:
        DataError: the template does not support it, or its text has halves of characters, which have no bytes.
    """
    (parts,) = render([record], tokenizer, template)
    for piece in (piece for part in parts for piece in part.pieces):
        check_characters(piece.text)
    return parts


def unused_names(record: Record, template: Template, tokenizer: Any) -> set[str]:
    """Return the columns of a record, and the keys of its messages, that nothing reads."""
    return {*record.unused, *unread_keys(record.messages, tokenizer, chat=template == "chat")}


class _Totals:
    """The numbers of a `Report`, while records are read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._forms: Counter[str] = Counter()
        self._templates: Counter[Template] = Counter()
        self._notes: Counter[str] = Counter()
        self._longest_row = 0

    def add_rendered(self, record: Record, parts: Sequence[Rendered]) -> None:
        """Count the form of a record."""
        self._forms[f"{record.schema} as {parts[0].template}"] += 1
        self._templates[parts[0].template] += 1
        self._notes.update(note for part in parts for note in part.notes)

    def kept(self, number: int, results: Sequence[Encoded], on_long: OnLong, limits: Limits) -> list[Example]:
        """Return the examples of the record of this number, and count what became of it."""
        self._longest_row = max(self._longest_row, *(result.full_length for result in results))
        long = [result for result in results if result.long]
        if long and on_long == "error":
            raise DataError(
                f"row {number} (counted from 0): expected at most {limits}, found {long[0].full_length}; "
                "raise the limit, or choose on_long split, cut or drop"
            )
        if long and on_long == "drop":
            self.counts["dropped_long"] += 1
            return []
        teaching = [result for result in results if result.teaches]
        if not teaching:
            self.counts["without_target"] += 1
            return []
        self.counts["kept"] += 1
        self.counts["split"] += any(len(result.examples) > 1 for result in teaching)
        # Also those of which nothing is left, where the chat template makes several rows of a record.
        self.counts["truncated"] += sum(result.long and len(result.examples) == 1 for result in results)
        return [example for result in teaching for example in result.examples]

    def report(self, examples: Sequence[Example], limits: Limits, odd: RowAccount) -> Report:
        """Return the report of all records."""
        return Report(
            rows=self.counts["rows"],
            kept=self.counts["kept"],
            examples=len(examples),
            split=self.counts["split"],
            truncated=self.counts["truncated"],
            dropped_long=self.counts["dropped_long"],
            without_target=sum(self.counts[reason] for reason in ("without_target", "without_answer", "empty")),
            without_answer=self.counts["without_answer"],
            empty=self.counts["empty"],
            tokens=sum(len(example) for example in examples),
            learned_tokens=sum(int(example.loss_mask.sum()) for example in examples),
            longest_row=self._longest_row,
            limits=limits,
            forms=dict(self._forms),
            templates=dict(self._templates),
            notes=dict(self._notes),
            odd=odd,
        )


def _chunks(records: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _without_target(record: Record, train_on_source: bool) -> Literal["without_answer", "empty"] | None:
    """Return why there is nothing to learn in a record; None if there is something."""
    if "text" in record.fields and not record.messages:  # all of a text without turns is a target
        return None if record.fields["text"].strip() else "empty"
    if train_on_source:
        return None
    answers = [message for message in record.messages if is_answer(message)]
    if not answers:
        return "without_answer"
    return "empty" if all(map(is_empty, answers)) else None


def train_eval_split(
    examples: Sequence[T],
    *,
    eval_fraction: float | None = None,
    eval_count: int | None = None,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[T], list[T]]:
    """Return (training examples, held-out examples), both in the given order.

    Only the seed and the number of groups determine which ones are held out.

    Args:
        examples: the examples to split.
        eval_fraction: the share of held-out groups.
        eval_count: the number of held-out groups; exactly one of the two is given.
        seed: seed of the random choice.
        groups: the group of each example; examples of one group are all on the same side. None: each is its own group.

    Raises:
        OptionError: both or none of eval_fraction and eval_count are given.
        DataError: no group would be held out, or none would remain.
    """
    if (eval_fraction is None) == (eval_count is None):
        raise OptionError(f"expected one of eval_fraction and eval_count, found {eval_fraction} and {eval_count}")
    keys = range(len(examples)) if groups is None else groups
    distinct = list(dict.fromkeys(keys))
    count = eval_count if eval_count is not None else round(len(distinct) * (eval_fraction or 0.0))
    if not 0 < count < len(distinct):
        asked = f"eval_count {eval_count}" if eval_fraction is None else f"eval_fraction {eval_fraction}"
        what = "examples" if len(distinct) == len(examples) else "conversations and texts"
        raise DataError(f"{asked}: expected at least 1 of {len(distinct)} {what} on both sides, found {count} held out")
    held_out = {distinct[index] for index in np.random.default_rng(seed).permutation(len(distinct))[:count].tolist()}
    sides: tuple[list[T], list[T]] = ([], [])
    for example, key in zip(examples, keys, strict=True):
        sides[key in held_out].append(example)
    return sides
