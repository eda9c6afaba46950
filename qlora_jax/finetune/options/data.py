"""The options of the data."""

import dataclasses
import math
from pathlib import Path

from qlora_jax.data import NAMED, ColumnNames, Limits, OnBadRow, OnLong, Template, check_weights, column_names
from qlora_jax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data to train on and to evaluate."""

    data: str | tuple[str, ...] | None = None
    """JSONL, JSON, CSV, TSV, Parquet or text files, also compressed (.gz, .zst …), folders of them, hub ids, or names that
    the QLoRA authors use (oasst1, alpaca …); the instructions that are part of the package if left out."""
    columns: tuple[str, ...] = ()
    """Names of the data's columns, as OURS=THEIRS: question=query answer=reply."""
    on_bad_row: OnBadRow = "skip"
    """What to do with a row that cannot be used: leave it out, with an account of the reasons, or stop with an error. More
    than one such row in ten is an error in any case."""
    weights: tuple[float, ...] = ()
    """Shares of several sources in the training data, in any unit; by their numbers of rows if left out."""
    split: str | None = None
    """Split of a hub data set."""
    eval_data: str | None = None
    """File or hub id of held-out data; a part of the training data if left out."""
    eval_split: str | None = None
    """Split of a hub data set of held-out data."""
    held_out: float = 0.1
    """Share of the training data, or from 1 on a number of rows, to hold out if no evaluation data are given; 0 for none."""
    max_train_samples: int | None = None
    """Train on a random sample of at most so many examples, drawn by the seed from all sources together."""
    max_eval_samples: int | None = None
    """Evaluate on at most so many held-out examples, the first ones."""
    template: Template = "auto"
    """The template that makes text of records; auto: the one of their schema."""
    chat_template: str | None = None
    """Chat template: a Jinja file or a name (chatml, llama3, gemma …), in place of the tokenizer's own; saved with the
    adapter."""
    max_length: int = 512
    """The most tokens of one example; of an encoder-decoder: of its source, and of its target."""
    source_max_length: int | None = None
    """The most tokens of an example before its first answer."""
    target_max_length: int | None = None
    """The most tokens of an example from its first answer on."""
    on_long: OnLong = "split"
    """What to do with longer examples: split a text without turns into rows and cut a conversation, cut both, stop with an
    error, or leave them out."""
    train_on_source: bool = False
    """Learn the prompts as well as the answers."""
    packing: bool | None = None
    """Put several examples, which do not see each other, into a row of max-length tokens; otherwise a row is one padded
    example. If left out, answers of a decoder are packed, unless they are grouped by length."""
    group_by_length: bool = False
    """Put examples of similar length into a batch, padded only to the longest of them; without packing."""
    streaming: bool = False
    """Read, tokenize and pack one file, folder or hub data set during training, for sets larger than memory; needs
    max-steps, and starts again at the end of the data."""
    shuffle_buffer: int = 2000
    """Number of rows that streaming holds in memory, and within which it shuffles and packs."""
    held_out_rows: int = 100
    """Number of first rows of a stream to hold out where no evaluation data are given; 0 for none."""
    show_examples: int = 0
    """Number of training examples to show before the run, with the tokens that are learned."""

    def __post_init__(self) -> None:
        Limits(self.max_length, self.source_max_length, self.target_max_length)
        if not (0 <= self.held_out < 1 or (1 <= self.held_out < math.inf and self.held_out == int(self.held_out))):
            raise OptionError(f"held_out: expected a share from 0 to below 1 or a whole number, found {self.held_out}")
        for name in ("max_train_samples", "max_eval_samples"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise OptionError(f"{name}: expected at least 1, found {most}")
        if self.data == ():
            raise OptionError("data: expected at least one source, found none")
        column_names(self.columns)
        if self.weights:
            check_weights(self.weights, max(1, len(self.sources)))
        if self.eval_split is not None and self.eval_data is None:
            raise OptionError(f"eval_split: expected eval_data beside it, found {self.eval_split!r} alone")
        if self.group_by_length and self.packing:
            raise OptionError("group_by_length: expected packing off beside it (packed rows are all full), found it on")
        if self.show_examples < 0:
            raise OptionError(f"show_examples: expected at least 0, found {self.show_examples}")
        self._check_streaming()

    def _check_streaming(self) -> None:
        problems = []
        for name, least in (("shuffle_buffer", 1), ("held_out_rows", 0)):
            found = getattr(self, name)
            if found < least:
                problems.append(f"{name}: expected at least {least}, found {found}")
            if not self.streaming and found != getattr(DataOptions, name):
                problems.append(f"{name}: expected streaming beside it, found {found} alone")
        if self.streaming:
            if len(self.sources) != 1:
                problems.append(f"streaming: expected one source of data, found {len(self.sources)}")
            elif self.sources[0] in NAMED and not Path(self.sources[0]).exists():
                problems.append(f"streaming: expected a file or a hub id, found {self.sources[0]!r}, which is read whole")
            unused = {"held_out": "held_out_rows", "show_examples": "none", "max_train_samples": "max_steps"}
            for name, instead in unused.items():
                if (found := getattr(self, name)) != getattr(DataOptions, name):
                    problems.append(f"{name}: expected {instead} with streaming, found {found}")
        if problems:
            raise OptionError("; ".join(problems))

    @property
    def packs(self) -> bool:
        """Whether examples are packed, where the objective allows it."""
        return not self.group_by_length if self.packing is None else self.packing

    @property
    def column_names(self) -> ColumnNames:
        """The columns that are renamed."""
        return column_names(self.columns)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that `data` names; empty for the instructions of the package."""
        return (self.data,) if isinstance(self.data, str) else self.data or ()
