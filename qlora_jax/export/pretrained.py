"""Merges an opened model (`open_pretrained`) with its adapter."""

from pathlib import Path
from typing import Literal

from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.quant import Quantization

__all__ = ["merge_pretrained"]


def merge_pretrained(
    pretrained: Pretrained,
    output: str | Path,
    *,
    dtype: MergedDtype = "bfloat16",
    quantization: Quantization | None = None,
    base: Literal["original", "dequantized"] = "original",
    progress: bool = True,
) -> Path:
    """Write the base with its adapter merged into it, and the tokenizer, as a Hugging Face folder; return the folder.

    Args:
        output: a folder that does not exist yet or is empty.
        dtype: dtype of the weights.
        quantization: storage of the linear layers, for transformers with bitsandbytes; None writes them in `dtype`.
        base: the values to merge the adapter into: those of the checkpoint, or those that they had in training after they
            were quantised (`pretrained.quantization`, `pretrained.embedding_storage`).

    Raises:
        QLoRAError: see `merge`.
    """
    dequantized = base == "dequantized"
    return merge(
        pretrained.checkpoint,
        pretrained.adapter,
        output,
        dtype=dtype,
        quantization=quantization,
        from_dequantized=pretrained.quantization if dequantized else None,
        from_embedding_storage=pretrained.embedding_storage if dequantized else "none",
        subtracted=pretrained.subtracted,
        tokenizer=pretrained.tokenizer,
        progress=progress,
    )
