"""Merges an opened model (`open_pretrained`) with its adapter."""

from pathlib import Path
from typing import Literal

from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.errors import OptionError
from qlora_jax.export.merge import MergedDtype, merge
from qlora_jax.quant import Quantization

__all__ = ["merge_pretrained"]


def merge_pretrained(
    pretrained: Pretrained,
    output: str | Path,
    *,
    dtype: MergedDtype | None = None,
    quantization: Quantization | None = None,
    base: Literal["original", "dequantized"] = "original",
    progress: bool = True,
) -> Path:
    """Write the base with its adapter merged into it, and the tokenizer, as a Hugging Face folder; return the folder.

    Args:
        output: a folder that does not exist yet or is empty.
        dtype: dtype of the weights; that of the base if None.
        quantization: storage of the linear layers, for transformers with bitsandbytes; None writes them in `dtype`.
        base: the values to merge the adapter into: those of the checkpoint, or those that they had in training after they
            were quantised (`pretrained.quantization`, `pretrained.embedding_storage`).

    Raises:
        OptionError: `base` is "dequantized", and all weights were dense in training.
        QLoRAError: see `merge`.
    """
    dequantized = base == "dequantized"
    if dequantized and pretrained.quantization is None and pretrained.embedding_storage == "none":
        raise OptionError("--base dequantized: expected an adapter that was trained on 4 bits, found one on dense weights")
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
