"""The two types of an objective: its declaration, and the value that a run takes.

    ObjectiveKind                  name, options of the command line, options that mean nothing for it
      .step(options)               -> StepObjective    losses and the arrays that they read; no data is read
      .read(Setting)               -> Objective        batches, prompts and measurements of a run

Each of the files sft.py, dpo.py and seq2seq.py declares one. A run asks nothing else of its objective.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import Batch, Template
from qlora_jax.errors import OptionError
from qlora_jax.models import Model, ModelConfig
from qlora_jax.peft import Option
from qlora_jax.train import BatchSource, StepObjective

if TYPE_CHECKING:
    from qlora_jax.finetune.options.options import Options


@dataclass(frozen=True)
class Setting:
    """The values that an objective is made from; the weights are not read yet.

    Attributes:
        options: the options of the run.
        tokenizer: the tokenizer of the model.
        config: the config of the model.
        eos_ids: the tokens that end an answer.
        progress: whether to show progress bars.
    """

    options: "Options"
    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    eos_ids: frozenset[int]
    progress: bool


class Batches(BatchSource, Protocol):
    """Batches, epoch after epoch, with a position. The number of batches in an epoch is None where it is not known."""

    def batches_in_epoch(self, epoch: int = 0) -> int | None: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Objective:
    """The data of a run, with its losses and its measurements.

    Attributes:
        training: returns endless batches of so many rows; arrays that the losses do not read stay on the host.
        held_out: returns one pass over the held-out data in batches of so many rows; None if nothing is held out.
        step: the losses, and the arrays of a batch that they read.
        count_tokens: returns how many real tokens a batch holds.
        row: a row of a batch in words, for messages.
        length: the tokens of a row; of an encoder-decoder, of its targets.
        source_length: the tokens of an encoder's source; None if there is no encoder.
        template: the template of most rows.
        prompts: token ids of held-out prompts to answer before and after training.
        answer: returns the token ids of greedy answers of a model to prompts.
        held_out_checksum: the checksum of the held-out examples, by which a run that resumes finds that they changed.
        score: returns further metrics of a model on the held-out data, by name; None if there are none.
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
    held_out_checksum: int
    score: Callable[[Model], dict[str, float]] | None = None
    source_length: int | None = None
    make_batch: Callable[[Model, Batch], Batch] | None = None

    @property
    def longest(self) -> int:
        """The most tokens of a row, in its source or its targets."""
        return max(self.length, self.source_length or 0)


@dataclass(frozen=True)
class ObjectiveKind:
    """The declaration of an objective: its name, its options and what it needs.

    Attributes:
        name: the name on the command line, `--objective NAME`.
        summary: what the model learns, for `--help`, in half a sentence.
        step: returns the losses and the arrays that they read, for the options of a run; no data is read.
        read: reads the data and returns the objective of a run; raises DataError or OSError where they cannot be used.
        learning_rates: the default rates for a base below 1 billion parameters, below 20 billion, and above.
        method_rate_divisor: divides the default rate of methods that have one for models of any size.
        options: the objective's own options on the command line.
        unused: options `group.name` that mean nothing for it; another value than the default is an error.
        encoder_decoder: whether it is for encoder-decoders; otherwise it is for decoders.
        packs: whether several examples may share a row.
        groups_attention: whether attention in groups of a row is possible (`attention_groups`).
    """

    name: str
    summary: str
    step: Callable[["Options"], StepObjective]
    read: Callable[[Setting], Objective]
    learning_rates: tuple[float, float, float]
    method_rate_divisor: float = 1.0
    options: tuple[Option, ...] = ()
    unused: tuple[str, ...] = ()
    encoder_decoder: bool = False
    packs: bool = False
    groups_attention: bool = False

    def check(self, options: "Options") -> None:
        """Raise OptionError where an option that means nothing for the objective was given."""
        where = f"with objective {self.name}"
        if self.name == "sft":  # two kinds have this name, one for each kind of model
            where = "with an encoder-decoder" if self.encoder_decoder else "with a decoder-only model"
        plain, problems = type(options)(), []
        for path in self.unused:
            group, name = path.split(".")
            found, default = (getattr(getattr(values, group), name) for values in (options, plain))
            if found != default:
                problems.append(f"{name}: expected {'none' if default is None else default} {where}, found {found}")
        if options.data.packing and not self.packs:
            problems.append(f"packing: expected off {where}, found on")
        if problems:
            raise OptionError("; ".join(problems))
