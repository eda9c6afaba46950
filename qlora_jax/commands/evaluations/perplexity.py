"""Measure the perplexity of a model, with or without an adapter, over a sliding window.

    python scripts/evaluate.py perplexity --data book.txt --max-length 1024 --stride 512
    python scripts/evaluate.py perplexity --data Salesforce/wikitext --split test --join --model meta-llama/Llama-3.1-8B
    python scripts/evaluate.py perplexity --data conversations.jsonl --adapter runs/mine/adapter

A .txt file is one text. Each row of other files and of data sets is a text, made as train.py makes it: of a conversation,
the answers are scored. With --join the texts of all rows are one text, as in transformers' guide to perplexity. The
intervals resample the texts, or the windows of a single text. The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, cast

from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.pretrained import Pretrained, PretrainedOptions
from qlora_jax.commands.evaluations.output import bounds, check_least, number, print_json, print_table
from qlora_jax.data import Template
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import Document, Interval, Perplexity, evaluate_perplexity, read_documents, sliding_windows
from qlora_jax.models import CausalLM, causal_family_of, positions_left
from qlora_jax.nn import data_mesh, mesh_context

_WINDOW = 1024  # tokens of a window, if the positions of the model allow as many


@dataclasses.dataclass(frozen=True)
class PerplexityOptions:
    """Options of the texts and the windows."""

    data: str | None = None
    """A .txt file, which is one text; or a file or folder of rows, or a data set on the hub, as for train.py."""
    split: str | None = None
    """Split of a data set; train if left out."""
    join: bool = False
    """Join the texts of all rows (column "text") to one text, with an empty line between two of them."""
    whole: bool = False
    """Score everything, and not only the answers of conversations."""
    template: Template | None = None
    """How conversations are written as text; if left out, as in the adapter's training, else as train.py chooses."""
    limit: int | None = None
    """Number of rows, the first ones; all of them if left out."""
    max_length: int | None = None
    """Number of tokens of a window; 1024 if left out, or fewer if the model has fewer positions."""
    stride: int | None = None
    """Number of tokens by which a window moves; half of the window if left out."""
    batch_size: int = 4
    """Number of windows in a batch."""
    resamples: int = 1_000
    """Number of resamples for the intervals."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        check_least(self, limit=1, max_length=2, stride=1, batch_size=1, resamples=1, seed=0)

    def windows(self, room: int | None) -> tuple[int, int]:
        """Return (max_length, stride) for a model with so many positions.

        Raises:
            OptionError: a window is larger than the model's positions, or a stride larger than the window.
        """
        length = self.max_length or (_WINDOW if room is None else min(_WINDOW, room))
        if room is not None and length > room:
            raise OptionError(f"max_length: expected at most the {room:,} positions of the model, found {length:,}")
        stride = max(1, length // 2) if self.stride is None else self.stride
        sliding_windows(0, length, stride)  # which checks them
        return length, stride


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    perplexity: PerplexityOptions = dataclasses.field(default_factory=PerplexityOptions)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(perplexity, Options, __doc__, arguments, program=program)


def perplexity(options: Options) -> None:
    """Print the perplexity of a model."""
    asked = options.perplexity
    if asked.data is None:
        raise OptionError("--data: expected a text file, a file of rows or a data set, found none")
    with mesh_context(data_mesh()):
        pretrained = options.model.open()
        length, stride = windows_of(pretrained, asked)
        documents, description = documents_for(pretrained, asked)
        print(description, file=sys.stderr)
        model = pretrained.load(mesh=data_mesh(), progress=sys.stderr.isatty())
        assert isinstance(model, CausalLM)  # `windows_of` raises an error for other models
        found = evaluate_perplexity(
            *nnx.split(model),
            documents,
            pretrained.tokenizer,
            max_length=length,
            stride=stride,
            batch_size=asked.batch_size,
            progress=sys.stderr.isatty(),
        )
    draws = {"resamples": asked.resamples, "seed": asked.seed}
    value, bits = found.perplexity(**draws), found.bits_per_byte(**draws)
    header = ["data", "perplexity", "95 % interval", "bits per byte", "95 % interval", "tokens", "bytes", found.kind]
    cells = [number(value.value, 4), bounds(value, 4), number(bits.value, 4), bounds(bits, 4)]
    counts = [f"{found.tokens.sum():,}", f"{found.bytes.sum():,}", f"{len(found.tokens):,}"]
    print_table(header, [[asked.data, *cells, *counts]])
    print()
    print_json({"perplexity": plain(found, value, bits), "max_length": length, "stride": stride, **draws})


def windows_of(pretrained: Pretrained, options: PerplexityOptions) -> tuple[int, int]:
    """Return (max_length, stride) for a model.

    Raises:
        UnsupportedError: it is an encoder-decoder.
        OptionError: see `PerplexityOptions.windows`.
    """
    causal_family_of(pretrained.checkpoint.config)
    return options.windows(positions_left(pretrained.checkpoint.model_config, pretrained.method))


def documents_for(pretrained: Pretrained, options: PerplexityOptions) -> tuple[list[Document], str]:
    """Return (the texts, a description of them), which are written as the adapter was trained."""
    metadata = pretrained.adapter_metadata
    template = options.template or (metadata and metadata.template) or "auto"
    return read_documents(
        str(options.data),
        pretrained.tokenizer,
        split=options.split,
        template=cast(Template, template),
        whole=options.whole,
        join=options.join,
        limit=options.limit,
        vocabulary=pretrained.checkpoint.model_config.vocab_size,
    )


def plain(found: Perplexity, value: Interval, bits: Interval) -> dict[str, Any]:
    """Return a perplexity and its intervals as JSON holds them."""
    return {
        "value": value.value,
        "low": value.low,
        "high": value.high,
        "loss": found.loss,
        "bits_per_byte": {"value": bits.value, "low": bits.low, "high": bits.high},
        "token_accuracy": float(found.greedy.sum() / found.tokens.sum()),
        "tokens": int(found.tokens.sum()),
        "bytes": int(found.bytes.sum()),
        found.kind: len(found.tokens),
    }
