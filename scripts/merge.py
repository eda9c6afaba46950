"""Merge a LoRA adapter into its base model and write a Hugging Face folder; say how far the logits move.

    python scripts/merge.py --adapter runs/demo/adapter --output merged
    python scripts/merge.py --model path/or/hub-id --adapter … --output … --base dequantized

The adapter was trained on the base in 4 bits. Merged onto the original weights (`--base original`) it meets
weights that are slightly different from those; merged onto the dequantised ones (`--base dequantized`) it
meets the same, at the cost of the 4-bit rounding in all linear layers (and of that in token table and head, where these
were packed). The last lines compare both with what
was trained: the adapter, unmerged, on the base in 4 bits.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from qlora_jax.adapters.metadata import QuantizationChoice, read_adapter_metadata
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.hub import resolve
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import OptionError
from qlora_jax.export.drift import logit_drift, sample_logits
from qlora_jax.export.merge import MergedDtype
from qlora_jax.export.pretrained import merge_pretrained
from qlora_jax.quant import DataType, Quantization

LOW_AGREEMENT = 0.9  # share of positions with the same most likely token, below which the other base is named
SAMPLES = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer: 40 miles per hour.",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "Water boils at 100 degrees Celsius at sea level, where the pressure of the air is one atmosphere.",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Merge a LoRA adapter into its base model."""

    adapter: str
    """Folder (or hub id) of the adapter, in PEFT's format."""
    output: Path
    """Folder to write; it must be empty or not exist."""
    model: str | None = None
    """Folder, .gguf file or hub id of the base; SmolLM2-135M-Instruct if left out."""
    revision: str | None = None
    """Revision of a hub id."""
    dtype: MergedDtype | Literal["4bit"] = "bfloat16"
    """Type of the merged weights; 4bit: linear layers in the storage of the base (else nf4), for transformers with
    bitsandbytes, the rest in bfloat16."""
    base: Literal["original", "dequantized"] = "original"
    """Which weights to merge onto: the checkpoint's, or what 4-bit training made of them."""
    data_type: DataType | Literal["none"] | None = None
    """Storage of the base while the adapter was trained, none for dense; as train.py recorded it (else nf4) if left out."""
    block_size: int | None = None
    """Weights that shared a scale there; as recorded, else 64, if left out."""
    double_quantization: bool | None = None
    """Whether the scales were quantised as well there; as recorded, else yes, if left out."""
    sample: Path | None = None
    """Text file whose paragraphs to compare logits on; a few built-in sentences if left out."""
    sample_tokens: int = 256
    """The most tokens of one text that are compared."""
    compare: bool = True
    """Whether to load both models and compare their logits."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        run(arguments)
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def run(arguments: Arguments) -> None:
    choice = QuantizationChoice(arguments.data_type, arguments.block_size, arguments.double_quantization)
    adapter = resolve(arguments.adapter)
    if arguments.base == "dequantized":
        metadata = read_adapter_metadata(adapter)
        if choice.complete(metadata) is None and (metadata is None or metadata.embedding_storage == "none"):
            raise OptionError("--base dequantized: expected an adapter trained on 4 bits, found one on dense weights")
    pretrained = open_pretrained(arguments.model, adapter, revision=arguments.revision, quantization=choice)
    quantization, tokenizer = pretrained.quantization, pretrained.tokenizer
    texts = SAMPLES if arguments.sample is None else arguments.sample.read_text(encoding="utf-8").split("\n\n")
    batches = [np.asarray([tokenizer(text)["input_ids"][: arguments.sample_tokens]]) for text in texts if text.strip()]
    if not batches:
        raise ValueError(f"--sample {arguments.sample}: expected some text, found none")

    packed = (quantization or Quantization()) if arguments.dtype == "4bit" else None
    merge_pretrained(
        pretrained,
        arguments.output,
        dtype="bfloat16" if arguments.dtype == "4bit" else arguments.dtype,
        quantization=packed,
        base=arguments.base,
    )
    source = pretrained.base.name
    print(f"Merged {arguments.adapter} into {source} ({arguments.base} weights, {arguments.dtype}): {arguments.output}")
    if not arguments.compare:
        return
    # One model at a time: the logits of the first are on the host before the second is loaded.
    before = sample_logits(pretrained.load(), batches)
    after = sample_logits(load_model(open_checkpoint(str(arguments.output)), quantization=packed), batches)
    drift = logit_drift(before, after)
    storage = "dense weights" if quantization is None else quantization.data_type
    print(
        f"Logits of the merged model against the adapter on the base in {storage}, over "
        f"{drift.positions} positions:\n  largest difference {drift.max:.4g}, mean {drift.mean:.4g}; "
        f"the same most likely token at {drift.same_token:.1%} of positions"
    )
    if arguments.base == "original" and drift.same_token < LOW_AGREEMENT:
        print(
            "  The original weights differ from the rounded ones that the adapter was trained on; "
            "--base dequantized merges onto the latter.",
        )


if __name__ == "__main__":
    sys.exit(main())
