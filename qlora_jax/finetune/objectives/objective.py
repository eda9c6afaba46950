"""The two types of an objective: its declaration, and the value that a run takes.

ObjectiveKind    name, options, what it makes no use of       one in each file (sft.py, dpo.py, seq2seq.py)
ObjectiveKind.make(Setting: options, tokenizer, config.json)
  -> Objective   batches, loss, unit, prompts, measurements   the run asks nothing else of an objective
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
from qlora_jax.train import BatchSource, LossFunction, Unit

if TYPE_CHECKING:
    from qlora_jax.finetune.options.options import Options


@dataclass(frozen=True)
class Setting:
    """The values that an objective is made from; the weights are not read yet.

    Attributes:
        config: of the model.
        eos_ids: tokens that end an answer.
        say: shows a line of text to the user.
        progress: whether to show progress bars.
    """

    options: "Options"
    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    eos_ids: frozenset[int]
    say: Callable[[str], None]
    progress: bool


def unchanged(model: Model) -> Model:
    return model


class Batches(BatchSource, Protocol):
    """Batches, epoch after epoch, with a position. The number of batches in an epoch is None where it is not known."""

    def batches_in_epoch(self, epoch: int = 0) -> int | None: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Objective:
    """What a run learns.

    Attributes:
        training: endless batches of so many rows; what of them `arrays` does not name stays on the host.
        held_out: one pass over the held-out data in batches of so many rows; None where nothing is held out.
        arrays: names of what the loss reads of a batch.
        count_tokens: how many real tokens a batch holds.
        row: a row of a batch in words.
        length: the most tokens of a row.
        loss, held_out_loss: of a batch; the second without what is there for training alone.
        unit: what they are means over.
        template: the form of most rows.
        prompts: token ids of held-out prompts to answer before and after.
        answer: (model, prompts) to the token ids of greedy answers.
        score: further figures of a model on the held-out data, by name; None where there are none.
        prepare: what the loaded model becomes before it is trained.
    """

    training: Callable[[int], Batches]
    held_out: Callable[[int], Iterable[Batch]] | None
    arrays: tuple[str, ...]
    count_tokens: Callable[[Batch], int]
    row: str
    length: int
    loss: LossFunction
    held_out_loss: LossFunction
    unit: Unit
    template: Template
    prompts: Sequence[np.ndarray]
    answer: Callable[[Model, Sequence[np.ndarray]], list[list[int]]]
    score: Callable[[Model], dict[str, float]] | None = None
    prepare: Callable[[Model], Model] = unchanged


@dataclass(frozen=True)
class ObjectiveKind:
    """The declaration of an objective: its name, its options and what it needs.

    Attributes:
        name: the name on the command line, `--objective NAME`.
        summary: what the model learns, for `--help`, in half a sentence.
        make: reads the data and returns the objective of a run; raises ValueError or OSError where they cannot be used.
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
    make: Callable[[Setting], Objective]
    learning_rates: tuple[float, float, float]
    method_rate_divisor: float = 1.0
    options: tuple[Option, ...] = ()
    unused: tuple[str, ...] = ()
    encoder_decoder: bool = False
    packs: bool = False
    groups_attention: bool = False

    def check(self, options: "Options") -> None:
        """Raise OptionError where an option that means nothing for the objective was given."""
        if self.encoder_decoder:
            where = "with an encoder-decoder"
        else:
            where = "with a decoder-only model" if self.packs else f"with objective {self.name}"
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
