"""The options of the data."""

import dataclasses
import math
from pathlib import Path

from qlora_jax.data import NAMED, Limits, OnLong, Template, check_weights
from qlora_jax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is learned."""

    data: str | tuple[str, ...] | None = None
    """JSONL, JSON, CSV, TSV or Parquet files, hub ids, or names that the QLoRA authors use (oasst1, alpaca …); the
    instructions that ship with the package if left out."""
    weights: tuple[float, ...] = ()
    """Shares of several sources in the training data, in any unit; as many rows as they have if left out."""
    split: str | None = None
    """Split of a hub data set."""
    eval_data: str | None = None
    """File or hub id of held-out data; a part of the training data if left out."""
    eval_split: str | None = None
    """Split of a hub data set of held-out data."""
    held_out: float = 0.1
    """Share of the training data, or from 1 on how many rows, held out where no evaluation data are given; 0 for none."""
    max_train_samples: int | None = None
    """Train on a random sample of at most so many examples, drawn by the seed from all sources together."""
    max_eval_samples: int | None = None
    """Hold the first so many held-out examples only against the model."""
    template: Template = "auto"
    """How records become text; auto: by their schema."""
    max_length: int = 512
    """The most tokens of one example; of an encoder-decoder: of its source, and of its target."""
    source_max_length: int | None = None
    """The most tokens of it before its first answer."""
    target_max_length: int | None = None
    """The most tokens of it from its first answer on."""
    on_long: OnLong = "truncate"
    """What happens to longer ones."""
    train_on_source: bool = False
    """Learn the prompts as well as the answers."""
    packing: bool | None = None
    """Several examples in a row of max-length tokens, each blind to the others; otherwise one, padded. If left out, what a
    decoder is to answer is packed, unless it is grouped by length."""
    group_by_length: bool = False
    """Examples of like length in a batch, padded to the longest of them only; without packing."""
    streaming: bool = False
    """Read, tokenize and pack one JSON lines or Parquet file or hub data set while training, for sets larger than memory;
    needs max-steps, and begins anew at the end of the data."""
    shuffle_buffer: int = 2000
    """Rows that streaming holds at a time, and within which it shuffles and packs."""
    held_out_rows: int = 100
    """First rows of a stream that are held out where no evaluation data are given; 0 for none."""
    show_examples: int = 0
    """Training examples to show, with what is learned of them, before the run goes on."""

    def __post_init__(self) -> None:
        Limits(self.max_length, self.source_max_length, self.target_max_length)
        if not (0 <= self.held_out < 1 or (1 <= self.held_out < math.inf and self.held_out == int(self.held_out))):
            raise OptionError(f"held_out: expected a share from 0 to below 1 or a whole number, found {self.held_out}")
        for name in ("max_train_samples", "max_eval_samples"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise OptionError(f"{name}: expected at least 1, found {most}")
        if self.data == ():
            raise OptionError("data: expected at least one source, found none")
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
        """Whether what can be packed is."""
        return not self.group_by_length if self.packing is None else self.packing

    @property
    def sources(self) -> tuple[str, ...]:
        """What `data` names, one or several; empty for the shipped instructions."""
        return (self.data,) if isinstance(self.data, str) else self.data or ()
