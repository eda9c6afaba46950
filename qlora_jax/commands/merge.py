"""Merge a LoRA adapter into its base model and write a Hugging Face folder; report how much the logits change.

    python scripts/merge.py --adapter runs/demo/adapter --output merged
    python scripts/merge.py --model path/or/hub-id --adapter … --output … --base dequantized

The adapter was trained on a base model in 4 bits. With `--base original` it is added to the original weights, which differ
slightly from those. With `--base dequantized` it is added to the dequantised weights, which are those of the training; the
merged model then has the rounding errors of 4 bits in all linear layers (and in token embedding and output head, if these
were quantised too). The last lines compare the merged model with the trained one: the adapter on the base in 4 bits.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qlora_jax import cli
from qlora_jax.adapters.metadata import QuantizationChoice
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import OptionError
from qlora_jax.export.drift import logit_drift, sample_logits
from qlora_jax.export.merge import MergedDtype, own_dtype
from qlora_jax.export.pretrained import merge_pretrained
from qlora_jax.quant import DataType, Quantization

LOW_AGREEMENT = 0.9  # below this share of positions with the same most likely token, --base dequantized is recommended
SAMPLES = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer: 40 miles per hour.",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "Water boils at 100 degrees Celsius at sea level, where the pressure of the air is one atmosphere.",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Merge a LoRA adapter into its base model."""

    adapter: str
    """Folder or hub id of the adapter, in PEFT's format."""
    output: Path
    """Folder to write, which must be empty or must not exist."""
    model: str | None = None
    """Folder, .gguf file or hub id of the base model; SmolLM2-135M-Instruct if left out."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: MergedDtype | Literal["auto", "4bit"] = "auto"
    """Type of the merged weights; auto: that of the base. With 4bit, linear layers have the storage of the base (nf4 for a
    dense base), which transformers with bitsandbytes can read, and all other weights are bfloat16."""
    base: Literal["original", "dequantized"] = "original"
    """Weights to which the adapter is added: those of the checkpoint, or the same after quantisation to 4 bits and back."""
    data_type: DataType | Literal["none"] | None = None
    """Storage of the base in training, none for dense weights; if left out, as train.py recorded it, else nf4."""
    block_size: int | None = None
    """Number of weights that shared a scale in training; if left out, as train.py recorded it, else 64."""
    double_quantization: bool | None = None
    """Whether the scales were quantised too in training; if left out, as train.py recorded it, else yes."""
    sample: Path | None = None
    """Text file; the logits of its paragraphs are compared. A few built-in sentences if left out."""
    sample_tokens: int = 256
    """Maximum number of tokens of a text that are compared."""
    compare: bool = True
    """Whether to load both models and compare their logits."""


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(merge_adapter, Options, __doc__, arguments, program=program, saved=saved_work)


def saved_work(options: Options) -> str:
    """Return whether the folder is written, for the message of an interruption."""
    return f"{options.output} is {'written' if (options.output / 'config.json').exists() else 'not written'}"


def merge_adapter(options: Options) -> None:
    """Merge the adapter, write the folder and, if asked for, print how much the logits change."""
    choice = QuantizationChoice(options.data_type, options.block_size, options.double_quantization)
    pretrained = open_pretrained(options.model, options.adapter, revision=options.revision, quantization=choice)
    quantization, tokenizer = pretrained.quantization, pretrained.tokenizer
    texts = SAMPLES if options.sample is None else options.sample.read_text(encoding="utf-8").split("\n\n")
    batches = [np.asarray([tokenizer(text)["input_ids"][: options.sample_tokens]]) for text in texts if text.strip()]
    if not batches:
        raise OptionError(f"--sample {options.sample}: expected some text, found none")

    packed = (quantization or Quantization()) if options.dtype == "4bit" else None
    kind = own_dtype(pretrained.checkpoint) if options.dtype == "auto" else options.dtype
    merge_pretrained(
        pretrained,
        options.output,
        dtype="bfloat16" if kind == "4bit" else kind,
        quantization=packed,
        base=options.base,
    )
    source = pretrained.base.name
    print(f"Merged {options.adapter} into {source} ({options.base} weights, {kind}): {options.output}")
    if not options.compare:
        return
    # One model at a time: the logits of the first are on the host before the second is loaded.
    before = sample_logits(pretrained.load(), batches)
    after = sample_logits(load_model(open_checkpoint(str(options.output)), quantization=packed), batches)
    drift = logit_drift(before, after)
    storage = "dense weights" if quantization is None else quantization.data_type
    print(
        f"Logits of the merged model against the adapter on the base in {storage}, over "
        f"{drift.positions} positions:\n  largest difference {drift.max:.4g}, mean {drift.mean:.4g}; "
        f"the same most likely token at {drift.same_token:.1%} of positions"
    )
    if options.base == "original" and drift.same_token < LOW_AGREEMENT:
        print(
            "  The original weights differ from the rounded ones that the adapter was trained on; "
            "--base dequantized merges onto the latter.",
        )
