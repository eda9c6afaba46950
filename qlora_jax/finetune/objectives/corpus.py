"""The data of a run: sources -> examples -> training and held-out examples -> the mixture to train on.

Rows are held out from all sources together, before the sources are mixed. A mixture repeats the rows of small sources, and a
row that is both trained on and held out would make the held-out loss too low. For the same reason the rows of one
conversation are held out together.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import (
    PLAIN_ANSWERS,
    DataError,
    Example,
    Rows,
    Source,
    Template,
    mix,
    open_source,
    show_examples,
    train_eval_split,
)
from qlora_jax.errors import OptionError

if TYPE_CHECKING:
    from qlora_jax.finetune.options.data import DataOptions
    from qlora_jax.finetune.options.options import Options

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus(Generic[T]):
    """The data of a run: examples to train on and held-out ones."""

    training: list[T]
    held_out: list[T]
    template: Template  # that of most rows


class Account(Protocol):
    """An account of the rows of a source: a text (`str`), and counts by template."""

    @property
    def templates(self) -> dict[Template, int]: ...

    def check_bad_rows(self) -> None:
        """Raise DataError if too many rows cannot be used."""
        ...


Encode = Callable[[Rows | list[dict[str, Any]]], tuple[list[T], Account]]


def read_corpus(
    options: "Options",
    tokenizer: PreTrainedTokenizerFast,
    encode: Encode[T],
    shown: Callable[[T], Sequence[Example]],
    conversation: Callable[[T], int | None] = lambda example: None,
) -> Corpus[T]:
    """Read the data that `options.data` names, and log what became of the rows of each source.

    Args:
        options: the options of the run.
        tokenizer: writes examples as text for people to look at.
        encode: returns the examples of a source's records, with an account.
        shown: returns an example as sequences of tokens, for people to look at.
        conversation: returns the number of the record of an example that has turns in common with other examples of that
            record; None for an example that has none.

    Raises:
        DataError, OSError: data that cannot be used, or nothing to train on.
    """
    data = options.data
    held_out: list[T] = []
    if data.eval_data is not None:  # first, since it is read sooner than what is trained on: it may be missing
        held_out, _ = read_source(data.eval_data, open_source(data.eval_data, data.eval_split, data.column_names), encode)
    forms: dict[Template, int] = {}
    named: list[tuple[int, T]] = []
    columns: set[str] = set()
    for index, source in enumerate(data.sources or (PLAIN_ANSWERS,)):
        opened = open_source(source, data.split, data.column_names)
        columns.update(opened.columns)
        examples, account = read_source(source, opened, encode)
        named += [(index, example) for example in examples]
        for form, count in account.templates.items():
            forms[form] = forms.get(form, 0) + count
    data.column_names.check(columns)
    if data.eval_data is None and data.held_out > 0:
        groups = _groups(named, conversation)
        count = _held_out_count(data, len(set(groups)))
        named, out = train_eval_split(named, eval_count=count, seed=options.run.seed, groups=groups)
        held_out = [example for _, example in out]
    named, held_out = _sample(named, data.max_train_samples, options.run.seed), held_out[: data.max_eval_samples]
    training = [example for _, example in named]
    if data.weights:
        training = mix(_sets(named, data), data.weights, options.run.seed)
    if data.show_examples:
        sequences = [sequence for example in training[: data.show_examples] for sequence in shown(example)]
        _logger.info("%s", show_examples(sequences, tokenizer, len(sequences)))
    return Corpus(training, held_out, max(forms, key=forms.__getitem__))


def read_source(source: str, opened: Source, encode: Encode[T]) -> tuple[list[T], Account]:
    """Return the examples of one source that is open, with an account of its rows, which is logged."""
    with named_errors(source):
        examples, account = encode(opened.records)
        account.check_bad_rows()
    _logger.info("%s: %s%s", source, f"{opened.note}; " if opened.note else "", account)
    return examples, account


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Raise what is wrong with the rows of a source with the name of the source in front."""
    try:
        yield
    except DataError as error:
        if str(error).startswith(source):
            raise
        raise DataError(f"{source}, {error}") from error


def _sample(examples: list[T], most: int | None, seed: int) -> list[T]:
    """Return at most so many examples, drawn at random, in their order."""
    if most is None or most >= len(examples):
        return examples
    drawn = np.random.default_rng(seed).choice(len(examples), most, replace=False)
    return [examples[index] for index in sorted(drawn.tolist())]


def _sets(named: list[tuple[int, T]], data: "DataOptions") -> list[list[T]]:
    """Return the examples of each source."""
    sets = [[example for index, example in named if index == number] for number in range(len(data.sources))]
    for source, examples in zip(data.sources, sets, strict=True):
        if not examples and data.max_train_samples is not None:
            raise OptionError(
                f"max_train_samples {data.max_train_samples}: expected with weights an example of each source, "
                f"found none of {source}"
            )
    return sets


def _groups(named: Sequence[tuple[int, T]], conversation: Callable[[T], int | None]) -> list[Hashable]:
    """Return of each example of a source what it is held out with: its conversation, or itself alone."""
    numbers = [(index, conversation(example)) for index, example in named]
    return [place if number[1] is None else number for place, number in enumerate(numbers)]


def _held_out_count(data: "DataOptions", groups: int) -> int:
    """Return how many of so many conversations and texts are held out; for a user, both are examples."""
    count = int(data.held_out) if data.held_out >= 1 else max(1, round(groups * data.held_out))
    if count >= groups:
        raise OptionError(
            f"--held-out {data.held_out:g}: leaves nothing to train on of {groups} examples; --held-out 0 holds none out"
        )
    return count
