"""What a run learns, as one value: the objectives are files that make one (sft.py, dpo.py, seq2seq.py).

    Setting: options, tokenizer, config.json     ->  Objective: data as batches, loss, unit, what is shown and measured

The job does the rest, and asks no more of an objective than what stands here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import Batch, Template
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import Model, ModelConfig
from qlora_jax.train import BatchSource, StepObjective


@dataclass(frozen=True)
class Setting:
    """What is known before the weights are read.

    Attributes:
        config: of the model.
        eos_ids: tokens that end an answer.
        say: tells the user.
        progress: whether to show progress bars.
    """

    options: Options
    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    eos_ids: frozenset[int]
    say: Callable[[str], None]
    progress: bool


class Batches(BatchSource, Protocol):
    """Batches, epoch after epoch, with a position; how many an epoch has is None where nobody knows before it was read."""

    def batches_in_epoch(self, epoch: int = 0) -> int | None: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Objective:
    """What a run learns.

    Attributes:
        training: endless batches of so many rows; arrays that the losses do not read stay on the host.
        held_out: one pass over the held-out data in batches of so many rows; None where nothing is held out.
        step: the losses, and the arrays of a batch that they read.
        count_tokens: how many real tokens a batch holds.
        row: a row of a batch in words.
        length: the tokens of a row; of an encoder-decoder, of its targets.
        source_length: the tokens of an encoder's source; None if there is no encoder.
        template: the form of most rows.
        prompts: token ids of held-out prompts to answer before and after.
        answer: (model, prompts) to the token ids of greedy answers.
        score: further figures of a model on the held-out data, by name; None where there are none.
        make_batch: returns the batch to train on, given the model as it is now and the batch that was read; None if that is
            the batch as it was read.
    """

    training: Callable[[int], Batches]
    held_out: Callable[[int], Iterable[Batch]] | None
    step: StepObjective
    count_tokens: Callable[[Batch], int]
    row: str
    length: int
    template: Template
    prompts: Sequence[np.ndarray]
    answer: Callable[[Model, Sequence[np.ndarray]], list[list[int]]]
    score: Callable[[Model], dict[str, float]] | None = None
    source_length: int | None = None
    make_batch: Callable[[Model, Batch], Batch] | None = None

    @property
    def longest(self) -> int:
        """The most tokens of a row, in its source or its targets."""
        return max(self.length, self.source_length or 0)


def expect_defaults(options: Options, names: Sequence[str], where: str) -> None:
    """Raises ValueError where one of the options `group.name` was given a value that means nothing.

    Args:
        where: what gives it no meaning, such as "with objective dpo".
    """
    plain, problems = Options(), []
    for path in names:
        group, name = path.split(".")
        found, default = (getattr(getattr(values, group), name) for values in (options, plain))
        if found != default:
            problems.append(f"{name}: expected {'none' if default is None else default} {where}, found {found}")
    if problems:
        raise ValueError("; ".join(problems))
